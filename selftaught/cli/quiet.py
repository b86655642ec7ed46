"""The command line of Quiet-STaR: `selftaught quiet train | evaluate | generate | explore`."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
    from selftaught.quiet.model import QuietLM
    from selftaught.samplers.local.sampler import TransformersSampler

ABOUT = {
    "train": "teach a model to think, on ordinary text",
    "evaluate": "nats per token without and with thoughts, by how hard tokens are",
    "generate": "continue a text, thinking before every token",
    "explore": "a page that shows the thought before every token of a text",
}
MEASURED = 64
"""At most so many held-out spans are measured after a training."""
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], Any] | None]]


@dataclass(frozen=True)
class TextOptions:
    """Which texts."""

    text: str = ""
    """A .jsonl, .parquet or plain text file, a folder of them, or a data set of the Hub."""
    column: str = "text"
    """Where texts stand in rows."""
    split: str = "train"
    """Of a data set of the Hub."""
    subset: str | None = None
    """Of a data set of the Hub: its configuration, where it has several."""
    limit: int | None = None
    """Only the first so many texts."""
    length: int = 256
    """Tokens of a span (256 in the paper)."""


@dataclass(frozen=True)
class TrainOptions(TextOptions):
    """A training; options not named here go to transformers by --training."""

    model: str = "embedded"
    """A Hugging Face name or folder, "embedded", or a folder of a model that thinks already."""
    out: Path = Path("runs/quiet")
    """The run folder; repeating the command continues it."""
    preset: Literal["default", "paper", "authors_code"] = "default"
    """Where options of thinking come from that are not given: what learned here, the paper, or
    the authors' code."""
    quiet: dict[str, Any] = field(default_factory=dict)
    """Options of thinking (QuietConfig), such as --quiet.thought_tokens 8 or --quiet.positions uniform."""
    held_out: int = 32
    """Texts at the end that are only measured; at most a fifth of them."""
    max_steps: int = -1
    """Optimizer steps; -1: num_train_epochs decides."""
    num_train_epochs: float = 1.0
    """Passes over the texts."""
    learning_rate: float | None = None
    """By default 1e-5, and 1e-6 with the published presets (for a model of 7 billion); a model of a
    million weights learned at 2e-4."""
    per_device_train_batch_size: int = 8
    """Spans in a step (8 in the paper)."""
    gradient_accumulation_steps: int = 1
    """Batches in a step."""
    bf16: bool = False
    """Compute in bfloat16, weights stay in float32."""
    use_peft: bool = False
    """Train a LoRA adapter and the two new embeddings, and merge them."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """Scale of the adapter."""
    lora_target_modules: str = "all-linear"
    """Layers with an adapter: "all-linear", or names with commas between."""
    seed: int = 0
    """Of spans, thoughts and new weights."""
    save_steps: int = 50
    """Steps between checkpoints."""
    training: dict[str, Any] = field(default_factory=dict)
    """Any other field of transformers' TrainingArguments, such as --training.report_to tensorboard."""


@dataclass(frozen=True)
class ThinkOptions:
    """How a trained model thinks."""

    model: str = "runs/quiet/model"
    """A folder of a model that thinks."""
    thoughts: int = 1
    """Per position; the predictions after each are averaged."""
    thought_temperature: float = 0.0
    """0 is greedy."""
    think_when: Literal["always", "entropy", "gate", "never"] = "always"
    """Always, above a threshold of the next token's entropy, or above one of the gate's expected gain."""
    threshold: float = 0.0
    """In nats, for entropy and gate."""
    seed: int = 0
    """Of the draws."""


@dataclass(frozen=True)
class EvaluateOptions(ThinkOptions, TextOptions):
    """What is measured."""

    batch_size: int = 8
    """Spans at a time."""
    out: Path | None = None
    """A JSON file for the numbers."""


@dataclass(frozen=True)
class GenerateOptions(ThinkOptions):
    """What is continued, and how."""

    max_new_tokens: int = 256
    """At most so many."""
    temperature: float = 0.0
    """0 is greedy."""
    stop: list[str] = field(default_factory=list)
    """The text ends before any of these."""


