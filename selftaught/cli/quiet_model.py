"""Opening Quiet-STaR models for the commands of `selftaught quiet`, and checks of their options."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selftaught.quiet.model import QuietLM
    from selftaught.samplers.local.sampler import TransformersSampler


@dataclass(frozen=True)
class ModelOptions:
    """The model."""

    heading: ClassVar[str] = "model and task"

    model: str = "embedded"
    """Hugging Face model name or model folder, "embedded" for the small model in this package, or
    the folder of a trained Quiet-STaR model."""
    task: str | None = None
    """Task whose marker of an answer ("####" for gsm8k) is used where the model thinks before an
    answer. Default: the markers `####`, `The answer is` and `\\boxed{`."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of the task."""
    pattern: str = ""
    """Regular expression of the text after which the model thinks, where it thinks after a pattern,
    or of the marker of an answer. Default: that of the training."""


def pattern_of(how: ModelOptions, option: str, chosen: object) -> str | None:
    """Return the pattern of `--pattern`, or that of the marker of `--task`. None without both.

    Args:
        how: the options.
        option: the option that says where the model thinks.
        chosen: its value.

    Raises:
        ValueError: both are given, or the model does not think where they say; or there is no such
            task.
    """
    from selftaught.tasks import open_task

    given = [f"--{name}" for name in ("pattern", "task") if getattr(how, name)]
    if not given:
        return None
    if len(given) > 1:
        raise ValueError("--pattern and --task both say where the model thinks. Leave out one.")
    rules = ("answer",) if how.task else ("pattern", "answer")
    if chosen not in rules:
        raise ValueError(
            f"{given[0]} has an effect only with {option} {' or '.join(rules)}; got {chosen!r}. Set "
            f"{option} {rules[0]}, or leave out {given[0]}."
        )
    if how.task is None:
        return how.pattern
    return f"(?i){re.escape(open_task(how.task, **how.task_options).answer_marker)}"


def open_trained(model: str) -> "tuple[QuietLM, PreTrainedTokenizerBase]":
    """Open a trained Quiet-STaR model for inference, on the GPU if there is one.

    Raises:
        ValueError: the folder is not that of a Quiet-STaR model, or a file is damaged.
    """
    from transformers.utils import logging

    from selftaught.quiet.checkpoint import open_quiet

    logging.disable_progress_bar()
    opened, tokenizer = open_quiet(Path(model))
    return opened.to(device()).eval(), tokenizer


def device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def quiet_sampler(model: str, *, batch_size: int = 32) -> "TransformersSampler":
    """Return a sampler, for any task, whose model thinks where it was trained to think.

    Args:
        model: folder of a trained Quiet-STaR model.
        batch_size: number of prompts per batch.
    """
    from selftaught.samplers.local.sampler import TransformersSampler

    opened, tokenizer = open_trained(model)
    opened.think_when = replace(opened.think_when, tokenizer=tokenizer)
    return TransformersSampler(opened, tokenizer=tokenizer, batch_size=batch_size)


def check_fits(model: "QuietLM", tokens: int, option: str) -> None:
    """Check that a text of `tokens` tokens with a thought fits into the model's context.

    Args:
        model: a Quiet-STaR model.
        tokens: number of tokens of the text.
        option: the option to change, for the message.

    Raises:
        ValueError: it does not fit, or it has fewer than two tokens.
    """
    limit, needed = model.context, tokens + model.tokens_beside
    if tokens < 2 or (limit is not None and needed > limit):
        raise ValueError(
            f"Expected at least 2 tokens of text, got {tokens}, and at most {limit} tokens with a "
            f"thought (the model's limit), got {needed}. Change {option}."
        )


def check_least(least: int, **given: float) -> None:
    """Raise ValueError for the first option whose value is below `least`."""
    for name, value in given.items():
        if value < least:
            raise ValueError(f"--{name} must be at least {least}; got {value:g}.")
