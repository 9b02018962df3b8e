# Two commands matter: `make bench` and `make test`. Each makes the environment it needs in .venv; all it takes is python3 >= 3.10 and make.
# A third, `make gpu`, is for a machine with a GPU, and takes what is there.

PYTHON ?= python3
# Pinned for development and CI only: the package itself asks for torch>=2.6. Another build: make test TORCH='torch --index-url ...'
TORCH ?= torch==2.13.0
TRITON ?= triton==3.8.0
PRESET ?= quick

VENV := .venv
BIN := $(VENV)/bin
OUT := bench/out
MEASURED := docs/measured

.PHONY: help bench gpu test test-one-half test-other-half test-all matrix lint docs site measure clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

bench: $(VENV)/.bench ## check fastloss against torch, then time both on large batches; PRESET=quick|vision|llm|cpu-table|sizes|all
	$(BIN)/python bench/run.py --preset $(PRESET) --json $(OUT)/bench.json --csv $(OUT)/bench.csv
	$(BIN)/python bench/report.py $(OUT)/bench.json --out $(OUT)

gpu: ## all there is to learn from a GPU in nine minutes, with $(PYTHON) as it is: no network, no environment
	$(PYTHON) bench/gpu_day.py --out $(OUT)/gpu

# In two halves of about the same length, side by side. One has what compiles most of the kernels, so that it compiles what they share once;
# the other has Triton, and what starts processes of its own.
COMPILING := $(patsubst %,tests/test_%.py,after_the_call assembly autograd batch_invariance bce calls compile contract cross_entropy doctor \
	docstrings errors foresight inplace layouts linear_cross_entropy linear_token_statistics mixed_dtypes nll_loss opinfo property \
	public_reports real_shapes seed_cases sigmoid_focal_loss softmax sparse_soft_cross_entropy token_statistics)

test: $(VENV)/.dev ## all tests but the long ones
	@$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target test-one-half test-other-half

test-one-half: $(VENV)/.dev
	$(BIN)/pytest -m "not long" $(COMPILING)

test-other-half: $(VENV)/.dev
	$(BIN)/pytest -m "not long" $(addprefix --ignore ,$(COMPILING))

test-all: $(VENV)/.dev ## all tests
	$(BIN)/pytest

matrix: ## the tests on the oldest and newest torch, Triton, Numba, NumPy and Python (hours, 20 GB), for docs/versions.md
	$(PYTHON) tests/matrix.py

lint: $(VENV)/.dev ## ruff, and mypy --strict on what a wheel installs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check fastloss kernels tests bench examples docs
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --target build/typed .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml

docs: $(VENV)/.bench ## regenerate every generated table and picture from docs/measured and from the code
	$(BIN)/python bench/report.py $(MEASURED)/cpu.json --out $(MEASURED) --tables README.md docs
	if [ -f $(MEASURED)/sizes.json ]; then $(BIN)/python bench/report.py $(MEASURED)/sizes.json --out $(MEASURED)/sizes --tables README.md docs; fi
	if [ -f $(MEASURED)/h100.json ]; then $(BIN)/python bench/report.py $(MEASURED)/h100.json --out $(MEASURED)/gpu --tables docs; fi
	$(BIN)/python docs/make_coverage.py

site: $(VENV)/.dev ## static pages of the documentation and the API reference, in build/site
	$(BIN)/python docs/make_site.py

measure: $(VENV)/.bench ## measure this machine for the README (about half an hour), then `make docs`
	$(BIN)/python bench/run.py --preset cpu-table --extra overhead crossover scaling startup avx2 --json $(MEASURED)/cpu.json
	$(BIN)/python bench/run.py --preset sizes --json $(MEASURED)/sizes.json
	$(MAKE) docs

clean: ## remove what make made
	rm -rf $(VENV) build dist $(OUT) fastloss.egg-info

$(VENV)/bin/python:
	@echo "[1/3] $(VENV): a virtual environment by $(PYTHON)"
	@$(PYTHON) -c 'import sys; sys.exit("fastloss needs Python 3.10 or newer, this is " + sys.version if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(VENV)/bin/python
	@echo "[2/3] $(TORCH) $(TRITON): the large part, some minutes on a slow network"
	$(BIN)/pip install --disable-pip-version-check --no-compile $(TORCH)
	-$(BIN)/pip install --disable-pip-version-check --no-compile $(TRITON)
	@touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/.torch
	@echo "[3/3] fastloss, with what the benchmark draws with"
	$(BIN)/pip install --disable-pip-version-check --no-compile -e '.[bench]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	@echo "[3/3] fastloss, with what the tests need"
	$(BIN)/pip install --disable-pip-version-check --no-compile -e '.[dev]'
	@touch $@
	@touch $(VENV)/.bench
