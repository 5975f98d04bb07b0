# `make demo` and `make test` are all a newcomer needs: each makes .venv by itself, once.
#
# TORCH is what pip installs before anything else, so that no other build is pulled in with the dependencies. Where
# pip finds only CUDA builds of it, say which one to install, with pip's own options if they are needed:
#     make test TORCH="torch==2.13.0 --index-url ADDRESS-OF-THE-CPU-BUILDS"
TORCH ?= torch==2.13.0
PYTHON ?= $(shell python3.11 -c "import ensurepip, venv" 2>/dev/null && echo python3.11 || echo python3)

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint clean

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist demo-output *.egg-info
