"""The command `selftaught quiet train`: its checks, the plan of a dry run, and the training."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from selftaught.cli.output import locked_run, say
from selftaught.cli.quiet_model import (
    ModelOptions,
    check_fits,
    check_least,
    device,
    open_trained,
    pattern_of,
)
from selftaught.cli.quiet_think import legibility_table, measured_table
from selftaught.cli.texts import TextOptions, texts_of
from selftaught.option_groups import TrackerOptions
from selftaught.quiet.config import QuietConfig
from selftaught.records import write_atomically
from selftaught.runs.trackers import trainer_reports
from selftaught.safety.options import ExcludeOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from selftaught.quiet.curriculum import Stage
    from selftaught.quiet.evaluation import Measured
    from selftaught.quiet.model import QuietLM
    from selftaught.quiet.spans import Spans
    from selftaught.quiet.thought_filter import ThoughtFilter
    from selftaught.quiet.training import PeftModel
    from selftaught.runs.folder import ProgressReporter
    from selftaught.safety.checks import Checks

TEXTS = {"initial_text", "start_token", "end_token", "positions_pattern"}
"""Options of Quiet-STaR that are texts."""
ALL_IN_FILE = {one.name for one in fields(QuietConfig)} - TEXTS - {"thought_tokens", "lookahead"}
"""Options of Quiet-STaR that the `config.yaml` of every training has."""
MEASURED = 64
"""Maximum number of held-out spans that are measured after training."""


@dataclass(frozen=True)
class PresetOptions:
    """The options of Quiet-STaR."""

    heading: ClassVar[str] = "thinking"

    preset: Literal["default", "paper", "authors_code", "rlp"] = "default"
    """Source of the Quiet-STaR options that `--quiet` does not set: the "default" values of this
    package (for small models), the "paper", "authors_code", or "rlp" (RLP, a successor of
    Quiet-STaR, with a constant learning rate). The `config.yaml` of a run has all values under `quiet`,
    and "default" here."""
    quiet: dict[str, Any] = field(default_factory=dict, metadata={"fields_of": QuietConfig})
    """Options of the thoughts and their training. The defaults shown below are those of the preset
    "default"."""


@dataclass(frozen=True)
class RunOptions:
    """The run folder."""

    heading: ClassVar[str] = "run"

    out: Path = Path("runs/quiet")
    """Run folder. Repeating the same command continues an interrupted training."""
    held_out: int = 32
    """Number of texts at the end that are used only for evaluation, at most a fifth of all
    texts."""
    seed: int = 0
    """Random seed for spans, thoughts and new weights."""
    save_steps: int = 50
    """Number of optimizer steps between checkpoints."""
    perplexity_steps: int = 0
    """Number of optimizer steps between measurements of the perplexity of thoughts under the model as
    it was at the start of training, for the page. It needs a copy of the trained weights. 0: only
    after training. With `thought_kl_weight`, it is measured at every step."""


@dataclass(frozen=True)
class StepOptions(TrackerOptions):
    """Optimizer steps. `--training.NAME VALUE` sets any other field of `TrainingArguments`."""

    heading: ClassVar[str] = "training"

    max_steps: int = -1
    """Number of optimizer steps. -1: set by `num_train_epochs`."""
    num_train_epochs: float = 1.0
    """Number of passes over the texts."""
    learning_rate: float | None = None
    """Peak learning rate. Default: 1e-5, or 1e-6 with another preset (published for models with
    1.7 to 12 billion parameters). A model with a million parameters learned at 2e-4."""
    per_device_train_batch_size: int = 8
    """Number of spans per device and forward pass. 8 in the paper."""
    gradient_accumulation_steps: int = 1
    """Number of batches per optimizer step."""
    bf16: bool = False
    """Compute in bfloat16. The weights stay in float32."""
    training: dict[str, Any] = field(default_factory=dict)
    """Any other field of transformers' `TrainingArguments`, such as `--training.weight_decay 0.1`."""


