"""The commands for a trained Quiet-STaR model: `selftaught quiet evaluate | generate | explore
| export-base`."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from selftaught.cli.output import progress_bar
from selftaught.cli.quiet_model import (
    ModelOptions,
    check_fits,
    check_least,
    open_trained,
    pattern_of,
)
from selftaught.cli.texts import TextOptions, texts_of
from selftaught.printable import printable
from selftaught.records import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selftaught.quiet.evaluation import Measured
    from selftaught.quiet.gating import ThoughtParams
    from selftaught.quiet.legibility import Interval
    from selftaught.quiet.model import QuietLM
    from selftaught.quiet.reference import Reference


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
    think_when: Literal["trained", "always", "pattern", "answer", "entropy", "gate", "never"] = (
        "trained"
    )
    """Where to think: where the model was "trained" to think, "always", after text that matches
    `--pattern` ("pattern"), before an "answer" (after its marker), where the "entropy" of the next
    token is above `--threshold`, where the gain that the "gate" predicts is above it, or
    "never"."""
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
    base_model: str | None = None
    """Model before training (folder or name, with or without thoughts). The perplexity of the thoughts
    is measured under it. It is loaded in addition to the trained model. Default: not measured."""
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


@dataclass(frozen=True)
class ExportOptions:
    """Export of the base model; it has no options."""


def evaluate(how: EvaluateOptions) -> None:
    """Measure the loss of a model on texts, and print a table."""
    from selftaught.quiet.evaluation import measure
    from selftaught.quiet.spans import consecutive, spans

    check_least(1, batch_size=how.batch_size)
    model, tokenizer = open_trained(how.model)
    check_fits(model, how.length, "--length")
    when = thinking(how, tokenizer)
    cut = consecutive(spans(texts_of(how), tokenizer, length=how.length, least=2))
    reference = None if how.base_model is None else reference_to(how.base_model, model, tokenizer)
    with progress_bar("measuring", len(cut)) as advance:
        found = measure(
            model, cut, when, batch_size=how.batch_size, reference=reference, progress=advance
        )
    if how.out is not None:
        how.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(how.out, json.dumps(found.to_dict(), indent=2) + "\n")
    print(measured_table({Path(how.model).name: found}))
    if readable := legibility_table({Path(how.model).name: found}):
        print(f"\n{readable}")


def reference_to(name: str, model: "QuietLM", tokenizer: "PreTrainedTokenizerBase") -> "Reference":
    """Load the model before training, to which the thoughts of a trained model are compared.

    Args:
        name: folder or name of a model, with or without thoughts.
        model: the trained model.
        tokenizer: its tokenizer.

    Raises:
        ValueError: it has another vocabulary than the trained model.
        OSError: it does not exist.
    """
    from transformers import AutoTokenizer

    from selftaught.models.embedded import embedded_model
    from selftaught.quiet.checkpoint import is_quiet, make_quiet, open_quiet
    from selftaught.quiet.reference import Reference
    from selftaught.samplers.weights import load_model

    if is_quiet(Path(name)):
        before, other = open_quiet(Path(name))
    else:
        folder = str(embedded_model()) if name == "embedded" else name
        other = AutoTokenizer.from_pretrained(folder)
        before = make_quiet(load_model(folder), other, model.quiet_config)
    if other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"Expected the model before training in --base-model, got {name}, which has other tokens "
            f"({len(other)} with those of thoughts; the trained model has {len(tokenizer)})."
        )
    return Reference.other(before.to(model.base.device).eval())


def generate(how: GenerateOptions, prompt: str) -> None:
    """Continue a text and print it, as a stream unless stop strings are given.

    Args:
        how: the options.
        prompt: the text, or "-" for standard input.
    """
    from transformers import StoppingCriteriaList, StopStringCriteria, TextStreamer

    class PrintableStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(printable(text), stream_end)

    check_least(1, max_new_tokens=how.max_new_tokens)
    check_least(0, temperature=how.temperature, thought_temperature=how.thought_temperature)
    if "" in how.stop:
        raise ValueError("--stop must not be an empty string: every text starts with it.")
    model, tokenizer = open_trained(how.model)
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = tokenizer(text, return_tensors="pt").to(model.base.device)
    if ids.input_ids.shape[1] == 0:
        raise ValueError("Expected a prompt of at least one token, got an empty text.")
    check_fits(model, ids.input_ids.shape[1] + how.max_new_tokens, "--max-new-tokens")
    stops: Any = [StopStringCriteria(tokenizer, how.stop)] if how.stop else []
    streamer = (
        None
        if how.stop
        else PrintableStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )  # type: ignore[arg-type]
    when = thinking(how, tokenizer)
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


def explore(how: ExploreOptions) -> None:
    """Write the page with the thought before every token of the first text."""
    from selftaught.quiet.explore import explored
    from selftaught.reports.quiet_page import explorer_page

    model, tokenizer = open_trained(how.model)
    text = next(texts_of(how), "")
    check_fits(model, how.tokens + 1, "--tokens")
    first, tokens, measured = explored(model, tokenizer, text, how.tokens, thinking(how, tokenizer))
    print(explorer_page(how.out, Path(how.text).name, first, tokens, measured))


def export(model: Path, out: Path) -> None:
    """Write the base model inside a trained model, and its tokenizer."""
    from transformers.utils import logging

    from selftaught.quiet.checkpoint import export_base

    logging.disable_progress_bar()
    export_base(model, out)
    print(out)


def thinking(how: ThinkOptions, tokenizer: "PreTrainedTokenizerBase") -> "ThoughtParams":
    """Return how the model thinks by the options."""
    from selftaught.quiet.gating import ThinkWhen, ThoughtParams

    pattern = pattern_of(how, "--think-when", how.think_when)
    when = ThinkWhen(how.think_when, how.threshold, pattern, tokenizer)
    return ThoughtParams(how.thoughts, how.thought_temperature, when, how.seed)


def measured_table(rows: "dict[str, Measured]") -> str:
    """Return a Markdown table of measurements, one row per name."""
    lines = ["| | tokens | nats/token without thoughts | with thoughts | gain [95%] | gain, hardest tenth | weight | thinking |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, one in rows.items():
        lines.append(
            f"| {printable(name)} | {one.tokens} | {one.nll_without:.4f} | {one.nll_with:.4f} | {one.gain:+.4f} "
            f"[{one.gain_low:.4f}, {one.gain_high:.4f}] | {one.gain_by_decile[-1]:+.4f} | "
            f"{one.weight:.2f} | {one.thinking:.0%} |"
        )
    lines += [
        f"\n{printable(name)}: where the model thinks ({one.thinking:.1%} of the tokens), thoughts gain "
        f"{one.gain_where_thinking:+.4f} nats per token."
        for name, one in rows.items()
        if 0 < one.thinking < 1
    ]
    return "\n".join(lines)


def legibility_table(rows: "dict[str, Measured]") -> str:
    """Return a Markdown table of how readable thoughts are. Empty without thoughts."""
    lines = ["| thoughts of | thoughts | nats/token under the base [95%] | repeated tokens [95%] | in the text | distinct at a position [95%] | distinct in a span [95%] |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, measured in rows.items():
        if (one := measured.legibility) is not None:
            lines.append(
                f"| {printable(name)} | {one.thoughts} | {_interval(one.base_nll, '.3f')} | "
                f"{_interval(one.repeated_tokens, '.1%')} | {_interval(one.repeated_in_text, '.1%')} | "
                f"{_interval(one.distinct_thoughts, '.1%')} | {_interval(one.distinct_in_text, '.1%')} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def _interval(value: "Interval | None", form: str) -> str:
    """Return a mean with its interval. Empty if it was not measured."""
    if value is None:
        return ""
    mean, low, high = value
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"
