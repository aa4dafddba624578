#!/usr/bin/env bash
# The reversal curse, MDLM and AR from scratch, three seeds each: one CPU core, an hour (estimated).
# Usage: runs/reversal.sh FOLDER, the folder june_version_7921032488 of lukasberglund/reversal_curse
set -euo pipefail
export OMP_NUM_THREADS=1
folder=$1

python data/prepare.py reversal --tokenizer bpe \
    --input "$folder/all_prompts_train.jsonl" "$folder"/*_prompts_test.jsonl
python -m tasks.reversal
