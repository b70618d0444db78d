# Each target first makes a virtual environment and installs the packages that it needs, as constraints.txt pins them.
#   make demo                       train a small model: see README.md
#   make demo ACCELERATOR=cuda13    the same on an NVIDIA GPU; ACCELERATOR=tpu on a TPU
#   make test PYTHON=python3.13     the tests under another Python, in an environment of its own
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

NEEDED := $(if $(ACCELERATOR),3.12,3.11)
is_new_enough = $(1) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(NEEDED)".split("."))))' 2>/dev/null

# An environment belongs to one Python: a PYTHON given by hand gets .venv-<its version>.
ifdef PYTHON
  ifndef VENV
    VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo unknown)
  endif
else
  VENV ?= .venv
  PYTHON := $(firstword $(shell for p in python3.13 python3.12 python3.11 python3; do \
    if $(call is_new_enough,$$p); then echo $$p; fi; done) python3)
endif

# What JAX needs for a device: an extra of the package jax.
ACCELERATORS := cuda13 cuda12 tpu
ifdef ACCELERATOR
  ifneq ($(words $(filter $(ACCELERATORS),$(ACCELERATOR))),1)
    $(error ACCELERATOR='$(ACCELERATOR)' is not one of $(ACCELERATORS); leave it out for the CPU)
  endif
endif

BIN := $(VENV)/bin
comma := ,
INPUTS := pyproject.toml constraints.txt

.PHONY: help demo demo-short lab notebooks docs wheel environment everything test test-core test-long test-all pairs campaign compilers lint parity clean

help:
	@echo "make demo        train a small model, evaluate it and let it write: about five minutes on two CPU cores"
	@echo "                 ACCELERATOR=cuda13 or tpu: on a GPU or TPU, whose packages it installs too"
	@echo "make demo-short  the same with a few steps, to see that everything runs: about a minute"
	@echo "make lab         run the studies that have no results yet; LAB_ARGS=--fresh runs all of them, in over 5 hours"
	@echo "make notebooks   execute the notebooks and keep their outputs: some minutes"
	@echo "make docs        build the site of docs/, in a minute: guides, API, notebooks, studies"
	@echo "make wheel       build a wheel, install it elsewhere, and run the short demo there"
	@echo "make environment install what the tests need, and run nothing"
	@echo "make everything  install what .ci/run needs: the compilers, and what builds the site and a wheel"
	@echo "make test        run the tests: about three minutes; PYTEST_ARGS='-k router' runs some of them"
	@echo "make test-long   run the long tests: meshes, several processes, all drafts, notebooks"
	@echo "make test-all    run all of them, the rare ones too, which CI leaves out"
	@echo "make pairs       settings by pairs: tiny runs and requests in which each two meet; two hours, resumable"
	@echo "make campaign    hostile inputs, damage, kills, sanitizers: two hours; MINUTES=10, SEED=1"
	@echo "make compilers   install the compilers for GPUs and TPUs (360 MB), which the long tests use if they are there"
	@echo "make lint        check style, format and types"
	@echo "make parity      compare with torch, transformers and lm_eval, which this installs"
	@echo "make clean       remove environments and caches, but not runs/"
	@echo
	@echo "The first target installs the packages into $(VENV). PYTHON=python3.13 chooses another Python."

demo: $(VENV)/.installed$(ACCELERATOR:%=-%)
	$(check_device)
	$(BIN)/dsv3 demo

demo-short: $(VENV)/.installed$(ACCELERATOR:%=-%)
	$(check_device)
	$(BIN)/dsv3 demo --short --out runs/demo-short

# End where JAX would fall back to the CPU; else name the device.
ifdef ACCELERATOR
define check_device
@$(BIN)/python -c 'import jax; d = jax.devices(); print(len(d), "x", d[0].device_kind); \
  exit(d[0].platform == "cpu" and "ACCELERATOR=$(ACCELERATOR) is installed, but JAX finds no device but the CPU")'
endef
endif

lab: $(VENV)/.installed
	$(BIN)/python -m experiments.lab run all $(LAB_ARGS)

notebooks: $(VENV)/.installed-notebooks
	$(BIN)/python notebooks/execute.py

docs: $(VENV)/.installed-docs
	@$(BIN)/python -c 'import furo, myst_nb, sphinx, sphinx_copybutton; __import__("sphinx-mathjax-offline")' 2>/dev/null || \
	  { echo "a package of the site is missing: rm $(VENV)/.installed-docs, then make docs installs it" >&2; exit 1; }
	$(BIN)/python -m sphinx -nW --keep-going -q -b html -c docs . docs/_build
	@echo "The site is docs/_build/index.html"

