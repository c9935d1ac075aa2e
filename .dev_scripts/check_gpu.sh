#!/usr/bin/env bash
# Everything that needs a GPU, in two commands. Each step runs even if an earlier one failed or took too long; the
# exit status says whether all of them passed.
#
# usage: .dev_scripts/check_gpu.sh [FOLDER]              tests, then benchmarks: less than ten minutes
#        .dev_scripts/check_gpu.sh --sanitize [FOLDER]   the tools of compute-sanitizer over the operator tests
# Output goes to FOLDER (default: work_dirs/gpu), line by line: what is cut off has said what it knew. failures.txt
# gets each failed test with its traceback when it fails.
#
# PYTHON   the interpreter of an environment with grootvl_mm built for CUDA (default: .venv/bin/python)
# WORKERS  processes that share the GPU for the tests (default: 4; 0 without pytest-xdist)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

SANITIZE=0
if [[ ${1:-} == --sanitize ]]; then SANITIZE=1; shift; fi
readonly SANITIZE PYTHON=${PYTHON:-.venv/bin/python} OUT=${1:-work_dirs/gpu}
readonly WORKERS=${WORKERS:-4}
readonly OPERATORS=(tests/ops/test_tree.py tests/ops/test_scan.py tests/ops/test_selective_scan.py)
FAILED=()

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# step NAME SECONDS COMMAND...: keeps the output in FOLDER/NAME.txt and remembers a failure. After so many seconds the
# command is interrupted, as by Ctrl-C, on which pytest still sums up.
step() {
  local name=$1 limit=$2 seconds=$SECONDS status=passed
  shift 2
  timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee "$OUT/$name.txt" ||
    { status=failed; FAILED+=("$name"); }
  echo "[$name] $status after $((SECONDS - seconds)) s" | tee -a "$OUT/steps.txt"
}

"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || fail "torch sees no GPU"
# Without importing the package, which gives CUDA tensors the PyTorch operators where kernels are missing.
"$PYTHON" -c 'import importlib.util, pathlib, torch
folder = pathlib.Path(importlib.util.find_spec("grootvl_mm").origin).parent
torch.ops.load_library(next(folder.glob("_C*.so")))
raise SystemExit(not torch._C._dispatch_has_kernel_for_dispatch_key("grootvl::tree_scan", "CUDA"))' ||
  fail "grootvl_mm is built without CUDA; see docs/cuda.md"
mkdir -p "$OUT"
: >"$OUT/steps.txt"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if [[ $SANITIZE == 1 ]]; then
  command -v compute-sanitizer >/dev/null || fail "compute-sanitizer is missing; it comes with the CUDA toolkit"
  # The caching allocator would hide accesses between two tensors.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck synccheck initcheck; do
    step "$tool" 3600 compute-sanitizer --tool "$tool" --kernel-regex kns=grootvl --error-exitcode 1 \
      "$PYTHON" -m pytest "${OPERATORS[@]}" -m gpu -k "not differences and not random"
  done
else
  step gpu 30 nvidia-smi -q -d CLOCK,MEMORY
  step tests 330 env GROOTVL_FAILURES="$OUT/failures.txt" "$PYTHON" -m pytest tests/ops tests/layers tests/models \
    -m "gpu and not slow" -v --durations=20 -n "$WORKERS" -p tests.helpers.failures_at_once
  step benchmark_ops 90 "$PYTHON" tools/analysis_tools/benchmark_ops.py --device cuda --out "$OUT/ops"
  step benchmark_model 120 "$PYTHON" tools/analysis_tools/benchmark_model.py --device cuda --amp --out "$OUT/model"
fi
[[ ${#FAILED[@]} == 0 ]] || fail "failed: ${FAILED[*]}"