@dataclass(frozen=True)
class ExploreOptions(ThinkOptions, TextOptions):
    """What is shown."""

    tokens: int = 400
    """At most so many of the text."""
    out: Path = Path("runs/thoughts.html")
    """The page."""


OPTIONS = {"train": TrainOptions, "evaluate": EvaluateOptions, "generate": GenerateOptions, "explore": ExploreOptions}  # fmt: skip


POSITIONAL: Mapping[str, Sequence[Positional]] = {
    "generate": [("prompt", "text to continue; - reads it from standard input", None)]
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
    """A model that thinks before every token, as a sampler for any task."""
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
    apart = min(how.held_out, len(texts.texts) // 5)
    learned = Spans(
        texts.texts[: len(texts.texts) - apart], how.length, how.seed, skipped=texts.skipped
    )
    held = consecutive(Spans(texts.texts[len(texts.texts) - apart :], how.length))[:MEASURED]
    own = {"text", "column", "split", "subset", "limit", "length", "model", "out", "preset", "quiet", "held_out",
           "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "training"}  # fmt: skip
    rate = how.learning_rate or (1e-5 if how.preset == "default" else 1e-6)
    options = {name: value for name, value in asdict(how).items() if name not in own}
    options |= {"learning_rate": rate} | how.training
    arguments = quiet_arguments(how.out / "checkpoints", **options)
    main = arguments.process_index == 0
    before = measure(model, held, think_when=ThinkWhen("never")) if held and main else None
    peft_model = (
        with_lora(model, r=how.lora_r, alpha=how.lora_alpha, target_modules=how.lora_target_modules)
        if how.use_peft
        else None
    )
    total = how.max_steps if how.max_steps > 0 else 0
    with (
        _held(lock_folder, how.out, main=main),
        _reported(how.out, bar, main=main) as reporter,
        reporter.progress("training", total) as advance,
    ):
        log = train_quiet(
            model, tokenizer, learned, arguments, out=how.out, peft_model=peft_model,
            progress=advance,
        )  # fmt: skip
    if not main:
        return
    after = _stored(how.out / "after.json", lambda: measure(_open(str(how.out / "model"))[0], held)) if held else None  # fmt: skip
    settings = {"model": how.model, "text": how.text, **asdict(config), "learning_rate": arguments.learning_rate,
                "spans": len(learned), "texts skipped": texts.skipped}  # fmt: skip
    _remember(how, how.out / "config.yaml")
    page = training_page(how.out, log, settings, before, after)
    _tell_training(how, log, before, after, page, texts.skipped)


def _tell_training(
    how: TrainOptions,
    log: list[dict[str, float]],
    before: Any,
    after: Any,
    page: Path,
    skipped: int,
) -> None:
    if skipped:
        print(f"{skipped} texts were too short and left out.")
    if log:
        last = log[-1]
        print(f"{last['step']:.0f} steps; the last: {last['nll_without']:.3f} nats per token without, "
              f"{last['nll_with']:.3f} with thoughts, {last['tokens_per_second']:.0f} tokens/s.")  # fmt: skip
    if before and after:
        print(_table({"before, not thinking": before, "after": after}))
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
        found = measure(model, cut, batch_size=how.batch_size, progress=advance, **_thinking(how))
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
        raise ValueError("--stop must not be empty text, which every text begins with.")
    model, tokenizer = _open(how.model)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = tokenizer(text, return_tensors="pt").to(model.base.device)
    if ids.input_ids.shape[1] == 0:
        raise ValueError("Expected a prompt of at least one token, got an empty text.")
    _refuse_too_long(model, ids.input_ids.shape[1] + how.max_new_tokens, "--max_new_tokens")
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
        thoughts=when["thoughts"], thought_temperature=when["temperature"],
        think_when=when["think_when"], seed=how.seed,
    )  # fmt: skip
    if how.stop:
        new = tokenizer.decode(whole[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        print(printable(min((str(new).split(stop)[0] for stop in how.stop), key=len)))


def _after_prompt(streamer: Any) -> Any:
    """A streamer that begins with what is new; transformers' `generate` sends the prompt first."""
    if streamer is not None:
        streamer.next_tokens_are_prompt = False
    return streamer


def _explore(how: ExploreOptions) -> None:
    from selftaught.quiet.explore import explored
    from selftaught.reports.quiet_page import explorer_page

    model, tokenizer = _open(how.model)
    text = next(texts_of(how), "")
    _refuse_too_long(model, how.tokens + 1, "--tokens")
    first, tokens, measured = explored(model, tokenizer, text, how.tokens, **_thinking(how))
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
    """The base made to think, or a model that thinks already."""
    from transformers import AutoTokenizer

    from selftaught.models.embedded import embedded_model
    from selftaught.quiet.checkpoint import SETTINGS, make_quiet, open_quiet
    from selftaught.quiet.config import QuietConfig
    from selftaught.samplers.weights import load_model

    if (Path(how.model) / SETTINGS).exists():
        if how.quiet or how.preset != "default":
            raise ValueError(
                f"{how.model} thinks already, by the options in its {SETTINGS}; leave out --preset "
                "and --quiet, or start from an ordinary model."
            )
        opened, tokenizer = open_quiet(Path(how.model), dtype="float32")
        return opened.to(_device()), tokenizer
    preset = QuietConfig if how.preset == "default" else getattr(QuietConfig, how.preset)
    try:
        config = preset(**how.quiet)
    except TypeError as error:
        raise ValueError(f"Options of thinking were refused: {error}; see QuietConfig.") from None
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
            f"{tokens} tokens of text and what a thought adds are {needed}, and the model takes "
            f"{limit}; a text has at least 2. Change {what}."
        )


def _at_least(least: int, **given: float) -> None:
    """Refuse options below a number."""
    for name, value in given.items():
        if value < least:
            raise ValueError(f"--{name} must be at least {least}; got {value:g}.")


def texts_of(how: TextOptions) -> Iterator[str]:
    """The texts that a command is given."""
    from selftaught.options import check_count
    from selftaught.quiet.spans import read_texts

    check_count("limit", how.limit)
    if not how.text:
        raise ValueError("Expected --text: a file, a folder or a data set of the Hub.")
    return read_texts(
        how.text, column=how.column, split=how.split, subset=how.subset, limit=how.limit
    )


def _thinking(how: ThinkOptions) -> dict[str, Any]:
    from selftaught.quiet.gating import ThinkWhen

    return {"thoughts": how.thoughts, "temperature": how.thought_temperature, "seed": how.seed,
            "think_when": ThinkWhen(how.think_when, how.threshold)}  # fmt: skip


def _stored(path: Path, measure: "Callable[[], Measured]") -> "Measured":
    """What was measured before, or now."""
    from selftaught.quiet.evaluation import Measured

    if path.exists():
        return Measured(**json.loads(path.read_text(encoding="utf-8")))
    found = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found.to_dict(), indent=2) + "\n")
    return found


@contextmanager
def _held(lock_folder: Any, out: Path, *, main: bool) -> Iterator[None]:
    """Hold a run folder against another command; the first process does, of several."""
    if not main:
        yield
        return
    with lock_folder(out):
        yield


@contextmanager
def _reported(out: Path, bar: Bar, *, main: bool) -> Iterator[Any]:
    """A watch that writes the run's status; of several processes, the main one's."""
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
    lines = ["| | tokens | without | with | gain [95%] | hardest tenth | weight | thinking |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, one in rows.items():
        lines.append(
            f"| {printable(name)} | {one.tokens} | {one.nll_without:.4f} | {one.nll_with:.4f} | {one.gain:+.4f} "
            f"[{one.gain_low:.4f}, {one.gain_high:.4f}] | {one.gain_by_decile[-1]:+.4f} | "
            f"{one.weight:.2f} | {one.thinking:.0%} |"
        )
    return "\n".join(lines)
