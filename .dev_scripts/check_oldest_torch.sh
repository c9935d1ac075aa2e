#!/usr/bin/env bash
# Builds and installs grootvl_mm with the oldest supported PyTorch in a separate environment, and tests its operators,
# layers, models, engine and checkpoints there. Needs no host and no mmcv; downloads about 2.5 GB.
#
# TORCH   PyTorch version (default: 2.1.0)
# PYTHON  interpreter (default: the first of python3.11 and python3.10)
# VENV    folder of the environment, which is kept (default: a temporary folder)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TORCH=${TORCH:-2.1.0}
PYTHON=${PYTHON:-$(command -v python3.11 || command -v python3.10)}
scratch=$(mktemp -d)
readonly PYTHON scratch VENV=${VENV:-$scratch/venv}
trap 'rm -rf "$scratch"' EXIT

"$PYTHON" -m venv "$VENV"
install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
export PATH=$VENV/bin:$PATH # ninja
install -r requirements/build.txt
# PyTorch before 2.3 does not support NumPy 2.
install "torch==$TORCH" "numpy<2" "opencv-python<5" -r requirements/runtime.txt -r requirements/tests.txt

# Built from a copy, to keep this checkout's build; the tests use the installed package, not its source.
mkdir "$scratch/source" "$scratch/run"
git ls-files --cached --others --exclude-standard -z | xargs -0 cp --parents -t "$scratch/source"
install --no-build-isolation --no-deps --force-reinstall "$scratch/source"
cp -r tests docs configs pyproject.toml "$scratch/run"
VENV_BIN=$(cd "$VENV/bin" && pwd)
cd "$scratch/run"
# Without the tests that compile the CUDA sources, which need a matching CUDA toolkit.
OMP_NUM_THREADS=1 "$VENV_BIN/python" -m pytest tests/ops tests/layers tests/models tests/engine tests/utils tests/apis \
    --ignore-glob="tests/ops/test_cuda_*.py"
