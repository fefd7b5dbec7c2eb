# The commands that people and CI share. PYTHON is the interpreter of the environment the project is installed in.
PYTHON ?= python

.PHONY: check format lint types test mutants

check: lint types test

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest

mutants:  # wants the extra: pip install -e '.[dev,mutants]'
	$(PYTHON) benchmarks/mutants.py
