#!/usr/bin/env bash
# STaR on a real language model: SmolLM2-135M-Instruct on reasoning-gym's chain_sum (2-3 terms of 1-2
# digits), with few-shot and direct-answer baselines on the same problems.
#
#   bash recipes/star_smollm2_chain_sum.sh [MODEL_DIR] [RUN_DIR]
#
# NUMBERS
set -eu
model=${1:-runs/smollm2}
run=${2:-runs/star_smollm2_chain_sum}
[ -d "$model" ] || selftaught get-model smollm2 "$model"
selftaught star --config "$(dirname "$0")/star_smollm2_chain_sum.yaml" --model "$model" --out "$run"
