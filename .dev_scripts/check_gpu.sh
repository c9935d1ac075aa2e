#!/usr/bin/env bash
# Everything that needs a GPU: the tests, compute-sanitizer over the operator tests, the benchmarks.
# usage: .dev_scripts/check_gpu.sh [FOLDER]     results go to FOLDER (default: work_dirs/gpu)
#
# PYTHON  the interpreter of an environment with grootvl_mm built for CUDA (default: .venv/bin/python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHON=${PYTHON:-.venv/bin/python}
readonly OUT=${1:-work_dirs/gpu}
readonly OPERATORS=(tests/ops/test_tree.py tests/ops/test_scan.py tests/ops/test_selective_scan.py)

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || fail "torch sees no GPU"
# Without importing the package, which gives CUDA tensors the PyTorch operators where kernels are missing.
"$PYTHON" -c 'import importlib.util, pathlib, torch
folder = pathlib.Path(importlib.util.find_spec("grootvl_mm").origin).parent
torch.ops.load_library(next(folder.glob("_C*.so")))
raise SystemExit(not torch._C._dispatch_has_kernel_for_dispatch_key("grootvl::tree_scan", "CUDA"))' ||
  fail "grootvl_mm is built without CUDA; see docs/cuda.md"
command -v compute-sanitizer >/dev/null || fail "compute-sanitizer is missing; it comes with the CUDA toolkit"
mkdir -p "$OUT"

"$PYTHON" -m pytest tests/ops tests/models -m gpu | tee "$OUT/tests.txt"
for tool in memcheck racecheck initcheck; do
  # The caching allocator would hide accesses between two tensors.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$PYTHON" -m pytest "${OPERATORS[@]}" -m gpu -k "not differences" | tee "$OUT/$tool.txt"
done
"$PYTHON" tools/analysis_tools/benchmark_ops.py --device cuda --out "$OUT/ops"
"$PYTHON" tools/analysis_tools/benchmark_model.py --device cuda --amp --out "$OUT/model"
