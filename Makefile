# make quickstart: distil the shipped student with three divergences, on and off policy, and open the report
# make test:       everything that must hold, as many tests at once as there are cores; alone: pytest tests/FILE.py
# make lint:       ruff and mypy
# make bench:      time and memory against the limit and the peers; half an hour, on a machine with nothing else to do

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint format docs bench build clean

quickstart: $(VENV)/.installed
	$(BIN)/kullback compare recipes/quickstart.yaml --resume

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

build: $(VENV)/.installed-build
	$(BIN)/python -m build

$(VENV)/bin/python:
	$(or $(shell command -v $(PYTHON)),python3) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e .
	touch $@

# One rule for the extras: .installed-test brings what the tests need, and so on.
EXTRAS_test := test,peers,diffusion
EXTRAS_lint := lint
EXTRAS_docs := docs
EXTRAS_build := build
$(VENV)/.installed-%: $(VENV)/.installed
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[$(EXTRAS_$*)]"
	touch $@

clean:
	rm -rf $(VENV) build dist site runs
