#!/usr/bin/env bash
# RFT on sums of four numbers, which have many right solutions: accuracy and distinct paths against k, with
# three baselines. The base and its 500 questions are made first (recipes/chain_sums.py).
#
#   bash recipes/rft_chain_sums.sh [OUT] [SEED]
#
# Measured 2026-11-21 at commit 5a35664, seeds 0, 1 and 2 (base, questions, sampling and training all anew), one
# thread each of 2 AMD EPYC cores (AVX2), other jobs beside them, 20 to 25 minutes a seed. 500 test questions per
# seed, greedy; mean of three seeds with its 95% interval over questions, then the seeds; right answers and distinct
# ways per training question; tokens read in training, all passes, mean of the seeds.
#
#   model                            accuracy              seeds              right  distinct   tokens
#   SFT (500 gold solutions)         28.5% [26.3, 30.8]    33.0  15.6  36.8      -      -     113,000
#   RFT, k=1                         30.4% [28.2, 32.8]    36.6  16.8  37.8    0.30   0.26     141,000
#   RFT, k=3                         34.9% [32.6, 37.3]    40.8  19.4  44.4    0.87   0.71     190,000
#   RFT, k=6                         39.3% [36.9, 41.7]    45.4  21.6  50.8    1.70   1.27     251,000
#   RFT, k=12                        44.5% [42.1, 46.9]    49.0  25.0  59.4    3.41   2.16     348,000
#   RFT, k=25                        50.4% [48.0, 52.8]    53.2  29.4  68.6    7.11   3.59     507,000
#   RFT, k=50                        59.4% [57.0, 61.7]    63.0  39.8  75.4   14.16   5.29     695,000
#   every right one, k=50            58.8% [56.4, 61.1]    64.8  35.2  76.4   14.16  12.52   1,477,000
#   as many as k=50's, at random     51.8% [49.4, 54.2]    59.4  32.4  63.6   14.16   5.29     690,000
#   gold alone, as many steps        33.1% [30.9, 35.5]    39.6  18.6  41.2      -      -     693,000
#
# Question by question (n = 1,500): RFT k=50 is 0.6 points [-1.7, +2.9] from every right one, with 2.1 times fewer tokens;
# 7.6 [5.1, 10.1] above as many at random (drawn over all questions, copies and easy questions among them);
# 26.3 [23.3, 29.2] above gold alone trained as long. Seeds of one base differ more than the intervals: their bases do.
set -eu
here=$(dirname "$0")
out=${1:-runs/chain_sums}
seed=${2:-0}
[ -f "$out/base/config.json" ] || python "$here/chain_sums.py" "$out" --seed "$seed"
selftaught rft --config "$here/rft_chain_sums.yaml" --model "$out/base" --seed "$seed" --out "$out/rft" \
    --task-options "{path: $out/questions/train.jsonl, validation: $out/questions/validation.jsonl,
        test: $out/questions/test.jsonl, id: id, rationale: rationale, max_tokens: 96}"
