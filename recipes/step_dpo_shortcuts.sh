#!/usr/bin/env bash
# Per-step DPO where wrong answers come from shortcuts: RFT on the same samples, and DPO from RFT's model on pairs at the
# first pit, at random and of largest edit distance, beside SFT on up to eight times the questions.
#
#   bash recipes/step_dpo_shortcuts.sh [OUT] [SEED]
set -eu
here=$(dirname "$0")
out=${1:-runs/step_dpo_shortcuts}
seed=${2:-0}
[ -f "$out/base/config.json" ] || python "$here/shortcut_sums.py" "$out" --seed "$seed"
selftaught step-dpo --config "$here/step_dpo_shortcuts.yaml" --model "$out/base" --seed "$seed" --out "$out/step_dpo" \
    --task_options "{path: $out/questions/train.jsonl, validation: $out/questions/validation.jsonl,
        test: $out/questions/test.jsonl, id: id, rationale: rationale, max_tokens: 192}"
