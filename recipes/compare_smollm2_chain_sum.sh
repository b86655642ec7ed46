#!/usr/bin/env bash
# STaR, RFT, V-STaR and per-step DPO on SmolLM2-135M-Instruct at an equal budget of sampled tokens:
# reasoning-gym's chain_sum (2-3 terms of 1-2 digits), which it gets right one time in five.
#
#   bash recipes/compare_smollm2_chain_sum.sh [MODEL_DIR] [RUN_DIR]
set -eu
model=${1:-runs/smollm2}
run=${2:-runs/compare_smollm2_chain_sum}
[ -d "$model" ] || selftaught get-model smollm2 "$model"
selftaught compare --config "$(dirname "$0")/compare_smollm2_chain_sum.yaml" --model "$model" --out "$run"
