# `make quickstart` and `make test` set up their own environment in .venv on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

RUN    := --config recipes/quickstart.yaml
FIVE   := $(BIN)/python recipes/quickstart/five.py

LOWEST := .venv-lowest
TORCH  ?= 2.8.0

.PHONY: help quickstart test test-all test-lowest lint bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(READY)  ## fit, evaluate, calibrate and predict on the model that ships here, offline
	$(BIN)/lspade-train fit $(RUN)
	$(BIN)/lspade-train fit $(RUN) --model.target final
	$(BIN)/lspade-train calibrate $(RUN)
	$(BIN)/lspade-train evaluate $(RUN)
	$(FIVE) ask | $(BIN)/lspade-train predict $(RUN) | $(FIVE) show checkpoints/quickstart

test: $(READY)  ## the default test suite, offline
	$(BIN)/pytest -n auto -m "not slow and not gpu"

test-all: $(READY)  ## the slow tests too
	$(BIN)/pytest

test-lowest:  ## the default suite with the oldest supported versions (see constraints-lowest.txt)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check \
		-c constraints-lowest.txt torch==$(TORCH) -e '.[dev]'
	$(LOWEST)/bin/pytest -n auto -m "not slow and not gpu"

lint: $(READY)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)  ## speed and memory as ratios against baselines timed in the same process
	$(BIN)/python tests/bench.py

clean:  ## remove the environments and the fitted heads
	rm -rf $(VENV) $(LOWEST)
	git clean -fdxq checkpoints
