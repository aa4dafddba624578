#!/usr/bin/env bash
# The 46 runs of the scaling laws and their fit: one CPU core, an hour (estimated).
set -euo pipefail
export OMP_NUM_THREADS=1
library=$(python -c "import os; print(os.path.dirname(os.__file__))")

sweep() {
    python -m tasks.scaling --data=stdlib --seq_len=128 --batch_size=8 --micro_batch=64 \
        --eval_every=1000000 --lr_decay=linear "$@"
}
python data/prepare.py text --input "$library"/*.py --tokenizer char --out stdlib
# Trains, then exits with 2: one budget is not enough for a fit.
sweep --budgets 4e11 --sizes 13k 28k 50k 111k 198k --seeds 2 || true
sweep --budgets 1.2e12 --sizes 28k 50k 111k 198k 444k
sweep --budgets 2.4e12 3.6e12 --sizes 50k 111k 198k 444k
python -m tasks.scaling --fit out/scaling_pydocs_mdlm/runs.jsonl
