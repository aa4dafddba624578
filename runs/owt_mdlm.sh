#!/usr/bin/env bash
# MDLM on OpenWebText: 8 GPUs, days (estimated; not run yet). Continues if it was stopped.
set -euo pipefail

[ -d data/openwebtext_wrap1024 ] || python data/prepare.py openwebtext --wrap 1024
torchrun --nproc_per_node=8 train.py owt_mdlm --resume
python evaluate.py out/owt_mdlm/ckpt.pt --split val
python evaluate.py out/owt_mdlm/ckpt.pt --zero_shot
python sample.py out/owt_mdlm/ckpt.pt --num 4 \
    --infill "Once upon a time ____ and so [12] ever after."
