"""Model cards of `quiet train`, `quiet distill` and `pause train`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.records import write_atomically
from selftaught.reports import citations
from selftaught.reports.model_card import (
    Card,
    Result,
    Trained,
    base_model,
    card_text,
    changed_settings,
    command_line,
    made_with,
    text_data,
)

if TYPE_CHECKING:
    from selftaught.quiet.distillation import GainKept
    from selftaught.quiet.evaluation import Measured
    from selftaught.training import Training

UNMEASURED = float("nan")
STATED = ("out", "model", "text", "data")
"""Options that a card states elsewhere."""


def write_quiet_card(
    how: Any, log: list[dict[str, float]], spans: int,
    before: "Measured | None", after: "Measured | None",
) -> None:  # fmt: skip
    """Write the card of a model that `quiet train` made.

    Args:
        how: the `TrainOptions`, with all values written out.
        log: its log.
        spans: number of spans in the training data.
        before: measurement of the base model.
        after: measurement of the trained model.
    """
    papers = [citations.QUIET]
    if how.curriculum:
        papers.append(citations.FAST_QUIET)
    if how.preset == "rlp" or how.quiet.get("baseline") == "ema":
        papers.append(citations.RLP)
    steps = int(log[-1]["step"]) if log and "step" in log[-1] else max(how.max_steps, 0)
    card = _card(how, "Quiet-STaR", papers, Trained("this model", how.model, spans, steps, "spans of text"))  # fmt: skip
    results = [] if after is None else _quiet_results(before, after)
    _write(
        how.out / "model",
        replace(
            card, results=results, use="quiet", tags=["quiet-star"],
            lead=f"A causal language model that thinks before it predicts a token, trained with Quiet-STaR "
            f"({citations.QUIET.short}) by {made_with()}.",
            measured_by="selftaught quiet evaluate --model MODEL --text FILE",
            measured_note="FILE is a text that the model was not trained on. The results above are on the texts at the end "
            "of the training data, which were held out.",
        ),
    )  # fmt: skip


def _quiet_results(before: "Measured | None", after: "Measured") -> list[Result]:
    over = f"{after.tokens:,} tokens of {after.texts:,} held-out texts"
    found = [
        Result("gain of the thoughts, nats per token", "gain", after.gain, after.gain_low, after.gain_high, over, share=False),
        Result("loss with thoughts, nats per token", "loss", after.nll_with, UNMEASURED, UNMEASURED, over, share=False),
        Result("loss without thoughts, nats per token", "loss", after.nll_without, UNMEASURED, UNMEASURED, over,
               share=False, listed=False),
    ]  # fmt: skip
    if before is not None:
        name = "loss of the base model, nats per token"
        found.append(Result(name, "loss", before.nll_without, UNMEASURED, UNMEASURED, over, share=False, listed=False))  # fmt: skip
    return found


def write_distilled_card(
    how: Any, log: list[dict[str, float]], spans: int, found: "GainKept | None"
) -> None:
    """Write the card of a model that `quiet distill` made.

    Args:
        how: the `DistillOptions`, with all values written out.
        log: the log of the training.
        spans: number of spans in the training data.
        found: measurement of the model and its teacher.
    """
    steps = int(log[-1]["step"]) if log and "step" in log[-1] else max(how.max_steps, 0)
    trained = Trained("this model", f"the base model inside {base_model(how.model).name}", spans, steps, "spans of text")  # fmt: skip
    card = _card(how, "Fast Quiet-STaR, distillation", [citations.FAST_QUIET, citations.QUIET], trained)  # fmt: skip
    results = []
    if found is not None:
        over = f"{found.tokens:,} held-out tokens"
        results = [
            Result("share of the teacher's gain that is kept", "gain kept", found.kept, found.kept_low, found.kept_high, over),
            Result("loss, nats per token", "loss", found.nll_student, UNMEASURED, UNMEASURED, over, share=False),
            Result("loss of the teacher with thoughts", "loss", found.nll_teacher, UNMEASURED, UNMEASURED, over, share=False, listed=False),
            Result("loss of the base model", "loss", found.nll_base, UNMEASURED, UNMEASURED, over, share=False, listed=False),
        ]  # fmt: skip
        results = [one for one in results if one.value == one.value]
    _write(
        how.out / "model",
        replace(
            card, results=results, tags=["quiet-star", "distillation"],
            lead="A causal language model that predicts without thoughts what a Quiet-STaR model predicts "
            f"with thoughts ({citations.FAST_QUIET.short}), trained by {made_with()}.",
            measured_note="The training command repeats the measurement.",
        ),
    )  # fmt: skip


def write_pause_card(how: Any, done: "Training") -> None:
    """Write the card of a model that `pause train` made, with the given `TrainOptions`."""
    trained = Trained("this model", how.model, done.trained_on, done.steps, "rows")
    card = _card(how, f"pause tokens, {how.variant}", [citations.PAUSE], trained)
    _write(
        how.out,
        replace(
            card, tags=["pause-tokens", "trl"],
            lead="A causal language model with a pause token, which gives it more computation before an answer "
            f"({citations.PAUSE.short}), trained by {made_with()}.",
            measured_note="Measure the accuracy on a task, with pause tokens after the question:",
            measured_by=f"selftaught pause evaluate --model MODEL --task TASK --pauses 0 {how.pauses}",
        ),
    )  # fmt: skip


def _card(how: Any, method: str, papers: list[citations.Paper], trained: Trained) -> Card:
    """Return the parts of a card that all three commands have."""
    command = {"Q": "quiet train", "F": "quiet distill", "p": "pause train"}[method[0]]
    settings = changed_settings(how, STATED)
    data = getattr(how, "data", None)
    source = {"text": how.text} if how.text else {"data": data}
    given = {"model": how.model} | source
    base = base_model(how.model)
    return Card(
        title=f"{method}, from {base.name}",
        method=method,
        lead="",
        base=base,
        data=text_data(str(data or how.text)),
        papers=papers,
        trained=[replace(trained, start=base.name) if trained.start == how.model else trained],
        settings=settings,
        trained_by=command_line(f"selftaught {command}", given | settings),
    )


def _write(folder: Path, card: Card) -> None:
    write_atomically(folder / "README.md", card_text(card))
