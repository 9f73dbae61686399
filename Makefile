# Two commands do all the set-up: `make demo` and `make test`. Both work in one environment, .venv, so that
# llama-cpp-python is built once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint format clean

demo: $(VENV)/.cpu  ## caption the bundled pictures with the bundled model
	$(BIN)/edge-tokcomp caption models/demo/samples --keep 64

test: $(VENV)/.dev  ## every test, the quick ones first
	$(BIN)/python -m pytest -m "not slow"
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { echo "no venv module: apt install python3-venv, or set PYTHON=..." >&2; exit 1; }

$(VENV)/.cpu: pyproject.toml constraints.txt | $(BIN)/python
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		{ echo "llama-cpp-python is built from source and needs a C++ compiler: apt install g++" >&2; exit 1; }
	@echo "Installing into $(VENV); the first time llama-cpp-python is compiled, which takes some minutes."
	$(PIP) install --quiet --constraint constraints.txt --editable '.[cpu]'
	@touch $@

$(VENV)/.dev: $(VENV)/.cpu
	$(PIP) install --quiet --constraint constraints.txt --editable '.[cpu,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
