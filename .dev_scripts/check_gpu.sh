#!/usr/bin/env bash
# All checks that need a GPU, in two commands. Each step runs even if an earlier one failed or timed out; the exit
# status says whether all of them passed.
#
# usage: .dev_scripts/check_gpu.sh [FOLDER]              tests, then benchmarks, for LIMIT seconds
#        .dev_scripts/check_gpu.sh --sanitize [FOLDER]   the operator tests under the tools of compute-sanitizer
# Output is written to FOLDER (default: work_dirs/gpu) line by line, so that an interrupted run keeps its results so
# far. Failed tests are appended to failures.txt with their tracebacks as they fail. Called again with the same sources,
# the script runs only the steps that have not passed.
#
# PYTHON   the interpreter of an environment with grootvl_mm built for CUDA (default: .venv/bin/python)
# WORKERS  processes that share the GPU for the tests (default: 4; 0 without pytest-xdist)
# LIMIT    total seconds for all steps, except those of --sanitize (default: 570)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

SANITIZE=0
if [[ ${1:-} == --sanitize ]]; then SANITIZE=1; shift; fi
readonly SANITIZE PYTHON=${PYTHON:-.venv/bin/python} OUT=${1:-work_dirs/gpu}
readonly WORKERS=${WORKERS:-4} LIMIT=${LIMIT:-570}
readonly OPERATORS=(tests/ops/test_tree.py tests/ops/test_scan.py tests/ops/test_selective_scan.py)
FAILED=() LEFT=()

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# step NAME SECONDS COMMAND...: writes the output to FOLDER/NAME.txt and records failures. After SECONDS, or when LIMIT
# is reached, the command gets a SIGINT, as by Ctrl-C, after which pytest still prints its summary.
step() {
  local name=$1 limit=$2 start=$SECONDS status=passed
  shift 2
  if grep -qsF "[$name] passed" "$OUT/steps.txt"; then
    echo "[$name] has passed before"
    return
  fi
  if ((SANITIZE == 0 && start + 20 > LIMIT)); then
    LEFT+=("$name")
    return
  fi
  if ((SANITIZE == 0 && start + limit > LIMIT)); then limit=$((LIMIT - start)); fi
  timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee "$OUT/$name.txt" ||
    { status=failed; FAILED+=("$name"); }
  echo "[$name] $status after $((SECONDS - start)) s" | tee -a "$OUT/steps.txt"
}

# benchmark NAME SECONDS ARGUMENTS...: a step that measures on the GPU and writes its tables to FOLDER/NAME.
benchmark() {
  local name=$1 limit=$2 tool=$3
  shift 3
  step "$name" "$limit" "$PYTHON" "tools/analysis_tools/benchmark_$tool.py" --device cuda --out "$OUT/$name" "$@"
}

"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || fail "torch finds no GPU"
# Without importing the package, which falls back to PyTorch operators if CUDA kernels are missing.
"$PYTHON" -c 'import importlib.util, pathlib, torch
folder = pathlib.Path(importlib.util.find_spec("grootvl_mm").origin).parent
torch.ops.load_library(next(folder.glob("_C*.so")))
raise SystemExit(not torch._C._dispatch_has_kernel_for_dispatch_key("grootvl::tree_scan", "CUDA"))' ||
  fail "grootvl_mm is built without CUDA; see docs/cuda.md"
mkdir -p "$OUT"
sources=$(find grootvl_mm ops tests tools -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
if [[ $sources != "$(cat "$OUT/sources.txt" 2>/dev/null)" ]]; then
  rm -f "$OUT/steps.txt"
  echo "$sources" >"$OUT/sources.txt"
fi
# Keeps the compiled code of torch.compile, so that later runs reuse it.
TORCHINDUCTOR_CACHE_DIR=$(realpath "$OUT")/compiled
export TORCHINDUCTOR_CACHE_DIR
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if [[ $SANITIZE == 1 ]]; then
  command -v compute-sanitizer >/dev/null || fail "compute-sanitizer is missing; it comes with the CUDA toolkit"
  # The caching allocator would hide out-of-bounds accesses between tensors.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck synccheck initcheck; do
    step "$tool" 3600 compute-sanitizer --tool "$tool" --kernel-regex kns=grootvl --error-exitcode 1 \
      "$PYTHON" -m pytest "${OPERATORS[@]}" -m gpu -k "not differences and not random"
  done
else
  step gpu 30 nvidia-smi -q -d CLOCK,MEMORY
  # Without a limit, each worker would start one thread per core for the reference results that it computes on the CPU.
  threads=$(($(nproc) / (WORKERS > 1 ? WORKERS : 1)))
  step tests 330 env GROOTVL_FAILURES="$OUT/failures.txt" OMP_NUM_THREADS=$((threads > 1 ? threads : 1)) \
    "$PYTHON" -m pytest tests/ops tests/layers tests/models \
    -m "gpu and not slow" -v --durations=20 -n "$WORKERS" -p tests.helpers.failures_at_once
  # The most informative ones first.
  benchmark ops_float32 120 ops
  benchmark ops_bfloat16 120 ops --autocast bfloat16
  for images in 128x224x224 2x800x1344; do
    benchmark "bfloat16_$images" 120 model --rounds 8 --images "$images" --autocast bfloat16
    benchmark "tf32_$images" 120 model --rounds 8 --images "$images" --tf32
    benchmark "graphs_bfloat16_$images" 120 model --rounds 8 --images "$images" --autocast bfloat16 --graphs
    benchmark "graphs_tf32_$images" 120 model --rounds 8 --images "$images" --tf32 --graphs
  done
  for images in 128x224x224 2x800x1344; do
    benchmark "compiled_bfloat16_$images" 480 model --rounds 8 --images "$images" --autocast bfloat16 --compile
    benchmark "compiled_tf32_$images" 480 model --rounds 8 --images "$images" --tf32 --compile
  done
fi
[[ ${#LEFT[@]} == 0 ]] || echo "left for another call: ${LEFT[*]}"
[[ ${#FAILED[@]} == 0 ]] || fail "failed: ${FAILED[*]}"
