#!/usr/bin/env bash
# V-STaR on sums of 3 to 5 digits by the model in this package, which knows those of 2: the verifier's choice
# among 16 candidates beside the majority, with the paper's baselines and an outcome reward model.
#
#   bash recipes/vstar_arithmetic.sh [OUT] [SEED]
set -eu
out=${1:-runs/vstar_arithmetic}
seed=${2:-0}
selftaught vstar --out "$out" --seed "$seed" --task_options "{digits: 3-5, train: 300, test: 200, seed: $seed}" \
    --k 16 --iterations 3 --candidates 16 --temperature 1.0 --seed_samples 4 --learning_rate 3e-4 \
    --verifier_learning_rate 3e-4 --verifier_epochs 2 --pairs_per_problem 16 --baselines
