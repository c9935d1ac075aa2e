#!/usr/bin/env bash
# The tests of the CPU operators under the sanitizers of GCC: the operators are compiled once more, with sanitizers, into
# a folder of their own, and loaded in the place of this checkout's build. Each instruction set is run that the kernels
# exist for and this machine has.
#
# usage: .dev_scripts/sanitize_ops.sh [ARGUMENTS OF PYTEST]
#
# SANITIZER  address: AddressSanitizer and UndefinedBehaviorSanitizer (default); thread: ThreadSanitizer, for the tests
#            that run on several threads
# ISAS       the instruction sets (default: "baseline avx2 avx512")
# BUILD      where to compile, and leave the result for the next run (default: a temporary folder, removed at the end)
# PYTHON     the interpreter of an environment with PyTorch and pytest (default: .venv/bin/python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Other tests of the folder say nothing about the CPU kernels, or start processes that compile or lack the sanitizer.
readonly OPERATORS=(tests/ops/test_{tree,scan,selective_scan,norm,conv,published_semantics}.py)
readonly SANITIZER=${SANITIZER:-address} ISAS=${ISAS:-baseline avx2 avx512} PYTHON=${PYTHON:-.venv/bin/python}
case $SANITIZER in
  # PyTorch is loaded without run-time type information of its classes for the sanitizer.
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
# The sanitizer looks for the functions that it wraps, those of C++ among them, when it is loaded.
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

# Not optimised, which would take many times as long to compile, and with line numbers; the last of like flags counts.
GROOTVL_CXXFLAGS="-O0 -g1 -fno-omit-frame-pointer ${sanitize[*]}" LDFLAGS=$link FORCE_CUDA=0 \
  "$PYTHON" setup.py --quiet build_ext --build-lib "$build/lib" --build-temp "$build/temp"

export GROOTVL_LIBRARY=$build/lib/grootvl_mm/_C.so PYTHONPATH=$PWD
# Python and PyTorch leave memory to the end of the process. What they do on several threads is not compiled with the
# sanitizer, which therefore looks at our library only.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc
export TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1"
for isa in $ISAS; do
  echo "== $SANITIZER, $isa"
  GROOTVL_CPU_ISA=$isa LD_PRELOAD=$preload \
    "$PYTHON" -m pytest -n 0 -p no:cacheprovider --capture=sys -m "not gpu" "${tests[@]}" "$@"
done
