#!/usr/bin/env bash
# STaR, RFT, V-STaR and per-step DPO on SmolLM2-135M-Instruct at an equal budget of sampled tokens:
# reasoning-gym's chain_sum (2-3 terms of 1-2 digits), which it gets right one time in five.
#
#   bash recipes/compare_smollm2_chain_sum.sh [MODEL_DIR] [RUN_DIR]
#
# Measured 2026-11-26 at commit ac53754, one thread of 2 AMD EPYC cores (AVX-512), bfloat16, seed 0, two hours in pieces, other
# jobs beside it; 200 test problems, greedy, 95% intervals: SFT 40.0% [33.5, 46.9], STaR 36.0% [29.7, 42.9], RFT 45.5%
# [38.7, 52.4], V-STaR 44.5% [37.8, 51.4] and by its verifier, best of 16, 50.0% [43.1, 56.9], per-step DPO 44.5% [37.8, 51.4].
set -eu
model=${1:-runs/smollm2}
run=${2:-runs/compare_smollm2_chain_sum}
[ -d "$model" ] || selftaught get-model smollm2 "$model"
selftaught compare --config "$(dirname "$0")/compare_smollm2_chain_sum.yaml" --model "$model" --out "$run"
