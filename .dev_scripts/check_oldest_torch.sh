#!/usr/bin/env bash
# Builds and installs grootvl_mm with the oldest PyTorch that it supports, in an environment of its own, and tests its
# operators, models and training parts there. Needs no host and no mmcv; downloads about 2.5 GB.
#
# TORCH   the version to check (default: 2.1.0)
# PYTHON  the interpreter (default: the first of python3.11 and python3.10)
# VENV    where to make the environment and leave it (default: a temporary folder, removed at the end)
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
# Before 2.3, PyTorch does not know NumPy 2.
install "torch==$TORCH" "numpy<2" "opencv-python<5" -r requirements/runtime.txt -r requirements/tests.txt

# From a copy, so that this checkout's own build stays; the tests run beside the installed package, not beside its source.
mkdir "$scratch/source" "$scratch/run"
git ls-files --cached --others --exclude-standard -z | xargs -0 cp --parents -t "$scratch/source"
install --no-build-isolation --no-deps --force-reinstall "$scratch/source"
cp -r tests pyproject.toml "$scratch/run"
VENV_BIN=$(cd "$VENV/bin" && pwd)
cd "$scratch/run"
# The tests of the CUDA sources compile these, and need them and a toolkit of PyTorch's own version.
OMP_NUM_THREADS=1 "$VENV_BIN/python" -m pytest tests/ops tests/layers tests/models tests/engine \
    --ignore-glob="tests/ops/test_cuda_*.py"
