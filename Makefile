# The commands that people and CI share. PYTHON is the interpreter of the environment the project is installed in.
PYTHON ?= python

.PHONY: check format lint types test wide proof site docs pages bench mutants fuzz

check: lint types test wide proof site

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

wide:  # the tests of models that are like another one
	$(PYTHON) -m pytest -m wide

proof:  # the named faults, each against its tests, and a sample of `make fuzz`
	$(PYTHON) -m pytest -m proof tests/faults tests/fuzz

# The site wants the extra: pip install -e '.[docs]'. Nothing is downloaded to build it.
MKDOCS = NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs
site:
	$(MKDOCS) build --strict --quiet

docs:
	$(MKDOCS) serve

pages:  # the generated pages of the reference; tests compare them
	$(PYTHON) scripts/cli_reference.py
	$(PYTHON) scripts/recipe_reference.py

# The benchmarks of minutes that need no data, half an hour in all; see benchmarks/README.md. Into the committed figures:
# make bench BENCH_OUT=benchmarks/results
BENCHMARKS = partial_memory merge_speed step_speed partial_speed predictor settings_speed memory
BENCH_OUT ?= build/benchmarks
bench: export OMP_NUM_THREADS = 2
bench: export OMP_WAIT_POLICY = passive
bench:
	@for name in $(BENCHMARKS); do \
	  echo "$(PYTHON) benchmarks/$$name.py --out $(BENCH_OUT)/$$name.json"; \
	  $(PYTHON) benchmarks/$$name.py --out $(BENCH_OUT)/$$name.json || exit 1; \
	done

mutants:  # wants the extra: pip install -e '.[dev,mutants]'
	$(PYTHON) benchmarks/mutants.py

# 5,000 drawn inputs, and all that once broke something; see CONTRIBUTING.md. Another seed: make fuzz SEED=7
SEED ?= 0
fuzz:
	$(PYTHON) -m tests.fuzz.run --cases 5000 --seed $(SEED) --jobs 2
