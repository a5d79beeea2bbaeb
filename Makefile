# `make demo` and `make test` are all a newcomer needs; both install what they need into .venv first.
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: setup demo serve test test-all test-oldest lint bench gpu clean

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

# Other projects' clients, in an environment of their own.
$(VENV)/clients/.installed: requirements-clients.lock $(STAMP)
	@[ -x $(VENV)/clients/bin/python ] || $(BIN)/python -m venv $(VENV)/clients
	@$(VENV)/clients/bin/python tools/install.py -r $<
	@touch $@

test-all: setup lint $(VENV)/clients/.installed
	@$(BIN)/python -m pytest

# The lower bounds of pyproject.toml, in an environment of their own, with the locked test tools.
$(VENV)/oldest/.installed: requirements.lock pyproject.toml tools/install.py tools/oldest.py $(STAMP)
	@[ -x $(VENV)/oldest/bin/python ] || $(BIN)/python -m venv $(VENV)/oldest
	@{ $(BIN)/python tools/oldest.py cpu; grep -E '^(hypothesis|pytest|pytest-timeout|psutil)==' requirements.lock; } > $(VENV)/oldest.txt
	@$(VENV)/oldest/bin/python tools/install.py -r $(VENV)/oldest.txt
	@$(VENV)/oldest/bin/python tools/install.py --no-deps -e .
	@touch $@

test-oldest: $(VENV)/oldest/.installed
	@$(VENV)/oldest/bin/python -m pytest -m "not slow" tests/items tests/data tests/model tests/retrieve tests/inference \
		tests/train/test_exactness.py tests/train/test_resume.py --ignore tests/model/test_sentence_transformers.py

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

$(VENV)/.bench: requirements-bench.lock $(STAMP)
	@$(BIN)/python tools/install.py --no-deps -r $<
	@touch $@

$(VENV)/speed: requirements-speed.lock $(STAMP)
	@$(BIN)/python tools/install.py --no-deps --upgrade --target=$@ -r $<
	@touch $@

bench: demo $(VENV)/.bench $(VENV)/speed
	@set -e; for script in controls peer seeds; do echo "== $$script"; $(BIN)/python -m benchmarks.$$script; done
	@set -e; for script in embed train rerank serve index precision allocator; do echo "== $$script"; \
		PYTHONPATH=$(VENV)/speed $(BIN)/python -m benchmarks.$$script; done

# What only a GPU can show, in at most nine minutes; results in benchmarks/results/gpu-run/.
gpu: setup
	@$(BIN)/python -m tools.gpu --minutes 9

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
