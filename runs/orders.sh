#!/usr/bin/env bash
# Bound against exact likelihoods of orders, two texts, three seeds: two cores, 2 hours (estimated).
# Prints bits per character for 1, 2, 4 and 8 tokens per call, with differences paired by window.
# Usage: runs/orders.sh tinyshakespeare.txt
set -euo pipefail
text=$1

python data/prepare.py text --input "$text" --out tinyshakespeare
for data in pydocs tinyshakespeare; do
    for seed in 1 2 3; do
        python train.py pydocs_mdlm --data=$data --steps=1000 --lr_decay=linear --seed=$seed \
            --out_dir=out/orders/${data}_$seed
    done
    python -m tasks.orders out/orders/${data}_{1,2,3}/ckpt.pt --windows 32 --dtype auto
done
