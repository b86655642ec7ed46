"""The curriculum of Fast Quiet-STaR: thoughts and lookahead that shrink from stage to stage.

Huang et al. 2025 (arXiv:2505.17746) train with 16 thought tokens and 8 lookahead tokens at a
learning rate of 2e-6, then with 12 and 4, and 8 and 4, at 1e-6. Each stage starts from the model of the
stage before.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase, TrainingArguments

from selftaught.quiet.checkpoint import open_quiet
from selftaught.quiet.model import QuietLM
from selftaught.quiet.spans import Spans
from selftaught.quiet.training import train_quiet

LATER_RATE = 0.5
"""Learning rate of all stages after the first, as a multiple of that of the first (the paper)."""


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


def train_stages(
    model: QuietLM,
    tokenizer: PreTrainedTokenizerBase,
    spans: Spans,
    stages: Sequence[Stage],
    arguments: Callable[[Path, float], TrainingArguments],
    *,
    out: Path,
    progress: Callable[[int], object] | None = None,
) -> list[dict[str, float]]:
    """Train with one stage after another; the same call continues an interrupted training.

    Args:
        model: the model to train, changed in place in the first stage.
        tokenizer: its tokenizer.
        spans: the training data of every stage.
        stages: at least one stage.
        arguments: returns the training arguments for a folder of checkpoints and a factor of the
            learning rate.
        out: run folder. All stages but the last have their own run folders in it, `stage-1` and so
            on. The model of the last stage is `out/model`.
        progress: called with the number of new optimizer steps.

    Returns:
        The logged metrics of all stages, with the number of the stage and with steps counted
        through.

    Raises:
        ValueError: `out` belongs to another training, or a loss is not finite.
    """
    history: list[dict[str, float]] = []
    for number, stage in enumerate(stages, 1):
        model.quiet_config = replace(model.quiet_config, thought_tokens=stage.thought_tokens, lookahead=stage.lookahead)  # fmt: skip
        last = number == len(stages)
        folder = out if last else out / f"stage-{number}"
        rate = 1.0 if number == 1 else LATER_RATE
        log = train_quiet(
            model, tokenizer, spans, arguments(folder / "checkpoints", rate), out=folder,
            progress=progress,
        )  # fmt: skip
        before = history[-1]["step"] if history else 0
        history += [{**entry, "stage": number, "step": entry["step"] + before} for entry in log]
        if not last:
            device = model.base.device
            model, tokenizer = open_quiet(folder / "model", dtype="float32")
            model.to(device)
    return history
