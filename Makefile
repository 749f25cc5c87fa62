# Every target works from a clean clone, with no step before it.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
export VENV
# A thread for each of two workers: with two each on two cores they wait for one another, and steps took ten times as long
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2
FAST := $(PYTEST) -m "not slow and not gpu"

.DEFAULT_GOAL := help
.PHONY: help quickstart test fast lint clean bootstrap

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 20

quickstart: bootstrap  ## fine-tune a real model, use it, merge it, take it back (ARGS="--short" for a small part)
	@$(PYTHON) examples/quickstart/run.py $(ARGS)

test: lint  ## lint, types and all tests that need no GPU
	$(FAST)
	$(PYTEST) -m "slow and not gpu"

fast: lint  ## lint, types and the default tests
	$(FAST)

lint: bootstrap  ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) .cache runs .mypy_cache .ruff_cache .pytest_cache .hypothesis

bootstrap:
	@./scripts/bootstrap
