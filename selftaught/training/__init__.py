"""Fine-tuning: examples or preferences in, a model folder out. The only package that imports TRL.

Rows are tokenized here and not by TRL, for two reasons. TRL truncates a row that is too long at its
end, where the answer is, without a warning. It also appends an end-of-text token to both sides of a
preference. Here, rows that are too long are dropped and counted.
"""

from selftaught.training.completion_tokens import completion_ids, open_tokenizer, written_ids
from selftaught.training.dpo import dpo_config, preference_rows, train_dpo
from selftaught.training.options import check_lora
from selftaught.training.outcome import LabeledCompletion, outcome_config, train_outcome
from selftaught.training.sft import sft_config, tokenized, train_rows, train_sft
from selftaught.training.trainer import Training, lora_config
from selftaught.training.weighted import train_weighted

__all__ = [
    "LabeledCompletion",
    "Training",
    "check_lora",
    "completion_ids",
    "dpo_config",
    "lora_config",
    "open_tokenizer",
    "outcome_config",
    "preference_rows",
    "sft_config",
    "tokenized",
    "train_dpo",
    "train_outcome",
    "train_rows",
    "train_sft",
    "train_weighted",
    "written_ids",
]
