#!/usr/bin/env bash
# Training on a Slurm cluster, one task per GPU.
# PYTHON is the interpreter on the nodes (default: see find_python.sh, which searches on this machine).
set -euo pipefail
# shellcheck source=tools/find_python.sh
source "$(dirname "${BASH_SOURCE[0]}")/find_python.sh"

if [[ $# -lt 3 ]]; then
    echo "usage: [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS='...'] [PYTHON=python]" \
        "$0 PARTITION JOB_NAME CONFIG [WORK_DIR] [arguments of train.py]" >&2
    exit 2
fi
partition=$1
job_name=$2
config=$3
shift 3
work_dir=()
if [[ $# -gt 0 && $1 != -* ]]; then
    work_dir=(--work-dir "$1")
    shift
fi
read -ra srun_args <<<"${SRUN_ARGS:-}"
python=$(find_python)

set -x
exec srun \
    --partition="$partition" \
    --job-name="$job_name" \
    --gres=gpu:"${GPUS_PER_NODE:-8}" \
    --ntasks="${GPUS:-8}" \
    --ntasks-per-node="${GPUS_PER_NODE:-8}" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    "${srun_args[@]}" \
    "$python" -u "$(dirname "${BASH_SOURCE[0]}")/train.py" "$config" "${work_dir[@]}" \
    --launcher slurm "$@"
