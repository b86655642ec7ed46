"""The command line of Quiet-STaR: `selftaught quiet train | evaluate | generate | explore`."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.arguments import Positional, add_options, parser_of
from selftaught.cli.help import commands_help
from selftaught.cli.output import progress_bar
from selftaught.printable import printable
from selftaught.records import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selftaught.quiet.evaluation import Measured
    from selftaught.quiet.gating import ThoughtParams
    from selftaught.quiet.model import QuietLM
    from selftaught.samplers.local.sampler import TransformersSampler

ABOUT = {
    "train": "train a model to think before every token, on plain text",
    "evaluate": "measure the loss in nats per token without and with thoughts",
    "generate": "continue a text, with a thought before every new token",
    "explore": "write an HTML page that shows the thought before every token of a text",
}
MEASURED = 64
"""Maximum number of held-out spans that are measured after training."""
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], Any] | None]]


@dataclass(frozen=True)
class TextOptions:
    """The texts."""

    heading: ClassVar[str] = "text"

    text: str = ""
    """Text source: a .jsonl, .parquet or plain text file, a folder of such files, or a dataset on
    the Hugging Face Hub. Required."""
    column: str = "text"
    """Column that contains the text."""
    split: str = "train"
    """Split of a Hub dataset."""
    subset: str | None = None
    """Configuration (subset) of a Hub dataset."""
    limit: int | None = None
    """Number of texts, from the first. Default: all."""
    length: int = 256
    """Length of a span in tokens. Texts are cut into spans. 256 in the paper."""


@dataclass(frozen=True)
class ModelOptions:
    """The model."""

    heading: ClassVar[str] = "model and task"

    model: str = "embedded"
    """Hugging Face model name or model folder, "embedded" for the small model in this package, or
    the folder of a trained Quiet-STaR model."""


@dataclass(frozen=True)
class PresetOptions:
    """The options of Quiet-STaR."""

    heading: ClassVar[str] = "thinking"

    preset: Literal["default", "paper", "authors_code"] = "default"
    """Source of the Quiet-STaR options that `--quiet` does not set: the "default" values of this
    package (for small models), the "paper", or "authors_code"."""
    quiet: dict[str, Any] = field(default_factory=dict)
    """Any field of `QuietConfig`, such as `--quiet.thought_tokens 8` or `--quiet.positions
    uniform`."""


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


@dataclass(frozen=True)
class TrainOptions(RunOptions, PresetOptions, ModelOptions, TextOptions):
    """Training; other options go to transformers by `--training`."""

    heading: ClassVar[str] = "training"

    max_steps: int = -1
    """Number of optimizer steps. -1: `num_train_epochs` decides."""
    num_train_epochs: float = 1.0
    """Number of passes over the texts."""
    learning_rate: float | None = None
    """Peak learning rate. Default: 1e-5, or 1e-6 with the published presets (for a model with 7
    billion parameters). A model with a million parameters learned at 2e-4."""
    per_device_train_batch_size: int = 8
    """Number of spans per device and forward pass. 8 in the paper."""
    gradient_accumulation_steps: int = 1
    """Number of batches per optimizer step."""
    bf16: bool = False
    """Compute in bfloat16. The weights stay in float32."""
    use_peft: bool = False
    """Train a LoRA adapter and the embeddings of the two thought tokens, and merge them into the
    model, instead of training all weights."""
    lora_r: int = 16
    """Rank of the LoRA adapter."""
    lora_alpha: int = 32
    """Scaling factor of the LoRA adapter."""
    lora_target_modules: str = "all-linear"
    """Layers that get an adapter: "all-linear", or layer names separated by commas."""
    training: dict[str, Any] = field(default_factory=dict)
    """Any other field of transformers' `TrainingArguments`, such as `--training.report_to
    tensorboard`."""


@dataclass(frozen=True)
class ThinkOptions(ModelOptions):
    """How a trained model thinks."""

    heading: ClassVar[str] = "thinking"

    model: str = "runs/quiet/model"
    """Folder of a trained Quiet-STaR model."""
    thoughts: int = 1
    """Number of thoughts per position. The predictions after them are averaged."""
    thought_temperature: float = 0.0
    """Sampling temperature of thoughts. 0 means greedy decoding."""
    think_when: Literal["always", "entropy", "gate", "never"] = "always"
    """Where to think: "always", where the "entropy" of the next token is above `--threshold`, where
    the gain that the "gate" predicts is above it, or "never"."""
    threshold: float = 0.0
    """Threshold for `--think-when entropy` and `--think-when gate`, in nats."""
    seed: int = 0
    """Random seed for sampling."""


@dataclass(frozen=True)
class EvaluateOptions(ThinkOptions, TextOptions):
    """Evaluation."""

    heading: ClassVar[str] = "run"

    batch_size: int = 8
    """Number of spans per forward pass."""
    out: Path | None = None
    """JSON file for the results."""


@dataclass(frozen=True)
class GenerateOptions(ThinkOptions):
    """Generation."""

    heading: ClassVar[str] = "sampling"

    max_new_tokens: int = 256
    """Maximum number of new tokens."""
    temperature: float = 0.0
    """Sampling temperature of the text. 0 means greedy decoding."""
    stop: list[str] = field(default_factory=list)
    """Stop strings. The text ends before the first one and does not contain it."""


@dataclass(frozen=True)
class ExploreOptions(ThinkOptions, TextOptions):
    """The explorer page."""

    heading: ClassVar[str] = "run"

    tokens: int = 400
    """Maximum number of tokens of the text that are shown."""
    out: Path = Path("runs/thoughts.html")
    """HTML file to write."""


OPTIONS = {"train": TrainOptions, "evaluate": EvaluateOptions, "generate": GenerateOptions, "explore": ExploreOptions}  # fmt: skip


POSITIONAL: Mapping[str, Sequence[Positional]] = {
    "generate": [("prompt", "Text to continue. - reads it from standard input.", None)]
}


def add_arguments(command: str, parser: ArgumentParser, given: Sequence[str]) -> Sequence[type]:
    """Add the subcommands and return the dataclass with the options of the chosen one."""
    usage = f"selftaught {command} COMMAND [options]"
    about = str(parser.description)
    parser.format_usage = lambda: f"usage: {usage}\n"  # type: ignore[method-assign]
    parser.format_help = lambda: commands_help(usage, about, {"commands": ABOUT})  # type: ignore[method-assign]
    commands = parser.add_subcommands(required=True, dest="action")
    for name, summary in ABOUT.items():
        sub = parser_of(f"selftaught {command} {name}", f"{summary[0].upper()}{summary[1:]}.")
        commands.add_subcommand(name, sub)
        add_options(sub, OPTIONS[name], positional=POSITIONAL.get(name, ()))
    chosen = [one for one in given if not one.startswith("-")]
    return [OPTIONS[one] for one in chosen[1:2] if one in OPTIONS]


def run(command: str, options: Namespace) -> int:
    """Run the chosen subcommand and return the exit code."""
    del command
    bar = progress_bar
    action = str(options.action)
    given = options[action]
    values = {name: given[name] for name in vars(given) if name not in ("config", "prompt")}
    if action == "train":
        _train(TrainOptions(**values), bar)
    elif action == "evaluate":
        _evaluate(EvaluateOptions(**values), bar)
    elif action == "generate":
        _generate(GenerateOptions(**values), given.prompt)
    else:
        _explore(ExploreOptions(**values))
    return 0


def quiet_sampler(model: str, *, batch_size: int = 32) -> "TransformersSampler":
    """Return a sampler, for any task, whose model thinks before every token.

    Args:
        model: folder of a trained Quiet-STaR model.
        batch_size: number of prompts per batch.
    """
    from selftaught.samplers.local.sampler import TransformersSampler

    opened, tokenizer = _open(model)
    return TransformersSampler(opened, tokenizer=tokenizer, batch_size=batch_size)


def _train(how: TrainOptions, bar: Bar) -> None:
    from transformers.trainer_utils import set_seed
    from transformers.utils import logging

    from selftaught.quiet.evaluation import measure
    from selftaught.quiet.gating import ThinkWhen
    from selftaught.quiet.spans import Spans, consecutive, spans
    from selftaught.quiet.training import quiet_arguments, train_quiet, with_lora
    from selftaught.reports.quiet_page import training_page
    from selftaught.runs.folder import lock_folder

    logging.disable_progress_bar()
    _at_least(2, length=how.length)
    _at_least(0, held_out=how.held_out, seed=how.seed)
    _at_least(1, per_device_train_batch_size=how.per_device_train_batch_size, gradient_accumulation_steps=how.gradient_accumulation_steps,
              save_steps=how.save_steps, lora_r=how.lora_r)  # fmt: skip
    set_seed(how.seed)
    model, tokenizer = _opened_to_train(how)
    config = model.quiet_config
    if why := config.without_reinforcement:
        raise ValueError(why)
    _refuse_too_long(model, how.length + config.lookahead, "--length or --quiet.thought_tokens")
    texts = spans(
        texts_of(how), tokenizer, length=how.length, least=config.lookahead + 2, seed=how.seed
    )
    held_out = min(how.held_out, len(texts.texts) // 5)
    train_spans = Spans(
        texts.texts[: len(texts.texts) - held_out], how.length, how.seed, skipped=texts.skipped
    )
    held_out_spans = consecutive(Spans(texts.texts[len(texts.texts) - held_out :], how.length))[
        :MEASURED
    ]
    own = {"text", "column", "split", "subset", "limit", "length", "model", "out", "preset", "quiet", "held_out",
           "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "training"}  # fmt: skip
    rate = how.learning_rate or (1e-5 if how.preset == "default" else 1e-6)
    options = {name: value for name, value in asdict(how).items() if name not in own}
    options |= {"learning_rate": rate} | how.training
    arguments = quiet_arguments(how.out / "checkpoints", **options)
    main = arguments.process_index == 0
    before = None
    if held_out_spans and main:
        before = measure(model, held_out_spans, think_when=ThinkWhen("never"))
    peft_model = (
        with_lora(model, r=how.lora_r, alpha=how.lora_alpha, target_modules=how.lora_target_modules)
        if how.use_peft
        else None
    )
    total = how.max_steps if how.max_steps > 0 else 0
    with (
        _locked(lock_folder, how.out, main=main),
        _tracked(how.out, bar, main=main) as reporter,
        reporter.progress("training", total) as advance,
    ):
        log = train_quiet(
            model, tokenizer, train_spans, arguments, out=how.out, peft_model=peft_model,
            progress=advance,
        )  # fmt: skip
    if not main:
        return
    after = None
    if held_out_spans:
        trained = how.out / "model"
        after = _stored(
            how.out / "after.json", lambda: measure(_open(str(trained))[0], held_out_spans)
        )
    settings = {"model": how.model, "text": how.text, **asdict(config), "learning_rate": arguments.learning_rate,
                "spans": len(train_spans), "texts skipped": texts.skipped}  # fmt: skip
    _remember(how, how.out / "config.yaml")
    page = training_page(how.out, log, settings, before, after)
    _print_training_summary(how, log, before, after, page, texts.skipped)


def _print_training_summary(
    how: TrainOptions,
    log: list[dict[str, float]],
    before: Any,
    after: Any,
    page: Path,
    skipped: int,
) -> None:
    if skipped:
        print(f"{skipped} texts were too short and were skipped.")
    if log:
        last = log[-1]
        print(f"{last['step']:.0f} steps; last step: {last['nll_without']:.3f} nats per token without thoughts, "
              f"{last['nll_with']:.3f} with thoughts, {last['tokens_per_second']:.0f} tokens/s.")  # fmt: skip
    if before and after:
        print(_table({"before, without thoughts": before, "after": after}))
    print(printable(f"Model   {how.out / 'model'}\nPage    {page}"))
    print(f"Next    selftaught quiet explore --model {how.out / 'model'} --text FILE")


def _evaluate(how: EvaluateOptions, bar: Bar) -> None:
    from selftaught.quiet.evaluation import measure
    from selftaught.quiet.spans import consecutive, spans

    _at_least(1, batch_size=how.batch_size)
    model, tokenizer = _open(how.model)
    _refuse_too_long(model, how.length, "--length")
    cut = consecutive(spans(texts_of(how), tokenizer, length=how.length, least=2))
    with bar("measuring", len(cut)) as advance:
        found = measure(model, cut, _thinking(how), batch_size=how.batch_size, progress=advance)
    if how.out is not None:
        how.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(how.out, json.dumps(found.to_dict(), indent=2) + "\n")
    print(_table({Path(how.model).name: found}))


def _generate(how: GenerateOptions, prompt: str) -> None:
    from transformers import StoppingCriteriaList, StopStringCriteria, TextStreamer

    class PrintableStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    _at_least(1, max_new_tokens=how.max_new_tokens)
    _at_least(0, temperature=how.temperature, thought_temperature=how.thought_temperature)
    if "" in how.stop:
        raise ValueError("--stop must not be an empty string: every text starts with it.")
    model, tokenizer = _open(how.model)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = tokenizer(text, return_tensors="pt").to(model.base.device)
    if ids.input_ids.shape[1] == 0:
        raise ValueError("Expected a prompt of at least one token, got an empty text.")
    _refuse_too_long(model, ids.input_ids.shape[1] + how.max_new_tokens, "--max-new-tokens")
    stops: Any = [StopStringCriteria(tokenizer, how.stop)] if how.stop else []
    streamer = (
        None
        if how.stop
        else PrintableStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )  # type: ignore[arg-type]
    when = _thinking(how)
    whole = model.generate(
        ids.input_ids, ids.attention_mask, max_new_tokens=how.max_new_tokens,
        do_sample=how.temperature > 0, temperature=how.temperature or 1.0,
        stopping_criteria=StoppingCriteriaList(stops), streamer=_after_prompt(streamer),
        thoughts=when.thoughts, thought_temperature=when.temperature,
        think_when=when.think_when, seed=how.seed,
    )  # fmt: skip
    if how.stop:
        new = tokenizer.decode(whole[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        print(printable(min((str(new).split(stop)[0] for stop in how.stop), key=len)))


def _after_prompt(streamer: Any) -> Any:
    """Return a streamer that prints the first tokens it gets.

    transformers' `generate` sends the prompt first, which `TextStreamer` skips; `QuietLM.generate`
    sends only new tokens.
    """
    if streamer is not None:
        streamer.next_tokens_are_prompt = False
    return streamer


def _explore(how: ExploreOptions) -> None:
    from selftaught.quiet.explore import explored
    from selftaught.reports.quiet_page import explorer_page

    model, tokenizer = _open(how.model)
    text = next(texts_of(how), "")
    _refuse_too_long(model, how.tokens + 1, "--tokens")
    first, tokens, measured = explored(model, tokenizer, text, how.tokens, _thinking(how))
    print(explorer_page(how.out, Path(how.text).name, first, tokens, measured))


def _open(model: str) -> "tuple[QuietLM, PreTrainedTokenizerBase]":
    from transformers.utils import logging

    from selftaught.quiet.checkpoint import open_quiet

    logging.disable_progress_bar()
    opened, tokenizer = open_quiet(Path(model))
    return opened.to(_device()).eval(), tokenizer


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _opened_to_train(how: TrainOptions) -> "tuple[QuietLM, PreTrainedTokenizerBase]":
    """Return a new Quiet-STaR model around the base model, or open a trained one."""
    from transformers import AutoTokenizer

    from selftaught.models.embedded import embedded_model
    from selftaught.quiet.checkpoint import SETTINGS, make_quiet, open_quiet
    from selftaught.quiet.config import QuietConfig
    from selftaught.samplers.weights import load_model

    if (Path(how.model) / SETTINGS).exists():
        if how.quiet or how.preset != "default":
            raise ValueError(
                f"{how.model} is a trained Quiet-STaR model, whose options are in its {SETTINGS}. "
                "Leave out --preset and --quiet, or start from a model without thoughts."
            )
        opened, tokenizer = open_quiet(Path(how.model), dtype="float32")
        return opened.to(_device()), tokenizer
    preset = QuietConfig if how.preset == "default" else getattr(QuietConfig, how.preset)
    try:
        config = preset(**how.quiet)
    except TypeError as error:
        raise ValueError(
            f"QuietConfig refused the options of --quiet: {error}. Its fields are listed in "
            "docs/methods/quiet.md."
        ) from None
    name = str(embedded_model()) if how.model == "embedded" else how.model
    base = load_model(name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(name)
    return make_quiet(base.to(_device()), tokenizer, config), tokenizer


def _refuse_too_long(model: "QuietLM", tokens: int, what: str) -> None:
    config = model.base.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    needed = tokens + model.tokens_beside
    if tokens < 2 or (limit is not None and needed > limit):
        raise ValueError(
            f"Expected at least 2 tokens of text, got {tokens}, and at most {limit} tokens with a "
            f"thought (the model's limit), got {needed}. Change {what}."
        )


def _at_least(least: int, **given: float) -> None:
    """Raise ValueError for the first option whose value is below `least`."""
    for name, value in given.items():
        if value < least:
            raise ValueError(f"--{name} must be at least {least}; got {value:g}.")


def texts_of(how: TextOptions) -> Iterator[str]:
    """Yield the texts that the options of a command name.

    Raises:
        ValueError: `--text` is missing, or `--limit` is below 1.
    """
    from selftaught.options import check_count
    from selftaught.quiet.spans import read_texts

    check_count("limit", how.limit)
    if not how.text:
        raise ValueError(
            "--text is required: a file, a folder or a dataset on the Hugging Face Hub."
        )
    return read_texts(
        how.text, column=how.column, split=how.split, subset=how.subset, limit=how.limit
    )


def _thinking(how: ThinkOptions) -> "ThoughtParams":
    from selftaught.quiet.gating import ThinkWhen, ThoughtParams

    when = ThinkWhen(how.think_when, how.threshold)
    return ThoughtParams(how.thoughts, how.thought_temperature, when, how.seed)


def _stored(path: Path, measure: "Callable[[], Measured]") -> "Measured":
    """Return the measurement stored in `path`, or measure now and store the result there."""
    from selftaught.quiet.evaluation import Measured

    if path.exists():
        return Measured(**json.loads(path.read_text(encoding="utf-8")))
    found = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found.to_dict(), indent=2) + "\n")
    return found


@contextmanager
def _locked(lock_folder: Any, out: Path, *, main: bool) -> Iterator[None]:
    """Lock the run folder against other commands. Of several processes, only the main one does."""
    if not main:
        yield
        return
    with lock_folder(out):
        yield


@contextmanager
def _tracked(out: Path, bar: Bar, *, main: bool) -> Iterator[Any]:
    """Yield a ProgressReporter. That of the main process writes the status file of the run."""
    from selftaught.runs.folder import ProgressReporter
    from selftaught.runs.status import tracked_status

    if not main:
        yield ProgressReporter()
        return
    with tracked_status(
        out / "status.json", "Quiet-STaR", ProgressReporter(progress=bar)
    ) as reporter:
        yield reporter


def _remember(options: Any, path: Path) -> None:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}  # fmt: skip
    write_atomically(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _table(rows: "dict[str, Measured]") -> str:
    lines = ["| | tokens | nats/token without thoughts | with thoughts | gain [95%] | gain, hardest tenth | weight | thinking |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, one in rows.items():
        lines.append(
            f"| {printable(name)} | {one.tokens} | {one.nll_without:.4f} | {one.nll_with:.4f} | {one.gain:+.4f} "
            f"[{one.gain_low:.4f}, {one.gain_high:.4f}] | {one.gain_by_decile[-1]:+.4f} | "
            f"{one.weight:.2f} | {one.thinking:.0%} |"
        )
    return "\n".join(lines)
