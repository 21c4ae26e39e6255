# The commands that need nothing but Python 3.11 or newer: `make demo`, `make test`,
# `make docs` and `make test-accelerators`. Each makes an environment, installs what it
# needs into it once, and runs.

PYTHON ?= python3
VENV := .venv
# Apart, as JAX sees other devices where the compilers for them are installed.
ACCELERATORS := .venv-accelerators
SUBSET := whole
JOBS := 2

# What runs on the newest Python and jax, in ten minutes on two cores: the laws of all
# methods on a sample, and what newer releases have broken or may break first.
NEWEST := $(addprefix tests/test_,$(addsuffix .py, \
	common golden linalg project compress leafwise refresh transfer random quantize \
	q_galore sharding average adapters llama_model \
	example_files example_checkpoints example_data))

.PHONY: demo test test-newest test-accelerators lint notebooks docs

demo: $(VENV)/examples.stamp
	$(VENV)/bin/python -m examples.llama.pretrain

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

# Needs no accelerator, but 5 GB of disk for the compilers. SUBSET=ci is the quick part.
test-accelerators: $(ACCELERATORS)/accelerators.stamp
	$(ACCELERATORS)/bin/python -m benchmarks.accelerators.check \
		--subset $(SUBSET) --jobs $(JOBS)

test-newest: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal --sample 8 $(NEWEST)

lint: $(VENV)/test.stamp $(VENV)/lint.stamp
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyrefly check

# Runs them and writes their outputs; some minutes each.
notebooks: $(VENV)/test.stamp
	$(VENV)/bin/python -m notebooks.execute

# The site, in docs/_build/html; a warning fails it.
docs: $(VENV)/docs.stamp
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going docs docs/_build/html

$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -e '.[$*]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(ACCELERATORS)/%.stamp: pyproject.toml | $(ACCELERATORS)/bin/python
	$(ACCELERATORS)/bin/python -m pip install -e '.[$*]'
	touch $@

$(ACCELERATORS)/bin/python:
	$(PYTHON) -m venv $(ACCELERATORS)
