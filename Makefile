# make demo      set up and run the whole job on embedded defaults
# make test      set up, check the sources, run the tests
# Choose another torch (a CUDA build, say) with:  make TORCH='torch==X' TORCH_PIP_ARGS='--index-url URL' demo
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
QUICK := not slow and not gpu and not multi_gpu and not network

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow chaos check format clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# torch comes first and alone: a later resolver run would otherwise pick the newest CUDA build.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	echo '$(TORCH)' >> $(VENV)/constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q $(TORCH_PIP_ARGS) '$(TORCH)'
	$(BIN)/python -m pip install --disable-pip-version-check -q -c $(VENV)/constraints.txt -e '.[data,eval,dev]'
	touch $(STAMP)

install: $(STAMP) ## create .venv and install everything

demo: $(STAMP) ## run the three-stage HSMN curriculum, from rows to scorecard
	$(BIN)/hsmn-dist run configs/runs/hsmn_debug_demo_cpu.yaml

check: $(STAMP) ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes for the tests of one room each; then, alone, those that start clusters and whole runs.
test: check ## checks and the quick tests (CPU, no network)
	$(PYTEST) -m "$(QUICK)" -n 2 --dist loadfile tests/test_architecture.py tests/unit tests/parity
	$(PYTEST) -m "$(QUICK)" tests/integration

test-slow: $(STAMP) ## tests that take longer than a minute
	$(PYTEST) -m "slow and not gpu and not multi_gpu and not network" tests

chaos: $(STAMP) ## more than 30 faults injected into a real run, final weights compared bit for bit
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.chaos --folder runs/chaos

format: $(STAMP) ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and caches, never runs/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
