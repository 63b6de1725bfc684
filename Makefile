# The front door: every target makes the virtual environment it needs by itself, from a fresh clone on.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= demo.yaml
PYTEST_FLAGS ?=
PART ?= 1/1
CHAOS_FLAGS ?=
PYTEST := $(BIN)/python -m pytest $(PYTEST_FLAGS)
# Tests without a Ray cluster run on all processors; those with one use all of them by themselves.
SPREAD := -n logical --dist worksteal
ALL := 'not gpu and not bench and not foreign and not policies'
SERIAL := tests/integration tests/chaos/test_real.py

# Tried in this order; PYTHON=/path/to/python goes before them.
PYTHON ?=
CANDIDATES := $(PYTHON) python3.12 python3.11 python3
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test chaos foreign policies unit lint check fix gpu bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

$(BIN)/python:
	@for python in $(CANDIDATES); do \
	  if "$$python" -c '$(USABLE)' >/dev/null 2>&1; then \
	    echo "making $(VENV) with $$("$$python" --version)"; \
	    exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "no usable Python among: $(strip $(CANDIDATES))" >&2; \
	echo "needed: Python 3.11 or 3.12 with venv (on Debian and Ubuntu: apt install python3-venv)," >&2; \
	echo "or name one: make PYTHON=/path/to/python3.11" >&2; \
	exit 1

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[jobs,huggingface,lightning,test,dev]'
	@touch $@

install: $(STAMP) ## make .venv with everything in it; every other target does so when needed

demo: $(STAMP) ## watch a small search on this machine's processors, all dials turning
	$(BIN)/orchestrator run $(DEMO) --set name=demo-$$(date +%Y%m%d-%H%M%S)

test: $(STAMP) ## all tests that need no GPU: unit, conformance, integration, a sample of chaos
	@# Both, also where the first fails: one run tells everything.
	$(PYTEST) $(SPREAD) tests $(addprefix --ignore=,$(SERIAL)) -m $(ALL); first=$$?; \
	  $(PYTEST) $(SERIAL) -m $(ALL) && exit $$first

chaos: $(STAMP) ## every kind of fault many times, hours; PART=k/n a part, taken up where it was left
	$(BIN)/python -m tests.chaos --part $(PART) $(CHAOS_FLAGS)

foreign: $(STAMP) ## whole runs of the foreign trainings that `make test` leaves out, six minutes
	$(PYTEST) tests -m foreign

policies: $(STAMP) ## a live run on two nodes under every policy, pausing and moving trials, six minutes
	$(PYTEST) tests -m policies

unit: $(STAMP) ## unit tests only: no Ray, minutes
	$(PYTEST) $(SPREAD) tests/unit

lint: $(STAMP) ## format, lint and types, about a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint ## the same and unit tests, before every commit
	$(PYTEST) $(SPREAD) tests/unit

fix: $(STAMP) ## format the code and repair what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

gpu: $(STAMP) ## tests that need an NVIDIA GPU; they skip where there is none
	$(PYTEST) tests -m 'gpu and not bench'

bench: $(STAMP) ## measure speed, on an idle machine; what needs a GPU skips without one
	$(PYTEST) tests/bench -m bench -s

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
