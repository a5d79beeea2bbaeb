# `make demo` and `make test` are all a newcomer needs; both install what they need into .venv first.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: setup demo serve test test-all lint bench clean

setup: $(STAMP)

# DeepSpeed is published as source only. Its one CPU extension is built here, against the torch just installed, so that
# nothing is compiled when training starts; its other extensions are left out.
$(STAMP): requirements.lock pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "setup: needs Python 3.11 or newer; install it, or name it: make PYTHON=python3.12" >&2; exit 2; }
	@command -v $${CXX:-c++} >/dev/null || { echo "setup: no C++ compiler, and DeepSpeed needs one; install g++ (Debian: apt-get install g++)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "setup: $(PYTHON) has no venv module; install it (Debian: apt-get install python3-venv)" >&2; exit 2; }
	@echo "setup: installing into $(VENV) (some minutes, once)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@grep -v '^deepspeed==' requirements.lock | $(BIN)/python -m pip install --disable-pip-version-check -qq -r /dev/stdin
	@echo "setup: building DeepSpeed with its CPU extension (two minutes, once)"
	@DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --disable-pip-version-check -qq \
		--no-build-isolation --no-deps --no-cache-dir "$$(grep '^deepspeed==' requirements.lock)"
	@$(BIN)/python -m pip install --disable-pip-version-check -qq --no-build-isolation --no-deps -e .
	@touch $@

demo: setup
	@$(BIN)/umarvel demo

serve: setup
	@$(BIN)/umarvel serve

test: setup lint
	@$(BIN)/python -m pytest -m "not slow"

$(VENV)/clients: requirements-clients.lock $(STAMP)
	@$(BIN)/python -m pip install --disable-pip-version-check -qq --no-deps --upgrade --target $@ -r $<
	@touch $@

test-all: setup lint $(VENV)/clients
	@$(BIN)/python -m pytest

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

$(VENV)/.bench: requirements-bench.lock $(STAMP)
	@$(BIN)/python -m pip install --disable-pip-version-check -qq --no-deps -r $<
	@touch $@

$(VENV)/speed: requirements-speed.lock $(STAMP)
	@$(BIN)/python -m pip install --disable-pip-version-check -qq --no-deps --upgrade --target $@ -r $<
	@touch $@

bench: demo $(VENV)/.bench $(VENV)/speed
	@set -e; for script in controls peer seeds; do echo "== $$script"; $(BIN)/python benchmarks/$$script.py; done
	@set -e; for script in embed train rerank serve index precision; do echo "== $$script"; \
		PYTHONPATH=$(VENV)/speed $(BIN)/python benchmarks/$$script.py; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
