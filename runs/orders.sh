#!/usr/bin/env bash
# The bound, the exact likelihood of four orders and the price of several tokens per call: three
# seeds on the demo's data and on another text. Two cores, two hours (estimated).
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
