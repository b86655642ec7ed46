"""The curriculum of Fast Quiet-STaR: thoughts and lookahead that shrink from stage to stage.

Huang et al. 2025 (arXiv:2505.17746) train with 16 thought tokens and 8 lookahead tokens at a
learning rate of 2e-6, then with 12 and 4, and 8 and 4, at 1e-6. Each stage starts from the model of the
stage before.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from selftaught.quiet.checkpoint import open_quiet
from selftaught.quiet.model import QuietLM
from selftaught.quiet.reference import Reference
from selftaught.quiet.spans import Spans
from selftaught.quiet.thought_filter import ThoughtFilter
from selftaught.quiet.trainer import last_checkpoint
from selftaught.quiet.training import train_quiet
from selftaught.training.options import training_steps

LATER_RATE = 0.5
"""Learning rate of all stages after the first, as a multiple of that of the first (the paper)."""


def stage_rate(rate: float, number: int) -> float:
    """Return the learning rate of a stage, numbered from 1, from that of the first."""
    return rate if number == 1 else LATER_RATE * rate


@dataclass(frozen=True)
class Stage:
    """Length of thoughts in one stage of a curriculum."""

    thought_tokens: int
    """Number of sampled tokens per thought."""
    lookahead: int
    """Number of true tokens predicted after a thought."""


def stages_of(written: Sequence[str]) -> list[Stage]:
    """Read stages such as `16/8`: thought tokens, then lookahead tokens.

    Raises:
        ValueError: a stage is not two whole numbers, or the lookahead is below 1.
    """
    stages: list[Stage] = []
    for one in written:
        parts = one.split("/")
        if len(parts) != 2 or not all(part.isdecimal() and len(part) < 7 for part in parts) or int(parts[1]) < 1:  # fmt: skip
            raise ValueError(
                "Expected stages as THOUGHT_TOKENS/LOOKAHEAD, such as 16/8, with a lookahead of at "
                f"least 1; got {one!r}."
            )
        stages.append(Stage(int(parts[0]), int(parts[1])))
    return stages


def check_stages(model: QuietLM, stages: Sequence[Stage], length: int) -> None:
    """Check that the thoughts of every stage fit into the model's context after a span.

    Args:
        model: the model.
        stages: the stages.
        length: maximum number of tokens of a span.

    Raises:
        ValueError: a stage does not fit; names it, the tokens that it needs and the limit.
    """
    for number, stage in enumerate(stages, 1):
        needed = length + stage.thought_tokens + 2 + stage.lookahead
        if model.context is not None and needed > model.context:
            raise ValueError(
                f"Stage {number} of the curriculum ({stage.thought_tokens}/{stage.lookahead}) needs "
                f"{needed} tokens of context (a span of {length}, the thought with its start and end, "
                f"and the lookahead); the model has {model.context}. Use shorter spans or thoughts."
            )


def check_stage_folders(out: Path, stages: Sequence[Stage]) -> None:
    """Check that the run folder of the last stage does not belong to another training.

    Args:
        out: run folder.
        stages: the stages.

    Raises:
        ValueError: the folder has a model or checkpoints, and the stage before the last has no model.
    """
    started = (out / "model").exists() or last_checkpoint(out / "checkpoints") is not None
    if len(stages) > 1 and started and not (out / f"stage-{len(stages) - 1}" / "model").exists():
        raise ValueError(
            f"{out} has a model or checkpoints of another training than this curriculum. Choose another "
            "folder with --out, or delete this one."
        )


def train_stages(
    model: QuietLM,
    tokenizer: PreTrainedTokenizerBase,
    spans: Spans,
    stages: Sequence[Stage],
    arguments: Callable[[Path, int], TrainingArguments],
    *,
    out: Path,
    progress: Callable[[int], object] | None = None,
    thought_filter: ThoughtFilter | None = None,
) -> list[dict[str, float]]:
    """Train with one stage after another; the same call continues an interrupted training.

    Args:
        model: the model to train, changed in place in the first stage. The thoughts of all stages are
            compared with its `reference`, or with `thought_kl_weight` to the model before the first.
        tokenizer: its tokenizer.
        spans: the training data of every stage.
        stages: at least one stage.
        arguments: returns the training arguments for a folder of checkpoints and the number of a
            stage, from 1. See `stage_rate`; the seed should be another one in every stage, so that
            the stages train on other spans if a stage is shorter than an epoch.
        out: run folder. All stages but the last have their own run folders in it, `stage-1` and so
            on. The model of the last stage is `out/model`.
        progress: called with the number of new optimizer steps.
        thought_filter: checks of thoughts; see `train_quiet`.

    Returns:
        The logged metrics of all stages, with the number of the stage and with steps counted
        through.

    Raises:
        ValueError: `out` belongs to another training, or a loss is not finite.
    """
    check_stage_folders(out, stages)
    history: list[dict[str, float]] = []
    reference = model.reference
    if reference is None and model.quiet_config.thought_kl_weight > 0:
        reference = Reference.frozen(model)
    before = 0
    for number, stage in enumerate(stages, 1):
        model.quiet_config = replace(model.quiet_config, thought_tokens=stage.thought_tokens, lookahead=stage.lookahead)  # fmt: skip
        last = number == len(stages)
        folder = out if last else out / f"stage-{number}"
        given = arguments(folder / "checkpoints", number)
        part = replace(spans, seed=spans.seed + number - 1)
        model.reference = None if reference is None else reference.within(model)
        log = train_quiet(
            model, tokenizer, part, given, out=folder, progress=progress, thought_filter=thought_filter
        )  # fmt: skip
        history += [{**entry, "stage": number, "step": entry["step"] + before} for entry in log]
        before += training_steps(len(part), given)
        if not last:
            device = model.base.device
            model, tokenizer = open_quiet(folder / "model", dtype="float32")
            model.to(device)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return history
