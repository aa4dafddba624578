#!/usr/bin/env bash
# Upstream's recipes in small beside ours, three seeds each: two CPU cores, an hour (estimated).
# Usage: runs/recipes.sh CLONES TEXT VOCAB: the folder of the repositories (see tasks.peers), any
# plain text such as tinyshakespeare.txt, and bert-base-uncased's vocab.txt or tokenizer.json.
set -euo pipefail
clones=$1 text=$2 vocab=$3 folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python -m tasks.recipes split --text "$text" --folder "$folder"
python data/prepare.py text --input "$folder/letters.txt" --tokenizer char --out letters
python data/prepare.py openwebtext --input "$folder/documents.jsonl" --wrap 64 --val_docs 500 \
    --out wrapped
python data/prepare.py lm1b --input "$folder"/news.* --wrap 32 --val_docs 1000 --vocab "$vocab" \
    --out lines
[ -d data/pydocs ] || python data/prepare.py pydocs
for seed in 1 2 3; do
    for recipe in text8_mdlm text8_d3pm lm1b_mdlm owt_mdlm smdm_6; do
        python -m tasks.recipes run $recipe --clones "$clones" --seed $seed
    done
done
python -m tasks.recipes table --svg assets/recipes.svg
