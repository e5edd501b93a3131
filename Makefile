# `make run` and `make test` need nothing but make and Python >= 3.11; `make help` lists the rest.
#
#   VENV=path          where the virtual environment goes
#   PYTHON=python3.12  the interpreter that makes it
#   PIP_FLAGS="..."    further flags of every `pip install`
#   PYTEST_FLAGS="..." further flags of pytest
#   BENCH_FLAGS=--quick  flags of every benchmark

VENV ?= .venv
PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
RECIPE ?= recipes/dit_w4a8.yaml

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS)
# The pinned torch goes in first and alone: a CPU build that is already there, or that PIP_FLAGS
# point to, satisfies everything after it, and no other package can pull in a second one.
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help install run test unit style quality types schema bench bench-peers clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 22

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "compress needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1)." >&2; \
	  echo "Name another interpreter: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Installing into $(VENV) (once; minutes on a slow line) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)"
	@$(PIP) -c constraints.txt "setuptools>=77"
	@$(PIP) -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

install: $(STAMP) ## create the virtual environment and install the package with its tools

run: $(STAMP) ## run the main recipe; a second time it reuses what is finished
	$(BIN)/compress run $(RECIPE) --overwrite

# One process per core, each with one thread: two that both use two cores are slower than one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: run ## run the main recipe, then every test
	$(PYTEST) $(PYTEST_FLAGS)

unit: $(STAMP) ## run the fast tests only
	$(PYTEST) -m "not slow" $(PYTEST_FLAGS)

style: $(STAMP) ## format, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: $(STAMP) ## lint, format and type checks; is the JSON schema fresh?
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types
	$(BIN)/compress schema | diff -u recipes/schema.json - || { echo "recipes/schema.json is stale: make schema" >&2; exit 1; }

types: $(STAMP) ## mypy, strict; it must see the tree under the name `compress`
	@set -e; tree=$$(mktemp -d); trap 'rm -rf "$$tree"' EXIT; ln -s "$(CURDIR)" "$$tree/compress"; \
	mypy="$$(cd $(BIN) && pwd)/mypy"; cd "$$tree"; \
	"$$mypy" --config-file compress/pyproject.toml --cache-dir "$(CURDIR)/.mypy_cache" -p compress

schema: $(STAMP) ## write recipes/schema.json anew
	$(BIN)/compress schema > recipes/schema.json.new && mv recipes/schema.json.new recipes/schema.json

bench: $(STAMP) ## run every benchmark and print its tables
	for script in plan_dit_xl allocation linear conv blocks vidit_q_table dit_builtin_table mixdq_dit isomorphic vit_isomorphic tinyfusion slimsam experts kv_cache memory; do \
	  $(BIN)/python benchmarks/$$script.py $(BENCH_FLAGS) || exit 1; done

bench-peers: $(STAMP) ## add the libraries that the benchmarks compare with (one is GPL; never needed to run)
	@$(PIP) -c constraints.txt -e ".[bench]"

clean: ## remove the virtual environment, work folders and results
	rm -rf $(VENV) .compress out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
