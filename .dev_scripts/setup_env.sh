#!/usr/bin/env bash
# Makes the tested environment and builds grootvl_mm into it. Every step leaves a stamp named by what it depends on, so
# that a second call does only what has changed.
#
# STACK   openmmlab (default), in .venv, or onedl, the maintained packages with the same import names, in .venv-onedl
# PYTHON  the interpreter to make it with; Python 3.10 or 3.11 (default: the first that is found)
# GROOTVL_CACHE  where the compiled mmcv wheel is kept (default: ~/.cache/grootvl_mm)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly STACK=${STACK:-openmmlab}
readonly HOSTS=requirements/stacks/$STACK.txt
readonly CACHE=${GROOTVL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/grootvl_mm}

say() { echo "[setup] $*"; }
fail() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }
install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

[[ -e $HOSTS ]] || fail "STACK must be one of $(basename -s .txt requirements/stacks/*.txt | paste -sd,), got '$STACK'"
VENV=.venv
[[ $STACK == openmmlab ]] || VENV=.venv-$STACK
readonly VENV STAMPS=$VENV/.stamps
MMCV=$(grep -E '^(onedl-)?mmcv==' "$HOSTS")
readonly MMCV

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.10 python3 python}; do
    if supported "$candidate"; then command -v "$candidate"; return; fi
  done
  fail "no Python 3.10 or 3.11 found (tried: ${PYTHON:-python3.11 python3.10 python3 python}); install one or set PYTHON"
}

# step NAME "what is being done" COMMAND: runs COMMAND unless it has been run with the same inputs (standard input).
step() {
  local name=$1 text=$2 key
  key=$STAMPS/$name-$(sha256sum | cut -c1-16)
  [[ -e $key ]] && return
  say "$text"
  "$3"
  rm -f "$STAMPS/$name-"*
  touch "$key"
}

make_venv() {
  rm -rf "$VENV"
  "$python" -m venv "$VENV"
  install -r requirements/build.txt
}

install_torch() { install -r requirements/torch.txt; }

# The wheel is built for one torch, one Python and with or without CUDA; those are its folder's name.
install_mmcv() {
  local tag wheels building has_cuda
  has_cuda=$("$VENV/bin/python" -c 'import torch; print(int(torch.cuda.is_available()))')
  if [[ $has_cuda == 1 ]] && ! command -v nvcc >/dev/null; then
    say "a GPU but no CUDA toolkit (nvcc): mmcv gets its CPU operators only, and Mask R-CNN will need the CPU"
    has_cuda=0
  fi
  tag=$("$VENV/bin/python" -c "import sys, torch
print(f'${MMCV/==/-}-torch{torch.__version__}-cp{sys.version_info[0]}{sys.version_info[1]}-' + ('cuda' if $has_cuda else 'cpu'))")
  wheels=$CACHE/wheels/$tag
  if ! compgen -G "$wheels/*.whl" >/dev/null; then
    say "compiling $MMCV, which has no wheel for this torch: about 9 minutes on 2 cores, once (kept in $wheels)"
    mkdir -p "$CACHE/wheels"
    building=$(mktemp -d "$CACHE/wheels/building.XXXXXX")
    # shellcheck disable=SC2064
    trap "rm -rf '$building'" EXIT
    build_mmcv "$building" "$has_cuda" >"$building/log" 2>&1 &
    watch_build $! "$building/log"
    wait $! || { tail -n 30 "$building/log" >&2; fail "$MMCV did not compile; the end of its log is above"; }
    rm "$building/log"
    rm -rf "$wheels"
    mv "$building" "$wheels"
    trap - EXIT
  fi
  install --no-deps --force-reinstall "$wheels"/*.whl
}

build_mmcv() {
  local nvidia
  nvidia=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13
  # Headers that torch's own include, and the CUDA toolkit may lack, come with torch's dependencies.
  if [[ $2 == 1 ]]; then export FORCE_CUDA=1 CPATH=$nvidia/include LIBRARY_PATH=$nvidia/lib; else export CUDA_VISIBLE_DEVICES=; fi
  "$VENV/bin/python" -m pip wheel --verbose --no-build-isolation --no-deps --wheel-dir "$1" --no-binary "${MMCV%==*}" "$MMCV"
}

# Shows how far ninja is while process $1 writes the log $2.
watch_build() {
  local done_so_far last=
  while kill -0 "$1" 2>/dev/null; do
    sleep 5
    done_so_far=$(grep -oE '^ *\[[0-9]+/[0-9]+\]' "$2" | tail -n 1 | tr -d ' ' || true)
    if [[ -t 1 ]]; then
      printf '\r[setup]   mmcv %s ' "$done_so_far"
    elif [[ ${done_so_far%?/*} != "$last" ]]; then
      last=${done_so_far%?/*}
      echo "[setup]   mmcv $done_so_far"
    fi
  done
  [[ -t 1 ]] && echo || true
}

install_packages() {
  install -r "$HOSTS" -r requirements/develop.txt -c requirements/constraints.txt
  # openmim pulls in openxlab, whose pin takes setuptools back to a version that cannot install a pyproject.
  install -r requirements/build.txt 2>/dev/null
}

install_project() { install --no-build-isolation --no-deps --editable .; }

if ! supported "$VENV/bin/python"; then
  python=$(find_python)
  say "making $VENV with $("$python" --version)"
  make_venv
fi
mkdir -p "$STAMPS"
step torch "installing torch and torchvision (CUDA libraries included, several GB)" install_torch \
  < <(cat requirements/torch.txt requirements/build.txt)
step mmcv "installing $MMCV" install_mmcv < <(cat requirements/torch.txt; echo "$MMCV")
step packages "installing mmdet, mmsegmentation, mmpretrain, mim and the development tools" install_packages \
  < <(cat "$HOSTS" requirements/{build,constraints,develop,optional,tests}.txt)
[[ -e grootvl_mm/_C.so ]] || rm -f "$STAMPS"/project-*
step project "compiling the operators and installing grootvl_mm (about a minute)" install_project \
  < <(cat setup.py pyproject.toml requirements/{runtime,torch}.txt; find ops -type f | sort | xargs cat)
