# Three commands, each from nothing but Python (>= 3.10), pip and make:
#   make train   set up and run the main job on the embedded model; ARGS="--rounds 2" passes options on
#   make test    set up, check format, lint and types, run all tests
#   make bench   set up, run the microbenchmarks (on the GPU where there is one) against the installed peers
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SETUP := pyproject.toml setup.py constraints.txt

.PHONY: train test bench check clean

train: $(VENV)/installed
	$(BIN)/python -m ttpa.train $(ARGS)

test: check
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/installed-bench
	$(BIN)/python -m pytest bench -rs $(ARGS)

check: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python $(SETUP)
	$(PIP) --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) --editable ".[test]"
	touch $@

$(VENV)/installed-bench: $(VENV)/installed
	$(PIP) --editable ".[bench]"
	touch $@
