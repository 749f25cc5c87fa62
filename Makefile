# Every target works from a clean clone, with no step before it.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
export VENV

.DEFAULT_GOAL := help
.PHONY: help quickstart test fast lint clean bootstrap

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 20

quickstart: bootstrap  ## fine-tune a real model, use it, merge it, take it back (ARGS="--short" for a small part)
	@$(PYTHON) examples/quickstart/run.py $(ARGS)

test: lint  ## lint, types and all tests that need no GPU
	$(PYTHON) -m pytest -m "not slow and not gpu"
	$(PYTHON) -m pytest -m "slow and not gpu"

fast: lint  ## lint, types and the default tests
	$(PYTHON) -m pytest -m "not slow and not gpu"

lint: bootstrap  ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

clean:  ## remove the environment, caches and runs
	rm -rf $(VENV) .cache runs .mypy_cache .ruff_cache .pytest_cache .hypothesis

bootstrap:
	@./scripts/bootstrap
