# `make quickstart` and `make test` are all that a fresh machine needs: Python 3.11+ and a package index.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: quickstart test lint bench docs clean
.DEFAULT_GOAL := test

quickstart: $(STAMP)
	$(BIN)/predistill quickstart

test: lint
	$(BIN)/pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks

docs: $(STAMP)
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_parity.py

# The checkout is the package, whatever its folder is called; mypy finds it under its own name in .venv/src.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("predistill needs Python 3.11 or newer, \
	this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	mkdir -p .venv/src
	ln -sfn ../.. .venv/src/predistill
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
