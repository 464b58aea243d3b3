# Everything works on a bare machine: Python >= 3.11 with venv, make, and a package index. `make` alone lists the targets.
#
# Torch: constraints.txt pins `torch==2.13.0`. Where the index (or pip's find-links) offers a CPU build of it, pip takes that one.
# PyPI's own build for Linux brings several GB of CUDA; on a machine without a GPU avoid it with
#     PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test

PYTHON ?= python3
JOBS ?= 2
CONSTRAINTS ?= constraints.txt
MINUTES ?= 5
KILLS ?= 200
RECIPES ?= demo demo-presets demo-sparse demo-max
SEED ?= 0
TORCH ?= 2.11.0
TRANSFORMERS ?= 5.15.0
VENV := .venv
READY := $(VENV)/.installed
BIN := $(VENV)/bin
CUDA := $(wildcard kernels/*/*.cu kernels/*/*.cuh)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv demo reproduce docs test fuzz kill lint fix types coverage times test-gpu measure bench-gate size release lock oldest clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r name text; do \
		printf '  make %-10s %s\n' "$$name" "$$text"; done

venv: $(READY) ## create .venv with the pinned versions and everything that the other targets need

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), marlin-tools needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "installing into $(VENV) (once; a minute or two)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -c $(CONSTRAINTS) hatchling editables setuptools wheel
	@$(INSTALL) -c $(CONSTRAINTS) --no-build-isolation -e '.[test,docs]'
	@touch $@

demo: $(READY) ## quantise the embedded model, export it, write its report, verify it; the same with 2:4 (CPU, about two minutes)
	@$(BIN)/marlin-tools run demo --overwrite
	@$(BIN)/marlin-tools run demo-sparse --overwrite

reproduce: $(READY) ## the recipes of the embedded model against the numbers in them (CPU, about five minutes)
	@$(BIN)/marlin-tools reproduce $(RECIPES)

docs: $(READY) ## the site, into build/site; a broken link or anchor is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "build/site/index.html" >&2

test: lint types ## everything that needs no GPU: style, types, layers, tests
	@$(BIN)/python -m pytest -q -n $(JOBS) -m "not gpu"

fuzz: $(READY) ## mutated files against every reader, MINUTES=5 of them
	@$(BIN)/python tests/fuzz/campaign.py --minutes $(MINUTES) --seed $(SEED)

kill: $(READY) ## KILLS=200 runs that are killed, continued, and compared byte for byte
	@$(BIN)/python tests/kill/campaign.py --count $(KILLS) --seed $(SEED)

lint: $(READY) ## ruff, its formatter, clang-format for the kernels, and the direction of imports
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check || { echo "hint: \`make fix\` formats these files" >&2; exit 1; }
	@$(BIN)/clang-format --dry-run --Werror $(CUDA) || { echo "hint: \`make fix\` formats these files" >&2; exit 1; }
	@$(BIN)/lint-imports --no-cache --no-logo

fix: $(READY) ## what ruff and clang-format can repair by themselves
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format
	@$(BIN)/clang-format -i $(CUDA)

types: $(READY) ## mypy, strict
	@$(BIN)/mypy

coverage: $(READY) ## the tests that need no GPU, and the share of our lines that they run
	@$(BIN)/python -m pytest -q -n $(JOBS) -m "not gpu" --cov --cov-report=term:skip-covered

times: $(READY) ## the tests that need no GPU, and how long each file of them takes
	@mkdir -p build
	@$(BIN)/python -m pytest -q -n $(JOBS) -m "not gpu" --junitxml=build/tests.xml
	@$(BIN)/python scripts/test_times.py build/tests.xml

test-gpu: $(READY) ## the tests that need a CUDA device
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "error: torch finds no CUDA device here" >&2; exit 1; }
	@$(BIN)/python -m pytest -q -m gpu

measure: $(READY) ## the tables and figures of speed, measured here into measured/ (needs a CUDA device, some minutes)
	@$(BIN)/marlin-tools bench kernels --tune
	@$(BIN)/marlin-tools bench kernels -o measured
	@for figure in peak sustained models roofline; do $(BIN)/marlin-tools bench kernels --figure $$figure -o measured || exit; done
	@$(BIN)/marlin-tools bench model -o measured
	@$(BIN)/marlin-tools bench quantize -o measured

bench-gate: $(READY) ## the kernels as fast as scripts/bench_baseline.json says (needs a CUDA device, some minutes)
	@mkdir -p measured
	@$(BIN)/marlin-tools bench kernels --no-peers --json > measured/gate.json
	@$(BIN)/python scripts/bench_gate.py scripts/bench_baseline.json measured/gate.json

size: $(READY) ## files and functions against their budgets
	@$(BIN)/python scripts/size.py

release: $(READY) ## check and build a release into dist/, and print the text of its tag; publishes nothing
	@$(BIN)/python scripts/release.py

lock: ## write constraints.txt anew: the newest versions that work together, torch as pinned here
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/python -m pip install --quiet hatchling editables
	@build/lock/bin/python -m pip install --quiet --no-build-isolation torch==2.13.0 -e '.[dev]'
	@{ grep '^#' constraints.txt; build/lock/bin/python -m pip freeze --exclude-editable --all | \
		sed -E '/^pip==/d; s/\+[a-z0-9.]+$$//'; } > build/constraints.txt
	@mv build/constraints.txt constraints.txt

oldest: ## write build/oldest.txt: constraints.txt with the oldest torch and transformers that pyproject.toml allows
	@mkdir -p build
	@sed -E '/^(setuptools|tokenizers|huggingface_hub|hf-xet|sympy|networkx)==/d; s/^torch==.*/torch==$(TORCH)/; s/^transformers==.*/transformers==$(TRANSFORMERS)/' \
		constraints.txt > build/oldest.txt # what torch and transformers bound from above is left open

clean: ## remove the virtual environment, caches and builds; results in runs/ stay
	@rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
