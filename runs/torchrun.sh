#!/usr/bin/env bash
# A config on all GPUs of one machine or several, without Slurm: days (estimated; not run yet).
# Usage: runs/torchrun.sh owt_mdlm
#        NODES=4 HOST=node1 runs/torchrun.sh owt_mdlm     # on each of 4 machines with a shared disk
#        runs/torchrun.sh smdm_170 --flops=10
# The same command continues a run that was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun --nnodes="${NODES:-1}" --nproc_per_node=gpu --max_restarts=3 --rdzv_backend=c10d \
    --rdzv_id=nanomdlm --rdzv_endpoint="${HOST:-localhost}:29500" train.py "$@" --resume
