# Needs Python 3.11+, pip and make. Everything is installed into .venv of this checkout, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH ?= torch>=2.11,<2.14
WORKERS ?= 2
# What is imported is compiled once, not by each of the many processes that tests start.
unexport PYTHONDONTWRITEBYTECODE
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --max-worker-restart=1 --dist loadgroup --no-loadscope-reorder

.PHONY: help venv demo test test-all lint format dist clean

help:
	@echo "make demo      train a small GPT over two pipeline stages on this machine (about 2 minutes)"
	@echo "make test      run the tests that a change has to pass"
	@echo "make test-all  those, and the thorough ones: more seeds, models and processes"
	@echo "make lint      ruff, mypy, import-linter"
	@echo "make format    put the source into its standard form"
	@echo "make dist      build the wheel and the sdist, then install and try the wheel in a clean folder"
	@echo "make venv      install everything into $(VENV)"
	@echo "make clean     remove what the above made ($(VENV) too)"

venv: $(STAMP)

# torch comes first and alone: so a CPU build that pip is configured to find is taken as it is,
# and what depends on torch then meets it installed.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "raypar needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	@echo "installing torch, Ray and raypar into $(VENV), once: some minutes, without further words"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m examples.demo

test: $(STAMP)
	$(PYTEST) -m "not thorough" $(PYTEST_ARGS)

test-all: $(STAMP)
	RAYPAR_THOROUGH=1 $(PYTEST) $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

dist: $(STAMP)
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" BIN="$(BIN)" bash release/dist.sh

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
