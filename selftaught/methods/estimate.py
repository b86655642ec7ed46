"""What a run costs at most: numbers of completions and training examples, and an estimate of time.

The rates are measured on this machine, with some of the run's own prompts and the base model.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from selftaught.methods.run import Run
from selftaught.option_groups import as_number
from selftaught.records import Completion, Problem, Text
from selftaught.rendering import TemplateOptions, prompt_ids
from selftaught.reports.pages import duration
from selftaught.samplers import Sampler, SamplingParams, count_parameters
from selftaught.training import open_tokenizer

FIRST_PROMPTS, FIRST_TOKENS = 4, 8
"""Size of the first sample; its speed decides the size of the second."""
PROMPTS, SECONDS = 512, 10.0
"""Maximum number of prompts of the second sample, and the most time that it should take."""
MAX_PARAMETERS_ON_CPU = 1_000_000_000


@dataclass(frozen=True)
class Cost:
    """Amounts of work of a run; each is the most that can be needed."""

    completions: int = 0
    """Sampled completions of the training, validation and test problems."""
    examples: int = 0
    """Training examples, counted once per pass."""
    tokens: int = 0
    """Sampled tokens that are limited as tokens, not as completions."""
    scored: int = 0
    """Completions that a verifier scores."""

    without: str = ""
    """What is not counted, in words."""
    first: "Cost | None" = None
    """The first iteration, if the run may end after any."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.completions + other.completions, self.examples + other.examples,
            self.tokens + other.tokens, self.scored + other.scored,
            self.without or other.without,
        )  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Speed of the base model on this machine."""

    prompts: int
    """Number of prompts with which it was measured."""
    completions: float
    """Completions per second."""
    tokens: float
    """Mean number of tokens of a completion."""
    examples: float
    """Training examples per second."""


def time_lines(run: Run, cost: Cost) -> list[tuple[str, str]]:
    """Return the cost of a run and its estimated time, as (name, value) pairs for a dry run."""
    amounts = [
        f"{count:,} {what}"
        for count, what in (
            (cost.completions, "completions"),
            (cost.tokens, "sampled tokens"),
            (cost.scored, "scored candidates"),
            (cost.examples, "training examples, counted once per pass"),
        )
        if count
    ]
    without = f" (without {cost.without})" if cost.without else ""
    lines = [("At most", ", ".join(amounts) + without)]
    if why := why_not_measured(run):
        return [*lines, ("Time", f"not estimated: {why}")]
    try:
        rates = measured_rates(run)
    except RuntimeError as error:  # such as a lack of memory
        return [*lines, ("Time", f"not estimated: {' '.join(str(error).split())[:200]}")]
    return [*lines, ("Time", in_words(cost, rates) + without)]


def in_words(cost: Cost, rates: Rates) -> str:
    """Return the estimated time of an amount of work, with the rates from which it follows."""
    sampling, scoring, training = _seconds(cost, rates)
    parts = [
        f"{what} {duration(seconds)}"
        for what, seconds in (("sampling", sampling), ("scoring", scoring), ("training", training))
        if seconds
    ]
    first = ""
    if cost.first is not None:
        first = f"about {duration(sum(_seconds(cost.first, rates)))} for the first iteration, "
    return (
        f"{first}at most {duration(sampling + scoring + training)} ({', '.join(parts)}), at "
        f"{_rate(rates.completions)} completions/s of {rates.tokens:.0f} tokens and {_rate(rates.examples)} "
        f"training examples/s, measured now with {rates.prompts} prompts on this machine"
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(cost: Cost, rates: Rates) -> tuple[float, float, float]:
    """Return the seconds of sampling, scoring and training."""
    sampling = cost.completions / rates.completions
    sampling += cost.tokens / (rates.completions * rates.tokens)
    # A forward pass takes about a third of a training step.
    return sampling, cost.scored / (3 * rates.examples), cost.examples / rates.examples


def why_not_measured(run: Run) -> str | None:
    """Return why no rate is measured; None if it is."""
    from selftaught.training.timing import has_accelerator

    if run.config.sampler != "transformers":
        return (
            f"rates are measured only with the sampler transformers, not with {run.config.sampler}"
        )
    if run.config.launcher == "ray":
        return "rates are measured only on this machine, not on a Ray cluster"
    if not Path(run.base).is_dir():
        return "the model is not a folder on this machine, and a dry run downloads no weights"
    count = count_parameters(run.base)
    if count > MAX_PARAMETERS_ON_CPU and not has_accelerator():
        return f"this machine has no accelerator, and the model has {count / 1e9:.1f} billion parameters"
    return None


def measured_rates(run: Run) -> Rates:
    """Sample some of the run's prompts with its base model, and train one step, to measure their
    speed; nothing is stored."""
    from selftaught.training.timing import seconds_per_example

    config = run.config
    try:
        seconds, drawn = _sampled(run)
    finally:
        run.engine.close()
    lengths = [len(one.token_ids or ()) for one in drawn]
    # A completion that was ended by a lower limit may be as long as the run's own limit.
    whole = [run.params.max_tokens if one.finish_reason == "length" else n
             for one, n in zip(drawn, lengths, strict=True)]  # fmt: skip
    per_token = seconds / max(1, sum(lengths))
    mean = max(1.0, fmean(whole))
    asked = _mean_tokens(run.base, [run.tuned(one) for one in _spread(run.train, 64)],
                         run.tuned.chat_template_kwargs)  # fmt: skip
    per_example = seconds_per_example(
        run.base, length=min(config.max_length, round(asked + mean)),
        device_batch=int(as_number(config.per_device_train_batch_size)),
        train_batch_size=int(as_number(config.train_batch_size)), bf16=config.bf16,
        lora=config.use_peft,
    )  # fmt: skip
    return Rates(len(drawn), 1 / (per_token * mean), mean, 1 / per_example)


def _sampled(run: Run) -> tuple[float, list[Completion]]:
    """Return the seconds that sampling some of the run's prompts takes, and the completions."""
    style = run.first_style
    params = replace(run.params, n=1).for_prompt(style.stop, style.chat_template_kwargs)
    sampler = run.engine.of(run.base)
    first = [style(problem) for problem in _spread(run.train, FIRST_PROMPTS)]
    short = replace(params, max_tokens=min(FIRST_TOKENS, params.max_tokens))
    _timed(sampler, first[:1], replace(params, max_tokens=1))  # the first call takes longer
    seconds, drawn = _timed(sampler, first, short)
    affordable = int(SECONDS * sum(len(one.token_ids or ()) for one in drawn) / seconds)
    count = min(PROMPTS, affordable // params.max_tokens)
    if count > len(first):
        return _timed(sampler, [style(one) for one in _spread(run.train, count)], params)
    if (tokens := min(params.max_tokens, affordable // len(first))) > short.max_tokens:
        return _timed(sampler, first, replace(params, max_tokens=tokens))
    return seconds, drawn


def _spread(problems: Sequence[Problem], count: int) -> Sequence[Problem]:
    """Return up to `count` problems from all parts of a list."""
    return problems[:: max(1, len(problems) // count)][:count]


def _timed(
    sampler: Sampler, prompts: Sequence[Text], params: SamplingParams
) -> tuple[float, list[Completion]]:
    """Return the seconds that sampling takes, and the completions."""
    started = time.perf_counter()
    drawn = sampler.sample(prompts, params)
    return time.perf_counter() - started, [one for of_prompt in drawn for one in of_prompt]


def _mean_tokens(model: str, prompts: Sequence[Text], options: TemplateOptions) -> float:
    """Return the mean number of tokens of training prompts."""
    tokenizer = open_tokenizer(model)
    return fmean(len(prompt_ids(tokenizer, one, options)) for one in prompts)
