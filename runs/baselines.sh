#!/usr/bin/env bash
# SMDM's baselines under its eight tasks, 0-shot. On one GPU about an hour per model. Needs lm_eval==0.4.13.
# GPT-2 of 1.5B parameters, TinyLlama after 300,000 steps (SMDM's), and our own two kinds of model.
set -euo pipefail
tasks="lambada_standard openbookqa boolq piqa arc_easy social_iqa race hellaswag"

lm_eval --model hf --model_args pretrained=gpt2-xl,dtype=float32 \
    --tasks "${tasks// /,}" --num_fewshot 0 --batch_size 8
lm_eval --model hf --model_args \
    pretrained=TinyLlama/tinyLLaMA-v1.1-checkpoints,revision=step-300000,dtype=bfloat16 \
    --tasks "${tasks// /,}" --num_fewshot 0 --batch_size 8

for ckpt in "$@"; do  # out/smdm_1028/ckpt.pt out/smdm_1028_ar/ckpt.pt ...
    # shellcheck disable=SC2086
    python -m tasks.harness "$ckpt" --tasks $tasks --num_fewshot 0 --dtype auto
done
