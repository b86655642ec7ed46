#!/usr/bin/env bash
# V-STaR where seeing whether an answer is right is easier than finding it: equations that are guessed and then
# worked out. The verifier's choice among 16 candidates beside greedy answers and the majority, the paper's baselines,
# an outcome reward model, and verifiers of one, two and three iterations.
#
#   bash recipes/vstar_equations.sh [OUT] [SEED]
#
# Measured 2026-11-26 at commit ac53754, seeds 0, 1 and 2, one thread each of 2 AMD EPYC cores (AVX-512), other jobs beside
# them; 8 to 10 minutes a seed after the
# base's 4, and 22 on seed 0, which alone has the baselines and the table. 500 test questions per seed; mean of the
# seeds with its 95% interval over questions, then the seeds (python recipes/pooled.py OUT/vstar ...):
#
#   greedy, G_SFT                  21.0% [19.0, 23.1]   17.8  18.8  26.4
#   greedy, iteration 3            45.5% [43.0, 48.0]   42.0  44.0  50.4
#   majority of 16                 43.4% [41.0, 45.8]   39.2  40.6  50.5
#   verifier, best of 16           66.9% [64.4, 69.2]   57.4  49.2  94.0
#   any of 16                      95.6% [94.4, 96.5]   94.6  95.8  96.4
set -eu
here=$(dirname "$0")
out=${1:-runs/vstar_equations}
seed=${2:-0}
[ -f "$out/base/config.json" ] || python "$here/guessed_equations.py" "$out" --seed "$seed"
selftaught vstar --config "$here/vstar_equations.yaml" --model "$out/base" --seed "$seed" --out "$out/vstar" \
    --task-options "{path: $out/questions/train.jsonl, validation: $out/questions/validation.jsonl,
        test: $out/questions/test.jsonl, id: id, rationale: rationale, max_tokens: 48}"
