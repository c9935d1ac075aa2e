#!/usr/bin/env bash
# Creates the tested environment and builds grootvl_mm in it. Every step leaves a stamp that depends on its inputs, so
# that later calls only repeat steps whose inputs have changed. The system must provide Python with venv and headers, a
# C++ compiler, make and git.
#
# STACK   openmmlab, in .venv; onedl, the maintained packages with the same import names, in .venv-onedl; ops, torch and
#         mmengine without any host, in .venv-ops; or language, ops and Hugging Face's packages (Python 3.11 to 3.13),
#         in .venv-language, because transformers 5 breaks mmpretrain. Default: openmmlab if its packages can be
#         installed (Python 3.10 and 3.11), otherwise onedl (3.12 and 3.13), with .venv as a link to .venv-onedl.
#         Python 3.14 supports ops only.
# PYTHON  interpreter (default: the first usable one of 3.11, 3.10, 3.12, 3.13, 3.14, python3)
# MAX_JOBS       number of parallel compiler processes (default: one per core)
# GROOTVL_CACHE  folder for compiled mmcv wheels (default: ~/.cache/grootvl_mm)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly CACHE=${GROOTVL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/grootvl_mm}
readonly CANDIDATES=${PYTHON:-python3.11 python3.10 python3.12 python3.13 python3.14 python3 python}
STACK=${STACK:-}
LOG='' doing='' first_line=1

say() { echo "[setup] $*"; }
fail() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }
version() { "$1" -c 'import sys; print(".".join(map(str, sys.version_info[:2])))' 2>/dev/null; }

# Prints why interpreter $1 cannot be used for stack $2, or nothing if it can.
unusable() {
  local found
  found=$(version "$1") || { echo "not found"; return; }
  case $found in
    3.10) [[ $2 != language ]] || { echo "$found, and transformers 5 is tested with 3.11 to 3.13"; return; } ;;
    3.11) ;;
    3.12 | 3.13) [[ $2 != openmmlab ]] || { echo "$found, and OpenMMLab's packages need 3.10 or 3.11"; return; } ;;
    3.14) [[ $2 == ops ]] || { echo "$found, for which pandas 2.2.3, required by onedl-mim, has no wheel"; return; } ;;
    *) echo "$found, expected 3.10 to 3.14"; return ;;
  esac
  "$1" -c 'import ensurepip, venv' 2>/dev/null || { echo "$found without venv (Debian, Ubuntu: python3-venv)"; return; }
  "$1" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_config_var("INCLUDEPY") + "/Python.h"))' ||
    echo "$found without headers (Debian, Ubuntu: python3-dev)"
}

# Sets python and STACK.
find_python() {
  local candidate reason reasons=
  for candidate in $CANDIDATES; do
    reason=$(unusable "$candidate" "$STACK")
    if [[ -z $reason ]]; then
      python=$(command -v "$candidate")
      return
    fi
    reasons+="; $candidate: $reason"
  done
  fail "no usable Python (${reasons#; }); install one or set PYTHON"
}

default_stack() { case $(version "$1") in 3.10 | 3.11) echo openmmlab ;; *) echo onedl ;; esac }