wheel: $(VENV)/.installed-release
	rm -rf dist build
	$(BIN)/python -m build --no-isolation -o dist . > /dev/null
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/try_wheel.py dist/*.whl

environment: $(VENV)/.installed-test

everything: $(VENV)/.installed-all

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-test
	$(PYTEST) -m "not long and not rare and not parity" $(PYTEST_ARGS)

# An older Python with its older JAX must pass these: mathematics, kernels, a training step, decoding.
CORE := $(addprefix tests/test_,routing.py cross_entropy.py kernels.py \
  attention.py::test_expanded_equals_absorbed \
  train_step.py::test_the_bias_follows_the_load_of_the_batch \
  generate.py::test_cached_greedy_decoding_equals_the_teacher_forced_forward)

test-core: $(VENV)/.installed-test-core
	$(PYTEST) -m "not long and not rare and not parity" $(CORE) $(PYTEST_ARGS)

test-long: $(VENV)/.installed-test
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) -m "long and not rare and not parity" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test
	$(PYTEST) -m "not parity" $(PYTEST_ARGS)

pairs: $(VENV)/.installed-test
	$(BIN)/python -m tests.pairs --out runs/pairs $(PAIRS_ARGS)

campaign: $(VENV)/.installed-test
	tests/campaign/sanitizers.sh $(BIN)/python $$(($(or $(MINUTES),120) * 6)) $(or $(SEED),0)
	$(BIN)/python -m tests.campaign --minutes $(or $(MINUTES),120) --seed $(or $(SEED),0)

# The compilers for GPUs and TPUs, 360 MB: with them the long tests compile for devices that are not here.
compilers: $(VENV)/.installed-plan

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: $(VENV)/.installed-parity
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -m parity $(PYTEST_ARGS)

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# The environment, and a stamp file for each set of packages: nothing is installed twice until INPUTS change.
$(BIN)/python:
	@if ! $(call is_new_enough,$(PYTHON)); then \
	  echo "$(PYTHON) is missing or older than $(NEEDED): install a newer Python, or name one with PYTHON=…" >&2; \
	  exit 1; fi
	@if [ -e $(VENV) ]; then \
	  echo "$(VENV) is there but holds no working Python: remove it, then run make again" >&2; exit 1; fi
	@if ! $(PYTHON) -m venv $(VENV) >/dev/null 2>&1; then \
	  rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: apt install python3-venv)" >&2; \
	  exit 1; fi

# Install the packages of $(1), and of $(2) if given: the names of those that are collected, on one line, then how long
# it took.
define install
@echo "Installing $(1)$(2:%= and %) into $(VENV) (once; some minutes on a slow line)"
@PYTHONUNBUFFERED=1 $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off \
  --constraint constraints.txt --editable '$(1)' $(2:%='%') \
  | while read -r what name rest; do case "$$what $$name" in \
    Collecting*) printf ' %s' "$${name%%[<>=!~;]*}" ;; \
    "Installing collected") printf '\n unpacking …' ;; \
    esac; done || { echo "pip failed, see above: is there a network? (Offline: PIP_FIND_LINKS=FOLDER of wheels)" >&2; exit 1; }; \
  echo " done in $$SECONDS s"
endef

define say_compiler
@for cxx in "$${CXX:-}" c++ g++ clang++; do \
  if [ -n "$$cxx" ] && command -v "$$cxx" >/dev/null; then found="$$cxx"; break; fi; done; \
if [ -n "$${found:-}" ]; then \
  echo "C++ compiler found: $$found; the kernels for the CPU are compiled at their first use"; \
else \
  echo "No C++ compiler found (c++, g++, clang++): everything works, but slower on a CPU"; fi
endef

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	$(call install,.)
	$(say_compiler)
	@touch $@

# JAX's own extras: the plugin, and with CUDA the libraries that it needs.
$(ACCELERATORS:%=$(VENV)/.installed-%): $(VENV)/.installed-%: $(VENV)/.installed
	$(call install,.,jax[$*]>=0.11)
	@touch $@

# All of them at once, where nothing is installed yet.
$(VENV)/.installed-test-core: $(INPUTS) | $(BIN)/python
	$(call install,.[test-core])
	$(say_compiler)
	@touch $(VENV)/.installed $@

$(VENV)/.installed-test: $(INPUTS) | $(BIN)/python
	$(call install,.[test])
	$(say_compiler)
	@touch $(VENV)/.installed $@-core $@

# With what the tests need, at once too.
$(VENV)/.installed-plan: $(INPUTS) | $(BIN)/python
	$(call install,.[test$(comma)plan-gpu$(comma)plan-tpu])
	$(say_compiler)
	@touch $(VENV)/.installed $(VENV)/.installed-test-core $(VENV)/.installed-test $@

$(VENV)/.installed-all: $(INPUTS) | $(BIN)/python
	$(call install,.[test$(comma)plan-gpu$(comma)plan-tpu$(comma)docs$(comma)release])
	$(say_compiler)
	@touch $(VENV)/.installed $(addprefix $(VENV)/.installed-,test-core test plan docs release) $@

$(VENV)/.installed-notebooks: $(VENV)/.installed
	$(call install,.[notebooks])
	@touch $@

$(VENV)/.installed-docs $(VENV)/.installed-release: $(VENV)/.installed-%: $(VENV)/.installed
	$(call install,.[$*])
	@touch $@

$(VENV)/.installed-parity: $(VENV)/.installed-test
	$(call install,.[test$(comma)parity$(comma)eval])
	@touch $@
