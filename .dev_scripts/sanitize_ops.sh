#!/usr/bin/env bash
# Runs the tests of the CPU operators under GCC's sanitizers: compiles the operators with sanitizers into a separate
# folder and loads them instead of this checkout's build, for each instruction set of the kernels.
#
# usage: .dev_scripts/sanitize_ops.sh [PYTEST ARGUMENTS]
#
# SANITIZER  address: AddressSanitizer and UndefinedBehaviorSanitizer (default); thread: ThreadSanitizer, only for
#            multi-threaded tests
# ISAS       instruction sets (default: "baseline avx2 avx512")
# BUILD      build folder, which is kept for the next run (default: a temporary folder)
# PYTHON     interpreter of an environment with PyTorch and pytest (default: .venv/bin/python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Other tests of the folder say nothing about the CPU kernels, or start processes that compile or lack the sanitizer.
readonly OPERATORS=(tests/ops/test_{tree,graph,scan,selective_scan,norm,conv,published_semantics}.py)
readonly SANITIZER=${SANITIZER:-address} ISAS=${ISAS:-baseline avx2 avx512} PYTHON=${PYTHON:-.venv/bin/python}
case $SANITIZER in
  # Without vptr, which needs run-time type information of PyTorch's classes.
  address) sanitize=(-fsanitize=address -fsanitize=undefined -fno-sanitize=vptr -fno-sanitize-recover=all) runtime=libasan.so
           tests=("${OPERATORS[@]}") ;;
  thread)  sanitize=(-fsanitize=thread) runtime=libtsan.so
           tests=("${OPERATORS[@]}" -k threads) ;;
  *) fail "SANITIZER must be address or thread, got '$SANITIZER'" ;;
esac
scratch=
if [[ -z ${BUILD:-} ]]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
fi
build=$(realpath -m "${BUILD:-$scratch}")
# The sanitizer resolves the functions that it wraps, including those of libstdc++, when it is loaded.
preload=
for library in "$runtime" libstdc++.so; do
  file=$("${CXX:-g++}" -print-file-name="$library")
  [[ $file == /* ]] || fail "the compiler ${CXX:-g++} has no $library; sanitizers need GCC and its runtime libraries"
  preload+=" $(realpath "$file")"
done

link=${sanitize[*]}
if [[ $SANITIZER == thread ]]; then
  mkdir -p "$build"
  "${CXX:-g++}" -O1 -fPIC -c .dev_scripts/openmp_for_tsan.cpp -o "$build/openmp_for_tsan.o"
  link+=" -Wl,--wrap=GOMP_parallel $build/openmp_for_tsan.o"
fi

# Unoptimized, because optimization would take many times as long to compile, and with line numbers. The last of
# conflicting flags wins.
GROOTVL_CXXFLAGS="-O0 -g1 -fno-omit-frame-pointer ${sanitize[*]}" LDFLAGS=$link FORCE_CUDA=0 \
  "$PYTHON" setup.py --quiet build_ext --build-lib "$build/lib" --build-temp "$build/temp"

export GROOTVL_LIBRARY=$build/lib/grootvl_mm/_C.so PYTHONPATH=$PWD
# No leak detection: Python and PyTorch do not free all memory at exit. ThreadSanitizer ignores their threads, because
# they are not instrumented.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc
export TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1"
for isa in $ISAS; do
  echo "== $SANITIZER, $isa"
  GROOTVL_CPU_ISA=$isa LD_PRELOAD=$preload \
    "$PYTHON" -m pytest -n 0 -p no:cacheprovider --capture=sys -m "not gpu" "${tests[@]}" "$@"
done
