# make demo [TASK=det|seg|cls]   train, evaluate and look at a small model
# make test                      all checks and tests
# make lint / make format        style only
# STACK=onedl runs any of them with the maintained onedl-* packages in place of OpenMMLab's.
# Every target sets its environment up by itself; see .dev_scripts/setup_env.sh.
SHELL := /bin/bash
TASK ?= det
STACK ?= openmmlab
VENV := .venv$(if $(filter-out openmmlab,$(STACK)),-$(STACK))
BIN := $(VENV)/bin
EMULATION := tests/cuda_emulation
NATIVE := $(wildcard ops/csrc/*.cpp ops/csrc/*.h ops/csrc/cpu/* ops/csrc/cuda/*.cu ops/csrc/cuda/*.cuh)
NATIVE += $(wildcard $(addprefix $(EMULATION)/,*.h *.cpp *.cu include/*.h include/c10/cuda/*.h))

.PHONY: setup demo test lint format clean

setup:
	@STACK=$(STACK) .dev_scripts/setup_env.sh

demo: setup
	$(BIN)/python demo/train_on_digits.py --task $(TASK)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf $(VENV) build *.egg-info grootvl_mm/_C*.so grootvl_mm/.mim
