#!/usr/bin/env bash
# RFT on sums of four numbers, which have many right solutions: accuracy and distinct paths against k, with
# three baselines. The base and its 500 questions are made first (recipes/chain_sums.py).
#
#   bash recipes/rft_chain_sums.sh [OUT] [SEED]
set -eu
here=$(dirname "$0")
out=${1:-runs/chain_sums}
seed=${2:-0}
[ -f "$out/base/config.json" ] || python "$here/chain_sums.py" "$out" --seed "$seed"
selftaught rft --config "$here/rft_chain_sums.yaml" --model "$out/base" --seed "$seed" --out "$out/rft" \
    --task_options "{path: $out/questions/train.jsonl, validation: $out/questions/validation.jsonl,
        test: $out/questions/test.jsonl, id: id, rationale: rationale, max_tokens: 96}"
