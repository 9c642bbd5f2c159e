# Everything runs in .venv, which `make setup` creates; nothing else is needed but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-slow check claims docs bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/stillhouse run kd output=runs/demo

test: setup chromium
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: setup chromium
	$(BIN)/python -m pytest

.PHONY: chromium
chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	  || $(BIN)/python scripts/install_chromium.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

claims: setup
	$(BIN)/stillhouse check --stale

docs: setup
	$(BIN)/python docs/_generate.py
	$(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/linear_divergence.py

clean:
	rm -rf $(VENV) runs site build dist
