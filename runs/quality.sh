#!/usr/bin/env bash
# Quality against network calls, after the demo and compare.sh: two cores, an hour (estimated).
set -euo pipefail

python -m tasks.quality out/pydocs_mdlm/ckpt.pt --judge out/compare_pydocs_mdlm/ar_1/ckpt.pt \
    --num 32 --steps 8 16 32 64 128 256 --dtype auto --png quality.png \
    --samplers ddpm_cache remdm_cap confidence threshold entropy_bound
