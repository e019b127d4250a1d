# make demo   the main job on the filters that come with mkf
# make test   all tests
# make bench  the fit against its peers on this machine
# Each is enough by itself on a fresh machine: it makes .venv and installs into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: demo test bench lint clean

demo: $(VENV)/.installed
	$(BIN)/mkf env
	$(BIN)/mkf analyze --out out/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

bench: $(VENV)/.installed
	$(BIN)/mkf bench fit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info mkf/_native*.so
