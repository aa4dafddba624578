#!/usr/bin/env bash
# SMDM's 170M model, its temporal test and GSM8K: 8 GPUs, days (estimated; not run yet).
set -euo pipefail

[ -d data/slimpajama ] || python data/prepare.py slimpajama
torchrun --nproc_per_node=8 train.py smdm_170 --flops=10 --resume
for dump in CC-MAIN-2024-10 CC-MAIN-2024-18; do
    [ -d data/fineweb_$dump ] || python data/prepare.py fineweb --dump $dump
done
python evaluate.py out/smdm_170/ckpt.pt --passes 128 --resume \
    --zero_shot fineweb_CC-MAIN-2024-10 fineweb_CC-MAIN-2024-18

[ -d data/gsm8k ] || python data/prepare.py gsm8k --train_padding
torchrun --nproc_per_node=8 train.py smdm_170 --data=gsm8k --seq_len=256 --bos=True --steps=2200 \
    --init_from=out/smdm_170/ckpt.pt --out_dir=out/gsm8k # 40 times over its rows
python -m tasks.answer gsm8k out/gsm8k/ckpt.pt
