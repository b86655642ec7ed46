"""The command `selftaught quiet distill`: a plain model that predicts what a thinking model predicts."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from selftaught.cli.output import say
from selftaught.cli.quiet_model import check_fits, check_least, open_trained
from selftaught.cli.quiet_think import ThinkOptions, thinking
from selftaught.cli.quiet_train import MEASURED, RunOptions, StepOptions, tracked, trainer_options
from selftaught.cli.texts import TextOptions, texts_of
from selftaught.records import write_atomically

if TYPE_CHECKING:
    from selftaught.quiet.distillation import GainKept


@dataclass(frozen=True)
class DistillOptions(StepOptions, RunOptions, ThinkOptions, TextOptions):
    """Distillation, the last stage of Fast Quiet-STaR."""

    heading: ClassVar[str] = "training"

    out: Path = Path("runs/quiet_distilled")
    """Run folder. Repeating the same command continues an interrupted training."""
    seed: int = 0
    """Random seed for spans and thoughts."""
    learning_rate: float | None = None
    """Peak learning rate. Default: 1e-6 (the paper, for a model with 7 billion parameters)."""
    loss: Literal["kl", "reward"] = "kl"
    """Loss of the plain model (the student): "kl", the KL divergence from the prediction of the
    trained model (the teacher), over the whole vocabulary; or "reward", the next-token loss times the
    gain of the teacher over the student, at least 0 (a variant of the loss of Fast Quiet-STaR)."""


def distill(how: DistillOptions) -> bool:
    """Train a plain model, measure it beside its teacher, and print a summary.

    Returns:
        Whether this is the main process, which writes the results.

    Raises:
        ValueError: an option, the model or a text cannot be used; the message names it.
    """
    from selftaught.cli.training_cards import write_distilled_card
    from selftaught.quiet import distillation
    from selftaught.quiet.spans import Spans, consecutive, spans
    from selftaught.quiet.training import quiet_arguments
    from selftaught.runs.folder import remember
    from selftaught.samplers.weights import load_model

    check_least(2, length=how.length)
    check_least(0, held_out=how.held_out, seed=how.seed)
    check_least(1, per_device_train_batch_size=how.per_device_train_batch_size, gradient_accumulation_steps=how.gradient_accumulation_steps,
              save_steps=how.save_steps)  # fmt: skip
    teacher, tokenizer = open_trained(how.model)
    when = thinking(how, tokenizer)
    teacher.float()
    check_fits(teacher, how.length, "--length")
    least = (
        teacher.quiet_config.lookahead + 2
    )  # as in training, so that the same texts are held out
    texts = spans(texts_of(how), tokenizer, length=how.length, least=least, seed=how.seed)
    taught = len(texts.texts) - min(how.held_out, len(texts.texts) // 5)
    learned = Spans(texts.texts[:taught], how.length, how.seed, skipped=texts.skipped)
    held_out = consecutive(Spans(texts.texts[taught:], how.length))[:MEASURED]
    arguments = quiet_arguments(how.out / "checkpoints", **trainer_options(how, 1e-6))
    main = arguments.process_index == 0
    with (
        tracked(how.out, "distillation", main=main) as reporter,
        reporter.progress("training", max(how.max_steps, 0)) as advance,
    ):
        log = distillation.distill(
            teacher, tokenizer, learned, arguments, out=how.out, how=when, loss=how.loss,
            progress=advance,
        )  # fmt: skip
    if not main:
        return False
    resolved, found = replace(how, learning_rate=arguments.learning_rate), None
    remember(resolved, how.out)
    if held_out:
        student = load_model(how.out / "model", dtype="float32").to(teacher.base.device)
        found = distillation.gain_kept(student, teacher, held_out, when)
        write_atomically(how.out / "kept.json", json.dumps(asdict(found), indent=2) + "\n")
        print(kept_table(found))
    write_distilled_card(resolved, log, len(learned), found)
    say(f"Model   {how.out / 'model'}")
    say(f"Next    selftaught evaluate --model {how.out / 'model'} --task TASK")
    return True


def kept_table(found: "GainKept") -> str:
    """Return the losses of base, teacher and student as a Markdown table, and the gain kept."""
    rows = (
        ("base model of the teacher", found.nll_base),
        ("teacher, with thoughts", found.nll_teacher),
        ("student, without thoughts", found.nll_student),
    )
    lines = [f"| {found.tokens} held-out tokens | nats/token |", "|---|---|"]
    lines += [f"| {name} | {value:.4f} |" for name, value in rows]
    if found.kept == found.kept:  # not NaN
        kept = f"Gain kept: {found.kept:.0%} [{found.kept_low:.0%}, {found.kept_high:.0%}]"
    else:
        kept = "Gain kept: unknown, because the teacher is not better with thoughts on these texts."
    return "\n".join([*lines, "", kept])
