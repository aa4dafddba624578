#!/usr/bin/env bash
# Speed and memory beside MDLM, nanoDD, SEDD and SMDM: two CPU cores, an hour (estimated).
# Usage: runs/peers.sh CLONES, the folder of their repositories; see python -m tasks.peers --help.
set -euo pipefail
clones=$1

python -m tasks.peers train --clones "$clones" --vocab_size 50257 --batch_size 8
python -m tasks.peers train --clones "$clones" --vocab_size 27 --batch_size 32
python -m tasks.peers sample --clones "$clones" --vocab_size 50257 --steps 64 --batch_size 4
python -m tasks.peers sample --clones "$clones" --vocab_size 27 --steps 1000 --batch_size 1
python -m tasks.peers sample --clones "$clones" --vocab_size 27 --steps 1000 --batch_size 8
