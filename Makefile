# The commands that need nothing but Python 3.11 or newer: `make demo`, `make test`,
# `make docs`, `make dist` and `make test-accelerators`. Each makes an environment, installs what it
# needs into it once, and runs.

PYTHON ?= python3
VENV := .venv
# Apart, as JAX sees other devices where the compilers for them are installed.
ACCELERATORS := .venv-accelerators
SUBSET := whole
JOBS := 2
TRAINER := tunix
COVERAGE :=
LINES := --cov=lowrank_optax --cov-report=term:skip-covered --cov-fail-under=95

# What runs on the newest Python and jax, in ten minutes on two cores: the laws of all
# methods on a sample, and what newer releases have broken or may break first.
NEWEST := $(addprefix tests/test_,$(addsuffix .py, \
	common golden linalg kernels project compress leafwise refresh transfer random \
	quantize q_galore sharding average adapters llama_model \
	example_files example_checkpoints example_data))

.PHONY: demo test coverage test-newest test-accelerators test-trainer contract lint \
	notebooks docs dist

demo: $(VENV)/examples.stamp
	$(VENV)/bin/python -m examples.llama.pretrain

# COVERAGE=1 counts the lines of the package that the suite runs, too: 95% at least.
test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(if $(COVERAGE),$(LINES))

# Needs no accelerator, but 5 GB of disk for the compilers. SUBSET=ci is the quick part.
test-accelerators: $(ACCELERATORS)/accelerators.stamp
	$(ACCELERATORS)/bin/python -m benchmarks.accelerators.check \
		--subset $(SUBSET) --jobs $(JOBS)

# TRAINER is tunix, eformer, kauldron or levanter: each in an environment of its own,
# with warnings of its own. uv, as pip tries releases for an hour.
test-trainer: .venv-$(TRAINER)/trainer.stamp
	.venv-$(TRAINER)/bin/python -m pytest -W ignore tests/trainers/test_$(TRAINER).py

.venv-%/trainer.stamp: pyproject.toml tests/trainers/%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install uv
	.venv-$*/bin/python -m uv pip install --python .venv-$*/bin/python \
		--overrides tests/trainers/overrides.txt \
		-e . -r tests/trainers/$*.txt hypothesis pytest
	touch $@

test-newest: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal --sample 8 $(NEWEST)

# On Python 3.12 and newer counting lines costs no time; before, a fifth.
coverage: export COVERAGE_CORE := sysmon
coverage:
	$(MAKE) test COVERAGE=1

# Which method passed which law, for the site's page `Contract`: with the Python and the
# jax that $(VENV) has. METHOD=name runs the tests of one method only.
CONTRACT := $(addprefix tests/test_,$(addsuffix .py, \
	common any_params calls boxes inject decay saving faults sharding average \
	many_devices threads))

contract: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal --sample 1 -k "$(METHOD)" \
		--contract benchmarks/records/contract.json $(CONTRACT)

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

# What is uploaded to PyPI, in dist/, and tried as a user would have it.
dist: $(VENV)/release.stamp
	rm -rf dist
	$(VENV)/bin/python -m build
	$(VENV)/bin/python -m twine check --strict dist/*
	$(VENV)/bin/python .ci/try_wheel.py

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
