#!/usr/bin/env bash
# A config under Slurm, on the GPUs of one node or several: days (estimated; not run yet).
# Usage: sbatch runs/slurm.sh text8_mdlm
#        sbatch --nodes=4 runs/slurm.sh owt_mdlm --dtype=bfloat16
#        sbatch --nodes=2 --gpus-per-node=4 --time=12:00:00 runs/slurm.sh smdm_170 --flops=10
# Submit from the repository's folder, on a disk that all nodes share. A job that is preempted, or
# reaches its time limit, saves a checkpoint, goes back into the queue and continues.
#SBATCH --job-name=nanomdlm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

requeue() { # 300 s before the time limit: train.py saves after SIGTERM
    scancel --signal=TERM "$SLURM_JOB_ID"
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=gpu --rdzv_backend=c10d \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first:29500" train.py "$@" --resume &
step=$!
wait "$step"