@dataclass(frozen=True)
class TrainOptions(
    ExcludeOptions, StepOptions, RunOptions, PresetOptions, ModelOptions, TextOptions
):
    """Training."""

    heading: ClassVar[str] = "training"

    curriculum: list[str] = field(default_factory=list)
    """Stages as THOUGHT_TOKENS/LOOKAHEAD, such as `16/8 12/4 8/4` (Fast Quiet-STaR). Each stage has
    `max_steps` steps and starts from the model of the stage before; the learning rate of
    all stages after the first is half of `learning_rate`. Not with `use_peft`."""
    use_peft: bool = False
    """Train a LoRA adapter and the embeddings of the two thought tokens, and merge them into the
    model, instead of training all weights."""
    lora_r: int = 16
    """Rank of the LoRA adapter."""
    lora_alpha: int = 32
    """Scaling factor of the LoRA adapter."""
    lora_target_modules: str = "all-linear"
    """Layers that get an adapter: "all-linear", or layer names separated by commas."""


@dataclass(frozen=True)
class Prepared:
    """A training whose options, model and texts have been checked."""

    how: TrainOptions
    model: "QuietLM"
    config: QuietConfig
    """The options of the thoughts; in a curriculum, of its first stage."""
    tokenizer: "PreTrainedTokenizerBase"
    spans: "Spans"
    """The training data."""
    held_out: "Spans"
    """The texts that are used only for evaluation."""
    arguments: "TrainingArguments"
    stages: "list[Stage]"
    """The stages of the curriculum, if there is one."""
    checks: "Checks | None" = None
    """The checks of thoughts, with `exclude_flagged`."""


