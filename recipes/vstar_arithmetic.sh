#!/usr/bin/env bash
# V-STaR on sums of 3 to 5 digits by the model in this package, which knows those of 2: the verifier's choice
# among 16 candidates beside the majority, with the paper's baselines and an outcome reward model.
#
#   bash recipes/vstar_arithmetic.sh [OUT] [SEED]
#
# Measured 2026-11-22 at commit e4c6639, seed 0, 2 AMD EPYC cores (AVX2), stopped before the baselines; 600 test
# problems, 95% intervals: greedy 57.0% [53.0, 60.9], one of 16 candidates 47.4% [44.1, 50.7], majority 56.7%
# [52.7, 60.6], verifier 58.0% [54.0, 61.9], weighted majority 58.8% [54.8, 62.7], any 64.0% [60.1, 67.7].
set -eu
out=${1:-runs/vstar_arithmetic}
seed=${2:-0}
selftaught vstar --out "$out" --seed "$seed" --task-options "{digits: 3-5, train: 300, test: 200, seed: $seed}" \
    --k 16 --iterations 3 --candidates 16 --temperature 1.0 --seed-samples 4 --learning-rate 3e-4 \
    --verifier-learning-rate 3e-4 --verifier-epochs 2 --pairs-per-problem 16 --baselines
