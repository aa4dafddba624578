#!/usr/bin/env bash
# The four losses on two corpora, three seeds each: one CPU core, an hour (estimated).
# Usage: runs/compare.sh tinyshakespeare.txt
set -euo pipefail
export OMP_NUM_THREADS=1
text=$1

python -m tasks.compare --steps=600 --eval_every=100 --lr_decay=linear
python data/prepare.py text --input "$text" --out tinyshakespeare
python -m tasks.compare --data=tinyshakespeare --steps=600 --eval_every=100 --lr_decay=linear \
    --out_dir=out/compare_tinyshakespeare
