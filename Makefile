# make setup / make setup-ops    create the environment of all other targets / of test-ops, test-cuda, docs and wheel
# make demo [TASK=det|seg|cls]   train and evaluate a small model, and draw its predictions
# make test                      lint, then all tests except slow ones
# make test-all                  lint, all tests, the documentation, the CPU operators under sanitizers
# make test-ops                  tests of operators, layers and models; no OpenMMLab host, takes minutes from a clone
# make test-cuda                 the CUDA kernels in an emulator on the CPU, without a GPU
# make lint / make format        check / fix the code style
# make docs                      build the documentation site in docs/_build/html
# make wheel                     build source distribution and wheel in dist
# make clean                     delete environments and build outputs
#
# STACK=openmmlab or STACK=onedl selects the host packages (default: those that this Python can install). STACK=language
# sets up, tests and runs the language models instead, with Hugging Face's packages and without hosts. Each target
# creates its environment if necessary, see .dev_scripts/setup_env.sh.
SHELL := /bin/bash
TASK ?= det
STACK ?=
VENV := .venv$(if $(filter-out openmmlab,$(STACK)),-$(STACK))
BIN := $(VENV)/bin
OPS_BIN := .venv-ops/bin
# Tests and demo of a stack, if they differ from the default.
TESTS_language := tests/language tests/test_language_extra.py
DEMO := demo/train_on_digits.py --task $(TASK)
DEMO_language := demo/language_study.py --preset quick
NATIVE = $(shell find ops tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Worksteal keeps neighbouring tests, which share data, on one worker until another worker is idle.
WORKERS := -n auto --maxprocesses 8 --dist worksteal

.PHONY: setup setup-ops demo test test-all test-ops test-cuda lint format docs wheel clean

setup:
	@STACK=$(STACK) .dev_scripts/setup_env.sh

setup-ops:
	@STACK=ops .dev_scripts/setup_env.sh

demo: setup
	$(BIN)/python $(or $(DEMO_$(STACK)),$(DEMO))

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(WORKERS) $(TESTS_$(STACK))

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) $(TESTS_$(STACK))
	$(MAKE) docs
	PYTHON=$(BIN)/python .dev_scripts/sanitize_ops.sh -q

test-ops: setup-ops
	OMP_NUM_THREADS=1 $(OPS_BIN)/python -m pytest -m "not slow" $(WORKERS) tests/ops tests/layers tests/models

test-cuda: setup-ops
	OMP_NUM_THREADS=1 $(OPS_BIN)/python -m pytest -m "not slow" $(WORKERS) tests/cuda_emulation

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

docs: setup-ops
	$(OPS_BIN)/python -m sphinx -W --keep-going -q -b html -c docs . docs/_build/html

wheel: setup-ops
	$(OPS_BIN)/python -m build --no-isolation

clean:
	rm -rf .venv .venv-* build dist docs/_build *.egg-info grootvl_mm/_C*.so grootvl_mm/.mim
