#!/usr/bin/env bash
# Per-step DPO where wrong answers come from shortcuts. From RFT's model, with settings found on another seed: pairs at
# the first pit, at random and of largest edit distance, beside RFT on the same samples and SFT on up to eight times
# the questions. Then from pi_sft with beta 0.1 and DPO's loss alone: the paper's start, TRL's default beta.
#
#   bash recipes/step_dpo_shortcuts.sh [OUT] [SEED]
#
# Measured 2026-11-26 at commit ac53754, seeds 0, 1 and 2, one thread each of 2 AMD EPYC cores (AVX-512), other jobs beside
# them; 11 to 13 minutes a seed after the base's 7. 500 test questions per seed, greedy; mean of the seeds with its 95%
# interval over questions, the seeds, and how many times the questions SFT would need (python recipes/pooled.py):
#
#   SFT, 500 questions             52.5% [49.9, 55.0]   48.2  55.6  53.6
#   RFT                            69.3% [67.0, 71.6]   59.4  68.6  80.0   1.9 [1.7, 2.1]
#   then per-step DPO              77.4% [75.2, 79.4]   69.4  81.0  81.8   2.6 [2.4, 2.9]
#   then DPO, random pairs         79.0% [76.9, 81.0]   71.8  83.8  81.4   2.8 [2.5, 3.2]
#   then DPO, most distant pairs   76.7% [74.5, 78.7]   67.6  85.4  77.0   2.6 [2.3, 2.9]
#   from pi_sft: per-step DPO      65.2% [62.8, 67.6]   53.6  78.6  63.4   1.6 [1.4, 1.8]
#   from pi_sft: random pairs      44.8% [42.3, 47.3]   39.4  55.2  39.8   1
#
# The samples and continuations of the second half were taken over from the first, whose pi_sft and seed they share.
set -eu
here=$(dirname "$0")
out=${1:-runs/step_dpo_shortcuts}
seed=${2:-0}
[ -f "$out/base/config.json" ] || python "$here/shortcut_sums.py" "$out" --seed "$seed"
learn() {
    selftaught step-dpo --config "$here/step_dpo_shortcuts.yaml" --model "$out/base" --seed "$seed" \
        --task-options "{path: $out/questions/train.jsonl, validation: $out/questions/validation.jsonl,
            test: $out/questions/test.jsonl, id: id, rationale: rationale, max_tokens: 192}" "$@"
}
learn --out "$out/step_dpo"
learn --out "$out/defaults" --start sft --beta 0.1 --dpo-epochs 1 --dpo-training '{}' --sft-sizes '[]' \
    --methods '[rft, step_dpo, dpo]'
