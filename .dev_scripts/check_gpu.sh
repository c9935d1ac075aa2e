#!/usr/bin/env bash
# All checks that need a GPU, in two commands. Each step runs even if an earlier one failed or timed out. The exit status
# is 0 if all of them have passed, 1 if one failed, and 2 if none failed but some are left for another call.
#
# usage: .dev_scripts/check_gpu.sh [FOLDER]              tests, then benchmarks, for LIMIT seconds
#        .dev_scripts/check_gpu.sh --sanitize [FOLDER]   the operator tests under the tools of compute-sanitizer
# Output is written to FOLDER (default: work_dirs/gpu) line by line, so that an interrupted run keeps its results so
# far. Failed tests are appended to failures.txt with their tracebacks as they fail. Called again with the same sources,
# PyTorch and GPU, the script runs only the steps that have not passed.
#
# PYTHON   the interpreter of an environment with grootvl_mm built for CUDA (default: .venv/bin/python)
# WORKERS  processes that share the GPU for the tests, if there is pytest-xdist (default: 4)
# LIMIT    total seconds for all steps, except those of --sanitize, which may take an hour each (default: 570)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

SANITIZE=0
if [[ ${1:-} == --sanitize ]]; then SANITIZE=1; shift; fi
readonly SANITIZE PYTHON=${PYTHON:-.venv/bin/python} OUT=${1:-work_dirs/gpu}
readonly WORKERS=${WORKERS:-4} LIMIT=${LIMIT:-570}
readonly OPERATORS=(tests/ops/test_{tree,scan,selective_scan,norm,conv}.py)
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
    echo "[$name] left for another call" >>"$OUT/steps.txt"
    return
  fi
  if ((SANITIZE == 0 && start + limit > LIMIT)); then limit=$((LIMIT - start)); fi
  timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee "$OUT/$name.txt" ||
    { [[ ${PIPESTATUS[0]} == 124 ]] && status="timed out" || status=failed; FAILED+=("$name"); }
  echo "[$name] $status after $((SECONDS - start)) s" | tee -a "$OUT/steps.txt"
}

# benchmark NAME SECONDS ARGUMENTS...: a step that measures on the GPU and writes its tables to FOLDER/NAME.
benchmark() {
  local name=$1 limit=$2 tool=$3
  shift 3
  step "$name" "$limit" "$PYTHON" "tools/analysis_tools/benchmark_$tool.py" --device cuda --out "$OUT/$name" "$@"
}

"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || fail "torch finds no GPU"
"$PYTHON" -c 'import torch; raise SystemExit(torch.cuda.get_device_capability() < (8, 0))' ||
  fail "the GPU is too old; the kernels need compute capability 8.0"
"$PYTHON" -c 'import matplotlib, mmengine, pytest, scipy, torchvision, tqdm' || fail "a package is missing in $PYTHON"
# Without importing the package, which falls back to PyTorch operators if CUDA kernels are missing.
"$PYTHON" -c 'import pathlib, torch
for library in pathlib.Path("grootvl_mm").glob("_C*.so"):
    torch.ops.load_library(library.resolve())
raise SystemExit(not torch._C._dispatch_has_kernel_for_dispatch_key("grootvl::tree_scan", "CUDA"))' ||
  fail "no CUDA operators in this checkout; build them: FORCE_CUDA=1 $PYTHON -m pip install --no-build-isolation -e ."
mkdir -p "$OUT"
sources=$(find .dev_scripts/check_gpu.sh grootvl_mm ops tests tools -type f ! -name '*.pyc' -print0 | sort -z |
  xargs -0 sha256sum | sha256sum)
sources+=$("$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())')
if [[ $sources != "$(cat "$OUT/sources.txt" 2>/dev/null)" ]]; then
  rm -f "$OUT/steps.txt" "$OUT/failures.txt"
  echo "$sources" >"$OUT/sources.txt"
fi
# Keeps the compiled code of torch.compile, so that later runs reuse it.
TORCHINDUCTOR_CACHE_DIR=$(realpath "$OUT")/compiled
export TORCHINDUCTOR_CACHE_DIR
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if [[ $SANITIZE == 1 ]]; then
  PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
  command -v compute-sanitizer >/dev/null || fail "compute-sanitizer is missing; it comes with the CUDA toolkit"
  # The caching allocator would hide out-of-bounds accesses between tensors.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  # All kernels: initcheck must see what PyTorch's write.
  for tool in memcheck racecheck synccheck initcheck; do
    step "$tool" 3600 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$PYTHON" -m pytest "${OPERATORS[@]}" -m gpu -k "not differences and not random"
  done
else
  step gpu 30 nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm --format=csv
  workers=(-n "$WORKERS")
  "$PYTHON" -c 'import xdist' 2>/dev/null || workers=()
  # Without a limit, each worker would start one thread per core for the reference results that it computes on the CPU.
  threads=$(($(nproc) / (WORKERS > 1 ? WORKERS : 1)))
  step tests 330 env GROOTVL_FAILURES="$OUT/failures.txt" OMP_NUM_THREADS=$((threads > 1 ? threads : 1)) \
    "$PYTHON" -m pytest tests/ops tests/layers tests/models \
    -m "gpu and not slow" -v --durations=20 "${workers[@]}" -p tests.helpers.failures_at_once
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
[[ ${#LEFT[@]} == 0 ]] || exit 2
