# `make quickstart` and `make test` set up their own environment in .venv on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# A model beside the clone where there is one; otherwise a small one from the Hub.
MODEL ?= $(firstword $(wildcard ../shared/models/stories260K/hf) EleutherAI/pythia-14m)
RUN   := --config recipes/quickstart.yaml --data.model_id $(MODEL)
TEXTS := checkpoints/quickstart/texts

.PHONY: help quickstart test test-all lint bench clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(READY)  ## fit, evaluate, calibrate and predict with a small model (MODEL=hub/id)
	test -f $(TEXTS)/validation.jsonl || $(BIN)/python recipes/sample_text.py $(MODEL) $(TEXTS)
	$(BIN)/lspade-train fit $(RUN)
	$(BIN)/lspade-train evaluate $(RUN) --split validation
	$(BIN)/lspade-train calibrate $(RUN) --max_disagreement 0.1
	printf 'Once upon a time\nThe little girl was very\nOne day, Tim and his\n' | \
		$(BIN)/lspade-train predict $(RUN)

test: $(READY)  ## the default test suite, offline
	$(BIN)/pytest -n auto -m "not slow and not gpu"

test-all: $(READY)  ## the slow tests too
	$(BIN)/pytest

lint: $(READY)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)  ## speed and memory as ratios against baselines timed in the same process
	$(BIN)/python tests/bench.py

clean:  ## remove the environment and the fitted heads
	rm -rf $(VENV)
	git clean -fdxq checkpoints
