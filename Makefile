PYTHON ?= python3
BIN := .venv/bin
PEERS := .benchmarks/peers
RECIPES := $(or $(ONLY),$(notdir $(patsubst %/dvc.yaml,%,$(wildcard examples/*/dvc.yaml))))

.PHONY: install demo test lint recipes bench bench-peers

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dvc,dev]'
	touch $@

demo: install
	$(BIN)/kdpipe demo .

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

recipes: install
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH=tests $(BIN)/python -m benchmarks.recipes $(RECIPES)

bench: install
	PYTHONPATH=tests $(BIN)/python -m benchmarks $(ONLY)

bench-peers: $(PEERS)/installed
	PYTHONPATH=pipeline:tests $(PEERS)/bin/python -m benchmarks peers

$(PEERS)/installed: tests/benchmarks/requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@
