# `make help` lists the targets. Set-up happens by itself, once: each step leaves a stamp in .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
PYTEST_FLAGS ?= -n 2 --dist worksteal --durations=10 --durations-min=5

NATIVE_SOURCES := $(shell find csrc build_support -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.py')
CPP_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
MYPY_PATHS := $(wildcard resformer_kernels build_support tests benchmarks examples setup.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-families test-fa4 test-vllm serve emulate bench docs device-check compile-newest lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

setup: $(STAMPS)/native $(STAMPS)/package ## make .venv, install pinned dependencies, build the kernels

demo: setup ## the main job: check the kernels, time them, train small models, write a report
	@$(VENV)/bin/resformer-kernels demo $(ARGS)

test: setup lint ## lint, types, formatting and every test
	@RESFORMER_REQUIRE_NATIVE=1 $(PY) -m pytest $(PYTEST_FLAGS) $(ARGS)

test-families: setup ## hold attn_implementation="resformer" to eager in every family of transformers
	@$(PY) -m pytest tests/families -n 2 --dist worksteal --families reports/families.md $(ARGS)

test-fa4: ## compile FlashAttention 4's kernels for two GPUs that need not be there
	@scripts/test_fa4.sh $(PYTHON) .venv-fa4 $(ARGS)

test-vllm: setup ## serve tiny models with vLLM on a CPU and hold their tokens to transformers'
	@scripts/test_vllm.sh $(PYTHON) .venv-vllm $(ARGS)

serve: setup ## serve a tiny SVFormer and a Llama with vLLM's OpenAI server on this machine, and compare
	@scripts/vllm_env.sh $(PYTHON) .venv-vllm
	@.venv-vllm/bin/python examples/serve_svformer.py $(ARGS)

emulate: setup ## run what Triton compiles for an A100 and an H100 on this CPU, and watch every access
	@$(PY) -m tests.gpu_on_cpu $(ARGS)

bench: setup ## time every registered case against its peers
	@$(VENV)/bin/resformer-kernels bench $(ARGS)

docs: setup ## rewrite what README and docs/ quote from the code and from stored runs
	@$(PY) -m benchmarks.quotes

# No set-up: on a machine with a GPU its own torch and Triton are used, and nothing is installed.
device-check: ## on a GPU: its kernels against float64 and themselves, then beside their peers; again goes on
	@$(PYTHON) -m resformer_kernels.cli device-check $(ARGS)

# Its own folder of packages: the pinned Triton stays what everything else uses.
compile-newest: setup ## compile the Triton kernels for every GPU with the newest Triton there is
	@$(PY) -m pip --disable-pip-version-check install -q --no-deps --upgrade \
		--target $(VENV)/newest-triton triton
	@PYTHONPATH=$(VENV)/newest-triton $(PY) -m resformer_kernels.cli compile-check $(ARGS)

lint: setup ## ruff, mypy, clang-format; changes nothing
	@echo "ruff" && $(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --check . || { echo "run: make format"; exit 1; }
	@echo "mypy" && $(PY) -m mypy --no-error-summary $(MYPY_PATHS)
	@echo "clang-format" && $(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES)

format: setup ## rewrite the sources in the house style
	@$(PY) -m ruff check --quiet --fix . || true
	@$(PY) -m ruff format --quiet .
	@$(VENV)/bin/clang-format -i $(CPP_SOURCES)

clean: ## remove everything that was built, .venv included
	rm -rf $(VENV) build dist *.egg-info resformer_kernels/*.so .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv: requirements-dev.txt requirements-no-deps.txt scripts/preflight.sh scripts/venv.sh
	@scripts/preflight.sh $(PYTHON)
	@scripts/venv.sh $(PYTHON) $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# Before pip, whose quiet run would hide the compiler's progress.
$(STAMPS)/native: $(STAMPS)/venv $(NATIVE_SOURCES)
	@echo "[4/4] building the kernels and installing resformer_kernels"
	@$(PY) -m build_support.native
	@touch $@

$(STAMPS)/package: $(STAMPS)/venv pyproject.toml setup.py resformer_kernels/__init__.py | $(STAMPS)/native
	@$(PY) -m pip --disable-pip-version-check -qq install --no-build-isolation --no-deps -e .
	@touch $@
