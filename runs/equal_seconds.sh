#!/usr/bin/env bash
# MDLM's code and ours, 270 seconds each, three seeds: two CPU cores, two hours (estimated).
# Usage: runs/equal_seconds.sh CLONES, after data/tinyshakespeare was prepared as in compare.sh
set -euo pipefail
clones=$1

for data in pydocs tinyshakespeare; do
    steps=$([ $data = pydocs ] && echo 3100 || echo 2900)
    for lr in 3e-4 1e-3 3e-3; do
        python -m tasks.peers learn --clones "$clones" --vocab_size 2048 --batch_size 16 \
            --data $data --lr $lr --seed 1
    done
    for seed in 2 3; do # 1e-3 is the best of the three on both corpora
        python -m tasks.peers learn --clones "$clones" --vocab_size 2048 --batch_size 16 \
            --data $data --lr 1e-3 --seed $seed
    done
    for seed in 1 2 3; do
        out=out/equal_${data}_$seed
        python train.py --data=$data --steps=$steps --seed=$seed --eval_every=100000 --samples=0 \
            --out_dir=$out
        python evaluate.py $out/ckpt.pt --split val --passes 4
    done
done
