#!/usr/bin/env bash
# What each ingredient of the demo gives, three seeds each: one CPU core, two hours (estimated).
set -euo pipefail
export OMP_NUM_THREADS=1

run() { # name, then what is changed
    for seed in 1 2 3; do
        out=out/recipe_$1_$seed
        python train.py --lr_decay=linear --steps=1000 --eval_every=100000 --samples=0 \
            --seed=$seed --out_dir=$out "${@:2}"
        python evaluate.py $out/ckpt.pt --split val --passes 4
    done
}
run base
run adamw --muon_lr=0
run blocks --n_layer=4 --steps=340
run uniform --time_law=uniform
run counts --time_draw=counts
run constant --lr_decay=constant
run long_linear --steps=2400
run long --steps=2400 --lr_decay=constant
run long_counts --steps=2400 --lr_decay=constant --time_draw=counts