def prepared(how: TrainOptions) -> Prepared:
    """Check the options, open the model and read the texts. Nothing is written.

    Raises:
        ValueError: an option, the model or a text cannot be used; the message names it.
        OSError: a file or the model does not exist.
    """
    from transformers.trainer_utils import set_seed
    from transformers.utils import logging

    from selftaught.quiet.spans import Spans, spans
    from selftaught.quiet.training import quiet_arguments
    from selftaught.quiet.where import check_matches, training_matcher

    logging.disable_progress_bar()
    checks = _checks(how)
    check_least(2, length=how.length)
    check_least(0, held_out=how.held_out, seed=how.seed, perplexity_steps=how.perplexity_steps)
    check_least(1, per_device_train_batch_size=how.per_device_train_batch_size, gradient_accumulation_steps=how.gradient_accumulation_steps,
              save_steps=how.save_steps, lora_r=how.lora_r)  # fmt: skip
    set_seed(how.seed)
    model, tokenizer = opened_to_train(how)
    stages = _stages(how, model)
    config = model.quiet_config
    if why := config.without_reinforcement:
        raise ValueError(why)
    check_fits(model, how.length + config.lookahead, "--length or --quiet.thought_tokens")
    least = max([config.lookahead, *(stage.lookahead for stage in stages)]) + 2
    texts = spans(texts_of(how), tokenizer, length=how.length, least=least, seed=how.seed)
    taught = len(texts.texts) - min(how.held_out, len(texts.texts) // 5)
    train_spans = Spans(texts.texts[:taught], how.length, how.seed, skipped=texts.skipped)
    held_out = Spans(texts.texts[taught:], how.length)
    if matcher := training_matcher(config, tokenizer):
        check_matches(matcher, tokenizer, train_spans.texts)
    arguments = quiet_arguments(how.out / "checkpoints", **_trainer_options(how))
    return Prepared(how, model, config, tokenizer, train_spans, held_out, arguments, stages, checks)


def _stages(how: TrainOptions, model: "QuietLM") -> "list[Stage]":
    """Return the stages of the curriculum, and give the model the thoughts of the first."""
    from selftaught.quiet.curriculum import check_stage_folders, check_stages, stages_of

    stages = stages_of(how.curriculum)
    if not stages:
        return []
    if how.use_peft:
        raise ValueError(
            "--curriculum trains all weights, because every stage starts from the merged model of the "
            "stage before. Leave out --use-peft, or train the stages one by one with --model."
        )
    if given := sorted({"thought_tokens", "lookahead"} & set(how.quiet)):
        raise ValueError(
            f"--curriculum sets thought_tokens and lookahead; got --quiet.{given[0]}, too. Leave it out, or remove it from the file of --config."
        )
    check_stages(model, stages, how.length)
    check_stage_folders(how.out, stages)
    first = stages[0]
    for stage in stages:
        config = replace(model.quiet_config, thought_tokens=stage.thought_tokens, lookahead=stage.lookahead)  # fmt: skip
        if why := config.without_reinforcement:
            raise ValueError(
                f"Stage {stage.thought_tokens}/{stage.lookahead} of the curriculum: {why}"
            )
    model.quiet_config = replace(model.quiet_config, thought_tokens=first.thought_tokens, lookahead=first.lookahead)  # fmt: skip
    return stages


def trainer_options(how: StepOptions, rate: float) -> dict[str, Any]:
    """Return the options that transformers' `TrainingArguments` takes.

    Args:
        how: options of a command, of which `seed` and `save_steps` are taken, too.
        rate: the default learning rate.
    """
    names = {one.name for one in fields(StepOptions)} - {"training", "report_to"} | {
        "seed",
        "save_steps",
    }
    options = {name: value for name, value in asdict(how).items() if name in names}
    return (
        options
        | {"learning_rate": rate if how.learning_rate is None else how.learning_rate}
        | trainer_reports(how.report_to, how.training)
        | how.training
    )


def _trainer_options(how: TrainOptions) -> dict[str, Any]:
    options = trainer_options(how, 1e-5 if how.preset == "default" else 1e-6)
    return options | _schedule(how) | how.training


def _schedule(how: TrainOptions) -> dict[str, Any]:
    """Return the options of the preset for transformers' `TrainingArguments`."""
    # RLP has a constant learning rate (arXiv:2510.01265).
    return {"lr_scheduler_type": "constant"} if how.preset == "rlp" else {}


def adapted(how: TrainOptions, model: "QuietLM") -> "PeftModel | None":
    """Add the LoRA adapter that the options ask for to the model, and return it."""
    from selftaught.quiet.training import with_lora

    if not how.use_peft:
        return None
    return with_lora(
        model, r=how.lora_r, alpha=how.lora_alpha, target_modules=how.lora_target_modules
    )


def train(how: TrainOptions) -> bool:
    """Train a model, measure it, write its page and its card, and print a summary.

    Returns:
        Whether this is the main process, which writes the results.
    """
    from selftaught.cli.training_cards import write_quiet_card
    from selftaught.quiet.curriculum import train_stages
    from selftaught.quiet.evaluation import measure
    from selftaught.quiet.gating import ThinkWhen
    from selftaught.quiet.reference import Reference
    from selftaught.quiet.spans import consecutive
    from selftaught.quiet.training import train_quiet
    from selftaught.reports.quiet_page import training_page
    from selftaught.runs.folder import remember

    ready = prepared(how)
    model, main = ready.model, ready.arguments.process_index == 0
    held_out = consecutive(ready.held_out)[:MEASURED]
    before = after = None
    if held_out and main:
        before = measure(model, held_out, think_when=ThinkWhen("never"))
    peft_model = adapted(how, model)
    if how.perplexity_steps:
        model.reference = Reference.frozen(model, every=how.perplexity_steps)
    total = max(how.max_steps, 0) * max(1, len(ready.stages))
    with (
        thought_filter(ready) as filtered,
        tracked(how.out, "Quiet-STaR", main=main) as reporter,
        reporter.progress("training", total) as advance,
    ):
        if ready.stages:
            log = train_stages(
                model, ready.tokenizer, ready.spans, ready.stages, _stage_arguments(how),
                out=how.out, progress=advance, thought_filter=filtered,
            )  # fmt: skip
        else:
            log = train_quiet(
                model, ready.tokenizer, ready.spans, ready.arguments, out=how.out,
                peft_model=peft_model, progress=advance, thought_filter=filtered,
            )  # fmt: skip
    if not main:
        return False
    if held_out:
        trained = str(how.out / "model")
        after = _stored(how.out / "after.json", lambda: _measured(how, trained, held_out))
    skipped = ready.spans.skipped
    config = model.quiet_config
    if ready.stages:
        last = ready.stages[-1]
        config = replace(config, thought_tokens=last.thought_tokens, lookahead=last.lookahead)
    curriculum = {"curriculum": " ".join(how.curriculum)} if how.curriculum else {}
    settings = {"model": how.model, "text": how.text, **curriculum, **asdict(config), "learning_rate": ready.arguments.learning_rate,
                "spans": len(ready.spans), "texts skipped": skipped}  # fmt: skip
    resolved = _resolved(how, ready)
    remember(resolved, how.out)
    write_quiet_card(resolved, log, len(ready.spans), before, after)
    training_page(how.out, log, settings, before, after)
    measured = {"before, without thoughts": before, "after": after} if before and after else {}
    _print_summary(how.out, log, measured, skipped)
    return True


@contextmanager
def thought_filter(ready: Prepared) -> "Iterator[ThoughtFilter | None]":
    """Yield the checks of thoughts, if the options ask for them, and close them at the end."""
    from selftaught.quiet.thought_filter import ThoughtFilter

    if ready.checks is None:
        yield None
        return
    with ready.checks as checks:

        def flagging(texts: Sequence[str]) -> list[bool]:
            return [bool(findings) for findings in checks.find(texts)]

        yield ThoughtFilter(ready.tokenizer, flagging, checks.key)


def _checks(how: TrainOptions) -> "Checks | None":
    """Return the checks of thoughts that the options ask for."""
    if not how.exclude_flagged:
        return None
    from selftaught.safety.checks import check_given, open_checks

    check_given(how, "thoughts, which are sampled without a hint")
    return open_checks(how)


def _resolved(how: TrainOptions, ready: Prepared) -> TrainOptions:
    """Return the options with the values of the preset and the learning rate written out.

    `--config` with the result repeats the training when a default of the package has changed.
    """
    import yaml

    from selftaught.quiet.checkpoint import is_quiet

    quiet, training = {}, how.training
    if not is_quiet(Path(how.model)):  # a trained model has its own options, and refuses others
        quiet = asdict(ready.config)
        for name in ("thought_tokens", "lookahead") if ready.stages else ():
            del quiet[name]  # --curriculum says them
        if how.pattern or how.task or quiet["positions_pattern"] is None:
            del quiet["positions_pattern"]
        # The values of a dictionary are read as YAML twice, and "---" is not itself in YAML.
        quiet = {
            name: value for name, value in quiet.items()
            if not isinstance(value, str) or yaml.safe_load(value) == value
        }  # fmt: skip
        training = _schedule(how) | training
        how = replace(how, preset="default")  # which has no effect beside all its options
    return replace(how, quiet=quiet, training=training, learning_rate=ready.arguments.learning_rate)


def _stage_arguments(how: TrainOptions) -> "Callable[[Path, int], TrainingArguments]":
    """Return what makes the training arguments of a stage from its folder and number."""
    from selftaught.quiet.curriculum import stage_rate
    from selftaught.quiet.training import quiet_arguments

    options = _trainer_options(how)

    def arguments(folder: Path, number: int) -> "TrainingArguments":
        own = {"learning_rate": stage_rate(options["learning_rate"], number), "seed": how.seed + number - 1}  # fmt: skip
        return quiet_arguments(folder, **(options | own))

    return arguments


@contextmanager
def tracked(out: Path, method: str, *, main: bool) -> "Iterator[ProgressReporter]":
    """Lock the run folder and yield progress callbacks. Only the main process does anything."""
    if main:
        with locked_run(out, method) as reporter:
            yield reporter
        return
    from selftaught.runs.folder import ProgressReporter

    yield ProgressReporter()


def opened_to_train(how: TrainOptions) -> "tuple[QuietLM, PreTrainedTokenizerBase]":
    """Return a new Quiet-STaR model around the base model, or open a trained one.

    Raises:
        ValueError: the model or an option of Quiet-STaR cannot be used; the message names it.
        OSError: the model does not exist.
    """
    from transformers import AutoTokenizer

    from selftaught.models.embedded import embedded_model
    from selftaught.options import check_names
    from selftaught.quiet.checkpoint import is_quiet, make_quiet, open_quiet
    from selftaught.samplers.weights import load_model

    pattern = pattern_of(how, "--quiet.positions", how.quiet.get("positions"))
    if is_quiet(Path(how.model)):
        if how.quiet or how.preset != "default":
            raise ValueError(
                f"{how.model} is a trained Quiet-STaR model, which has its own options. "
                "Leave out --preset and --quiet (also in the file of --config), or start from a model "
                "without thoughts."
            )
        opened, tokenizer = open_quiet(Path(how.model), dtype="float32")
        return opened.to(device()), tokenizer
    if how.preset != "default" and how.quiet.keys() >= ALL_IN_FILE:
        raise ValueError(
            f"--config sets every option of the thoughts, so --preset {how.preset} would have no effect. "
            "Leave out --preset, or remove the section `quiet` from the file."
        )
    preset = QuietConfig if how.preset == "default" else getattr(QuietConfig, how.preset)
    check_names("Quiet-STaR (--quiet.NAME VALUE)", QuietConfig, how.quiet)
    for name in TEXTS & how.quiet.keys():
        if not isinstance(how.quiet[name], str):
            use = (
                "Use --pattern"
                if name == "positions_pattern"
                else "Choose a text that YAML leaves as it is"
            )
            raise ValueError(
                f"Expected text for --quiet.{name}, got {how.quiet[name]!r}, because it was read as "
                f"YAML. {use}."
            )
    if how.pattern and "positions_pattern" in how.quiet:
        raise ValueError(
            "Expected one pattern, got --pattern and --quiet.positions_pattern. Use --pattern."
        )
    given: dict[str, Any] = {} if pattern is None else {"positions_pattern": pattern}
    try:
        config = preset(**how.quiet | given)
    except TypeError as error:
        raise ValueError(f"The preset {how.preset!r} does not accept --quiet: {error}.") from None
    name = str(embedded_model()) if how.model == "embedded" else how.model
    base = load_model(name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(name)
    return make_quiet(base.to(device()), tokenizer, config), tokenizer


def _measured(
    how: TrainOptions, model: str, held_out: Sequence[tuple[int, Sequence[int]]]
) -> "Measured":
    """Measure a trained model, with thoughts where it was trained to think.

    The model before training is opened once more, for the perplexity of the thoughts under it.
    """
    from selftaught.quiet.evaluation import measure
    from selftaught.quiet.gating import ThinkWhen
    from selftaught.quiet.reference import Reference

    opened, tokenizer = open_trained(model)
    reference = Reference.other(opened_to_train(how)[0].eval())
    return measure(opened, held_out, think_when=ThinkWhen(tokenizer=tokenizer), reference=reference)


def _stored(path: Path, measure: "Callable[[], Measured]") -> "Measured":
    """Return the measurement stored in `path`, or measure now and store the result there."""
    from selftaught.quiet.evaluation import Measured

    if path.exists():
        return Measured.from_dict(json.loads(path.read_text(encoding="utf-8")))
    found = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found.to_dict(), indent=2) + "\n")
    return found


def _print_summary(
    out: Path, log: list[dict[str, float]], measured: "dict[str, Measured]", skipped: int
) -> None:
    if skipped:
        print(f"{skipped} texts were too short and were skipped.")
    if last := next((row for row in reversed(log) if "nll_with" in row), None):
        print(f"{last['step']:.0f} steps; last step: {last['nll_without']:.3f} nats per token without thoughts, "
              f"{last['nll_with']:.3f} with thoughts, {last['tokens_per_second']:.0f} tokens/s.")  # fmt: skip
    if measured:
        print(measured_table(measured))
        if readable := legibility_table(measured):
            print(f"\n{readable}")
    say(f"Model   {out / 'model'}\nPage    {out / 'report.html'}")
    say(f"Next    selftaught quiet explore --model {out / 'model'} --text FILE")
