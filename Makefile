# make demo   three runs on the synthetic federation, and what protection cost
# make test   everything CI runs;  make test PYTHON=python3.12  on another interpreter
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# An interpreter that is named wins over the environment that is there; none named reuses it.
WANTED := $(PYTHON)
PYTHON ?= python3

.PHONY: demo test test-fast lint clean interpreter bench-peers
.DELETE_ON_ERROR:

interpreter:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed: pass PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fedjax_dp needs Python 3.11 or newer: pass PYTHON=python3.12"; exit 1; }
	@if [ -n "$(WANTED)" ] && [ -x $(BIN)/python ] && [ "$$($(BIN)/python -V)" != "$$($(PYTHON) -V)" ]; then \
	  echo "$(VENV) is of $$($(BIN)/python -V), wanted $$($(PYTHON) -V): made anew"; rm -rf $(VENV); fi

$(STAMP): pyproject.toml | interpreter
	@echo "Installing into $(VENV), once ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[test,lint]"
	@touch $@

demo: interpreter $(STAMP)
	$(BIN)/python -m experiments.demo --workdir=runs/demo

test: lint
	$(BIN)/python -m pytest

test-fast: interpreter $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

lint: interpreter $(STAMP)
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

clean:
	rm -rf runs/demo .pytest_cache .ruff_cache .mypy_cache

# Beside PyTorch, Opacus, jax_privacy and Flower, in an environment of their own; about 15 minutes
# of an idle machine. More arguments: make bench-peers PEERS_FLAGS="--columns=16:128:8 --repeats=15"
PEERS := .venv-peers
PEERS_PYTHON ?= python3.11
PEERS_FLAGS ?=
PEERS_OUTPUT ?= benchmarks/results/peers.jsonl

$(PEERS)/.installed: benchmarks/peers/requirements.txt pyproject.toml
	test -x $(PEERS)/bin/python || $(PEERS_PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check "$$(grep '^torch==' $<)"
	$(PEERS)/bin/python -m pip install --disable-pip-version-check -r $< --editable .
	@touch $@

bench-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m benchmarks.peers.clipping --output=$(PEERS_OUTPUT) $(PEERS_FLAGS)
	$(PEERS)/bin/python -m benchmarks.peers.round --output=$(PEERS_OUTPUT) $(PEERS_ROUND_FLAGS)
