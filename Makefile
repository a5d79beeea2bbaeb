# `make demo` and `make test` are all a newcomer needs; both install what they need into .venv first.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: setup demo serve test test-all lint bench clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml tools/install.py
	@[ -n "$(PYTHON)" ] || { echo "setup: needs Python 3.11 or newer; install it, or name it: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "setup: $(PYTHON) has no venv module; install it (Debian: apt-get install python3-venv)" >&2; exit 2; }
	@[ -x $(BIN)/python ] || { echo "setup: making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python tools/install.py -r requirements.lock -e .
	@touch $@

demo: setup
	@$(BIN)/umarvel demo

serve: setup
	@$(BIN)/umarvel serve

test: setup lint
	@$(BIN)/python -m pytest -m "not slow"

$(VENV)/clients: requirements-clients.lock $(STAMP)
	@$(BIN)/python tools/install.py --no-deps --upgrade --target=$@ -r $<
	@touch $@

test-all: setup lint $(VENV)/clients
	@$(BIN)/python -m pytest

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

$(VENV)/.bench: requirements-bench.lock $(STAMP)
	@$(BIN)/python tools/install.py --no-deps -r $<
	@touch $@

$(VENV)/speed: requirements-speed.lock $(STAMP)
	@$(BIN)/python tools/install.py --no-deps --upgrade --target=$@ -r $<
	@touch $@

bench: demo $(VENV)/.bench $(VENV)/speed
	@set -e; for script in controls peer seeds; do echo "== $$script"; $(BIN)/python benchmarks/$$script.py; done
	@set -e; for script in embed train rerank serve index precision; do echo "== $$script"; \
		PYTHONPATH=$(VENV)/speed $(BIN)/python benchmarks/$$script.py; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
