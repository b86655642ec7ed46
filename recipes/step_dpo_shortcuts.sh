#!/usr/bin/env bash
# Per-step DPO where wrong answers come from shortcuts. From RFT's model, with settings found on another seed: pairs at
# the first pit, at random and of largest edit distance, beside RFT on the same samples and SFT on up to eight times
# the questions. Then from pi_sft with beta 0.1 and DPO's loss alone: the paper's start, TRL's default beta.
#
#   bash recipes/step_dpo_shortcuts.sh [OUT] [SEED]
set -eu
here=$(dirname "$0")
out=${1:-runs/step_dpo_shortcuts}
seed=${2:-0}
[ -f "$out/base/config.json" ] || python "$here/shortcut_sums.py" "$out" --seed "$seed"
learn() {
    selftaught step-dpo --config "$here/step_dpo_shortcuts.yaml" --model "$out/base" --seed "$seed" \
        --task_options "{path: $out/questions/train.jsonl, validation: $out/questions/validation.jsonl,
            test: $out/questions/test.jsonl, id: id, rationale: rationale, max_tokens: 192}" "$@"
}
learn --out "$out/step_dpo"
learn --out "$out/defaults" --start sft --beta 0.1 --dpo_epochs 1 --dpo_training '{}' --sft_sizes '[]' \
    --methods '[rft, step_dpo, dpo]'
