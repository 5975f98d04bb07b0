# `make demo` and `make test` are all a newcomer needs: each makes .venv by itself, once.
#
# TORCH is what pip installs before anything else, so that no other build is pulled in with the dependencies. Where
# pip finds only CUDA builds of it, say which one to install, with pip's own options if they are needed:
#     make test TORCH="torch==2.13.0 --index-url ADDRESS-OF-THE-CPU-BUILDS"
TORCH ?= torch==2.13.0
PYTHON ?= $(shell python3.11 -c "import ensurepip, venv" 2>/dev/null && echo python3.11 || echo python3)

BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint peers clean

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# llm-compressor pins other versions of our dependencies, so it has an environment of its own
peers: $(STAMP) .venv-peers/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/peers.py

.venv-peers/.installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --upgrade pip
	.venv-peers/bin/python -m pip install $(TORCH)
	.venv-peers/bin/python -m pip install llmcompressor==0.14.0.1
	touch $@

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv .venv-peers build dist demo-output *.egg-info
