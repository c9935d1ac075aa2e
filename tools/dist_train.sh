#!/usr/bin/env bash
# Distributed training on this machine, one process per GPU, or on the CPU if there is no GPU.
# For several machines, run it on each with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
# PYTHON is the interpreter (default: see find_python.sh).
set -euo pipefail
# shellcheck source=tools/find_python.sh
source "$(dirname "${BASH_SOURCE[0]}")/find_python.sh"

if [[ $# -lt 2 ]]; then
    echo "usage: [NNODES=1] [NODE_RANK=0] [MASTER_ADDR=127.0.0.1] [PORT=29500] [PYTHON=python]" \
        "$0 CONFIG PROCESSES [arguments of train.py]" >&2
    exit 2
fi
config=$1
processes=$2
shift 2

python=$(find_python)
exec "$python" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$processes" \
    "$(dirname "${BASH_SOURCE[0]}")/train.py" "$config" --launcher pytorch "$@"
