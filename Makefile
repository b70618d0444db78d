# Each target makes what it needs: a virtual environment first, then the packages of constraints.txt.
#   make demo                       the main job: see README.md
#   make test PYTHON=python3.13     the same under another Python, in an environment of its own
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

NEEDED := 3.11
is_new_enough = $(1) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(NEEDED)".split("."))))' 2>/dev/null

# An environment belongs to one Python: a PYTHON given by hand gets .venv-<its version>.
ifdef PYTHON
  ifndef VENV
    VENV := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo unknown)
  endif
else
  VENV ?= .venv
  PYTHON := $(firstword $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
    if $(call is_new_enough,$$p); then echo $$p; fi; done) python3)
endif

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
INPUTS := pyproject.toml constraints.txt

.PHONY: help demo demo-short lab notebooks test test-long lint parity clean

help:
	@echo "make demo        train a small model, then show where its tokens go (minutes on two cores)"
	@echo "make demo-short  the same, cut to seconds: does everything run?"
	@echo "make lab         the papers' questions, answered small: what has no results yet (LAB_ARGS=--fresh: all, 2 hours)"
	@echo "make notebooks   execute the notebooks anew, their outputs kept (some minutes)"
	@echo "make test        the tests, four minutes; PYTEST_ARGS is handed on, PYTHON=python3.13 chooses the Python"
	@echo "make test-long   those that take long: meshes, several processes, every draft, notebooks; likewise"
	@echo "make lint        style, format and types"
	@echo "make parity      comparisons with torch and transformers, which it installs"
	@echo "make clean       remove environments and caches (not runs/)"

demo: $(VENV)/.installed
	$(BIN)/dsv3 demo

demo-short: $(VENV)/.installed
	$(BIN)/dsv3 demo --short --out runs/demo-short

lab: $(VENV)/.installed
	$(BIN)/python -m experiments.lab $(LAB_ARGS)

notebooks: $(VENV)/.installed-notebooks
	$(BIN)/python notebooks/execute.py

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-test
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(PYTEST) -m "not long and not parity" $(PYTEST_ARGS)

test-long: $(VENV)/.installed-test
	$(PYTEST) -m "long and not parity" $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: $(VENV)/.installed-parity
	$(BIN)/python -m pytest -m parity $(PYTEST_ARGS)

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

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	@echo "Installing into $(VENV) (once; some minutes on a slow line)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.installed-notebooks: $(VENV)/.installed
	$(PIP) --editable '.[notebooks]'
	@touch $@

$(VENV)/.installed-parity: $(VENV)/.installed-test
	$(PIP) --editable '.[test,parity]'
	@touch $@