# Filters a log to lines that show progress.
show_progress() {
  local line shown=
  while IFS= read -r line; do
    if [[ $line =~ ^\ *(\[[0-9]+/[0-9]+\]) ]]; then # ninja
      [[ -t 1 ]] && printf '\r[setup]   compiled %s ' "${BASH_REMATCH[1]}"
      [[ ! -t 1 && ${BASH_REMATCH[1]%?/*} != "$shown" ]] && say "  compiled ${BASH_REMATCH[1]}"
      shown=${BASH_REMATCH[1]%?/*}
    elif [[ $line =~ Downloading\ ([^\ ]+)\ \(([0-9]{3,}\.[0-9]\ MB|.*GB)\) ]]; then
      say "  downloading ${BASH_REMATCH[1]##*/} (${BASH_REMATCH[2]})"
    elif [[ $line == "[setup]"* ]]; then
      echo "$line"
    elif [[ $line == "Installing collected packages:"* ]]; then
      line=${line//[^,]/}
      say "  installing $((${#line} + 1)) packages"
    fi
  done
  if [[ -n $shown && -t 1 ]]; then echo; fi
}

# step NAME TEXT COMMAND: runs COMMAND unless it has already run with the same inputs (on stdin), and logs its output.
step() {
  local key
  key=$STAMPS/$1-$(sha256sum | cut -c1-16)
  [[ -e $key ]] && return
  doing=$2
  say "$2"
  first_line=$(wc -l <"$LOG")
  "$3" 2>&1 | tee -a "$LOG" | show_progress
  doing=
  rm -f "$STAMPS/$1-"*
  touch "$key"
}

explain_failure() {
  local status=$?
  if [[ $status != 0 && -n $doing ]]; then
    tail -n "+$first_line" "$LOG" | grep -E '(^|[^a-zA-Z])(error|ERROR|FAILED):' | cut -c1-200 | head -n 10 >&2 || true
    { echo ...; tail -n "+$first_line" "$LOG" | tail -n 15 | cut -c1-400; } >&2
    printf '[setup] error: failed while %s; the complete output is in %s\n' "$doing" "$LOG" >&2
  fi
}
trap explain_failure EXIT

install() { "$VENV/bin/python" -m pip install --disable-pip-version-check --no-warn-script-location --progress-bar off "$@"; }

make_venv() {
  [[ -x $VENV/bin/python ]] || "$python" -m venv "$VENV"
  install -r requirements/build.txt
}

install_torch() { install -r requirements/torch.txt -c requirements/constraints.txt; }

# A wheel depends on the versions of torch and Python and on CUDA, which are in the name of its folder.
install_mmcv() {
  local tag wheels has_cuda
  has_cuda=$("$VENV/bin/python" -c 'import torch; print(int(torch.cuda.is_available()))')
  if [[ $has_cuda == 1 ]] && ! command -v nvcc >/dev/null; then
    say "  there is a GPU but no CUDA toolkit (nvcc): mmcv gets CPU operators only, so Mask R-CNN runs on the CPU"
    has_cuda=0
  fi
  tag=$("$VENV/bin/python" -c "import sys, torch
print(f'${MMCV/==/-}-torch{torch.__version__}-cp{sys.version_info[0]}{sys.version_info[1]}-' + ('cuda' if $has_cuda else 'cpu'))")
  wheels=$CACHE/wheels/$tag
  if ! compgen -G "$wheels/*.whl" >/dev/null; then
    say "  $MMCV has no wheel for this torch: compiling it once, about 10 minutes on 2 cores (cached in $CACHE)"
    build_mmcv "$wheels" "$has_cuda"
  fi
  install --no-deps --force-reinstall "$wheels"/*.whl
}

# build_mmcv FOLDER WITH_CUDA: recent torch headers need C++20, but mmcv's setup.py adds -std=c++17 after all flags from
# the environment. So the compiler is a wrapper script that appends the right standard. It also turns off the debug
# information in Python's default flags, which takes more than half of the time.
build_mmcv() (
  building=$CACHE/wheels/building.$$
  trap 'rm -rf "$building"' EXIT
  mkdir -p "$building"
  site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  standard=$(sed -nE 's/.*__cplusplus < 20([0-9]{2}).*/-std=c++\1/p' "$site/torch/include/ATen/ATen.h")
  printf '#!/bin/sh\nexec %s "$@" -g0 %s\n' "${CXX:-c++}" "$standard" >"$building/c++"
  chmod +x "$building/c++"
  export CXX=$building/c++
  # Some headers included by torch's may be missing in the CUDA toolkit; they come with torch's dependencies.
  if [[ $2 == 1 ]]; then
    export FORCE_CUDA=1 CPATH=$site/nvidia/cu13/include LIBRARY_PATH=$site/nvidia/cu13/lib
    export NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} $standard"
  else
    export CUDA_VISIBLE_DEVICES=
  fi
  "$VENV/bin/python" -m pip wheel --verbose --no-build-isolation --no-deps --wheel-dir "$building" \
    --no-binary "${MMCV%==*}" "$MMCV"
  rm -rf "$1"
  mkdir "$1"
  mv "$building"/*.whl "$1"
)

install_packages() {
  install -r "$HOSTS" "${TOOLS[@]}" -c requirements/constraints.txt
  # opencv-python, which mmengine requires, needs the system's X11 libraries; the headless build does not.
  if ! "$VENV/bin/python" -c 'import cv2'; then
    say "  no X11 libraries found: replacing OpenCV by its headless build"
    install --no-deps --force-reinstall opencv-python-headless -c requirements/constraints.txt
  fi
  # openmim pulls in openxlab, which pins setuptools to a version without support for pyproject.toml.
  install -r requirements/build.txt
}

install_project() { install --verbose --no-build-isolation --no-deps --editable .; }

command -v "${CXX:-c++}" >/dev/null || fail "no C++ compiler (${CXX:-c++}); Debian, Ubuntu: apt install g++"
[[ -n $STACK || -n $(unusable .venv/bin/python "") ]] || STACK=$(default_stack .venv/bin/python)
python=
if [[ -z $STACK ]]; then
  find_python
  STACK=$(default_stack "$python")
  if [[ $STACK == onedl ]]; then
    say "Python $(version "$python"): using the maintained onedl packages, because OpenMMLab's need Python 3.10 or 3.11"
    rm -rf .venv
    ln -s .venv-onedl .venv
  fi
fi
HOSTS=requirements/stacks/$STACK.txt
[[ -e $HOSTS ]] || fail "STACK must be one of $(basename -s .txt requirements/stacks/*.txt | paste -sd,), got '$STACK'"
VENV=$PWD/.venv
[[ $STACK == openmmlab ]] || VENV=$PWD/.venv-$STACK
TOOLS=(-r requirements/develop.txt)
[[ $STACK != ops ]] || TOOLS=(-r requirements/tests.txt -r requirements/docs.txt)
[[ $STACK != language ]] || TOOLS=(-r requirements/tests.txt -r requirements/lint.txt)
MMCV=$(grep -E '^(onedl-)?mmcv==' "$HOSTS" || true)
readonly STACK HOSTS VENV TOOLS MMCV STAMPS=$VENV/.stamps

if [[ -n $(unusable "$VENV/bin/python" "$STACK") ]]; then
  [[ -n $python ]] || find_python
  rm -rf "$VENV"
elif [[ -n ${PYTHON:-} && $(version "$PYTHON") != $(version "$VENV/bin/python") ]]; then
  fail "$VENV has Python $(version "$VENV/bin/python"), but PYTHON is $(version "$PYTHON"); delete $VENV first"
fi
mkdir -p "$STAMPS"
LOG=$VENV/setup.log
touch "$LOG"
export PATH=$VENV/bin:$PATH # ninja

step venv "preparing ${VENV##*/} with $("${python:-$VENV/bin/python}" --version)" make_venv <requirements/build.txt
step torch "installing torch and torchvision (CUDA libraries included, several GB)" install_torch <requirements/torch.txt
if [[ -n $MMCV ]]; then
  step mmcv "installing $MMCV" install_mmcv < <(cat requirements/torch.txt; echo "$MMCV")
fi
step packages "installing the packages of $HOSTS and the development tools" install_packages \
  < <(cat "$HOSTS" requirements/{build,constraints,develop,docs,lint,optional,tests}.txt)
[[ -e grootvl_mm/_C.so ]] || rm -f "$STAMPS"/project-*
step project "compiling the operators and installing grootvl_mm (about a minute)" install_project \
  < <(cat setup.py pyproject.toml requirements/{runtime,torch}.txt; find ops/csrc -type f | sort | xargs cat)
if [[ $STACK != ops && $STACK != language && -z $(type -P chromium chromium-browser google-chrome google-chrome-stable) ]]; then
  say "no Chromium or Chrome found: the tests of the tree explorer will be skipped; to run them, install one (Debian:" \
    "apt install chromium; elsewhere: ${VENV##*/}/bin/python -m playwright install chromium)"
fi
say "$VENV is ready"
