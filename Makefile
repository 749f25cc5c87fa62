# Every target works from a clean clone, with no step before it.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
export VENV
# Compiled files are kept: without them each worker, and each command that a test starts, compiles deltaw and the tests anew
unexport PYTHONDONTWRITEBYTECODE
# One thread for each of two workers: with two threads each on two cores they wait for one another, and steps take ten times as long.
# A worker that is done takes tests from the other: with fixed shares one was left with most of the slow ones
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help quickstart test fast lint docs clean bootstrap

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 20

quickstart: bootstrap  ## fine-tune a real model, score it, merge it, take the update out (ARGS="--short" for a small part)
	@$(PYTHON) examples/quickstart/run.py $(ARGS)

test: lint  ## lint, types and all tests that need no GPU
	$(PYTEST) -m "not gpu"

fast: lint  ## lint, types and the default tests
	$(PYTEST) -m "not slow and not gpu"

lint: bootstrap  ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs: bootstrap  ## the pages of docs/ as a site that opens without a network: site/index.html
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build -q
	@echo "docs: site/index.html (with search: $(PYTHON) -m http.server -d site)"

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) .cache runs site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks examples scripts -name __pycache__ -prune -exec rm -rf {} +

bootstrap:
	@./scripts/bootstrap
