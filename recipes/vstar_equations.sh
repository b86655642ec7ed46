#!/usr/bin/env bash
# V-STaR where seeing whether an answer is right is easier than finding it: equations that are guessed and then
# worked out. The verifier's choice among 16 candidates beside greedy answers and the majority, the paper's baselines,
# an outcome reward model, and verifiers of one, two and three iterations.
#
#   bash recipes/vstar_equations.sh [OUT] [SEED]
set -eu
here=$(dirname "$0")
out=${1:-runs/vstar_equations}
seed=${2:-0}
[ -f "$out/base/config.json" ] || python "$here/guessed_equations.py" "$out" --seed "$seed"
selftaught vstar --config "$here/vstar_equations.yaml" --model "$out/base" --seed "$seed" --out "$out/vstar" \
    --task_options "{path: $out/questions/train.jsonl, validation: $out/questions/validation.jsonl,
        test: $out/questions/test.jsonl, id: id, rationale: rationale, max_tokens: 48}"
