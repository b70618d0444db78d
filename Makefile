# Each target first makes a virtual environment, and installs what it needs as constraints.txt pins it.
#   make demo ACCELERATOR=cuda13    on an NVIDIA GPU (cuda12 for older drivers), or tpu on a TPU host
#   make test PYTHON=python3.11     under another Python, in an environment of its own
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := $(or $(VENV),.venv$(if $(PYTHON),-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')))
PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3,$(shell command -v $(p))))
BIN := $(VENV)/bin

ifneq ($(filter-out cuda13 cuda12 tpu,$(ACCELERATOR)),)
  $(error ACCELERATOR='$(ACCELERATOR)' is not one of cuda13 cuda12 tpu; leave it out for the CPU)
endif
# JAX falls back to the CPU where it finds no device: then this ends.
FIND_DEVICE := $(if $(ACCELERATOR),@$(BIN)/python -c 'import jax; print(*jax.devices()); \
  exit(jax.default_backend() == "cpu" and "ACCELERATOR=$(ACCELERATOR): JAX finds no device but the CPU")')

# What one run of the tests compiled, the next one finds.
JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.pytest_cache/programs
# Threads of NumPy's small products wait for one another in loops, beside other processes for half of a file's time.
PYTEST := OPENBLAS_NUM_THREADS=1 JAX_COMPILATION_CACHE_DIR=$(JAX_COMPILATION_CACHE_DIR) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# An older Python with its older JAX must pass these: mathematics, kernels, a training step, decoding.
CORE := $(addprefix tests/test_,routing.py cross_entropy.py kernels.py \
  low_precision.py::test_numbers_and_scales_are_the_oracles_bit_by_bit attention.py::test_expanded_equals_absorbed \
  train_step.py::test_the_bias_follows_the_load_of_the_batch \
  generate.py::test_cached_greedy_decoding_equals_the_teacher_forced_forward)

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14
	@echo "packages go into $(VENV); PYTHON=python3.13 chooses another Python"
demo: $(VENV)/.with-base$(ACCELERATOR:%=-%) ## train a small model, evaluate it and let it write: five minutes
	$(FIND_DEVICE)
	$(BIN)/dsv3 demo
demo-short: $(VENV)/.with-base$(ACCELERATOR:%=-%) ## the same with a few steps, to see that everything runs: a minute
	$(FIND_DEVICE)
	$(BIN)/dsv3 demo --short --out runs/demo-short
lab: $(VENV)/.with-base ## run the studies that have no results yet; LAB_ARGS=--fresh: all, in about five hours
	$(BIN)/python -m experiments.lab run all $(LAB_ARGS)
notebooks: $(VENV)/.with-notebooks ## execute the notebooks and keep their outputs: some minutes
	$(BIN)/python notebooks/execute.py
docs: $(VENV)/.with-docs ## build the site of guides, API, notebooks and studies: a minute
	$(BIN)/python -m sphinx -nW --keep-going -q -b html -c docs . docs/_build
	@echo "The site is docs/_build/index.html"
wheel: $(VENV)/.with-release ## build a wheel, install it elsewhere, and run the short demo there
	rm -rf dist build
	$(BIN)/python -m build --no-isolation -o dist . > /dev/null
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/try_wheel.py dist/*.whl
environment: $(VENV)/.with-test ## install what the tests need, and run nothing
everything: $(VENV)/.with-test,plan-gpu,plan-tpu,docs,release ## install what .ci/run needs
	@touch $(addprefix $(VENV)/.with-,base test docs release)
compilers: $(VENV)/.with-test,plan-gpu,plan-tpu ## install compilers for GPUs and TPUs (360 MB), for the long tests
test: $(VENV)/.with-test ## run the fast tests: some minutes, later runs half of it; PYTEST_ARGS='-k router' for some
	$(PYTEST) -m "not long and not rare and not parity" $(PYTEST_ARGS)
test-core: $(VENV)/.with-test-core ## the tests that an older Python must pass
	$(PYTEST) -m "not long and not rare and not parity" $(CORE) $(PYTEST_ARGS)
test-long: $(VENV)/.with-test ## run the long tests: meshes, several processes, drafts, three notebooks
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) -m "long and not rare and not parity" $(PYTEST_ARGS)
test-all: $(VENV)/.with-test ## run all of them, the rare ones too, which CI leaves out
	$(PYTEST) -m "not parity" $(PYTEST_ARGS)
parity: $(VENV)/.with-test,parity,eval ## compare with torch, transformers and lm_eval
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -m parity $(PYTEST_ARGS)
pairs: $(VENV)/.with-test ## tiny runs and requests in which each two settings meet: two hours, resumable
	PAIRS=runs/pairs $(BIN)/python -m pytest -n 2 --dist load tests/test_pairs.py $(PAIRS_ARGS)
campaign: $(VENV)/.with-test ## hostile inputs, damage, kills, sanitizers: MINUTES=120 SEED=0
	$(BIN)/python -m tests.campaign.sanitizers $$(($(or $(MINUTES),120) * 6)) $(or $(SEED),0)
	$(BIN)/python -m tests.campaign --minutes $(or $(MINUTES),120) --seed $(or $(SEED),0)
lint: $(VENV)/.with-test ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
clean: ## remove environments and caches, but not runs/
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*\#\# .*/\1/p' Makefile)

# The environment, and a stamp for each set of extras: nothing is installed twice until its inputs change.
PIP = $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off --no-compile --constraint constraints.txt
$(BIN)/python:
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
$(VENV)/.with-base $(ACCELERATOR:%=$(VENV)/.with-base-%): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), once; some minutes on a slow line"
	@$(PIP) --editable . $(ACCELERATOR:%='jax[%]>=0.11') | sed '/already satisfied/d'
	@touch $@
$(VENV)/.with-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing $* into $(VENV), once; some minutes on a slow line"
	@$(PIP) --editable '.[$*]' | sed '/already satisfied/d'
	@touch $@
