"""Model cards of the runs of the methods."""

import json
import shlex
from collections.abc import Sequence

from selftaught.evaluation.evaluator import Evaluation, Tally
from selftaught.methods.run import Run
from selftaught.prompts import PromptStyle
from selftaught.reports.citations import Paper
from selftaught.reports.model_card import (
    Card,
    Result,
    Trained,
    base_model,
    changed_settings,
    command_line,
    made_with,
    shown_value,
    task_data,
)
from selftaught.runs.folder import Row

BASE = "the base model"


def run_card(
    run: Run, method: str, paper: Paper, tested: Evaluation | Tally, style: PromptStyle,
    trained: Sequence[Trained],
) -> Card:  # fmt: skip
    """Return the card of a finished model.

    Args:
        run: the run.
        method: name of the method.
        paper: its paper.
        tested: greedy accuracy on the test problems, as the page of the run shows it.
        style: the prompt of that evaluation.
        trained: the models between the base and this one; the last is this one.
    """
    config, task = run.config, shown_value(run.config.task)
    settings = changed_settings(config, ("out", "model", "task"))
    given = {"task": task, "model": shown_value(config.model)}
    drawn = config.test_problems is not None
    return Card(
        title=f"{task}, trained with {method}",
        method=method,
        lead=f"A causal language model that was trained with {method} ({paper.short}) by {made_with()}.",
        base=base_model(config.model),
        data=task_data(run.task),
        papers=[paper],
        trained=trained,
        settings=settings,
        results=[accuracy_result(f"accuracy, greedy decoding, prompt {style.name}", tested, "test problems")],
        measured_by=_evaluate(run, style),
        measured_note="The test problems are a random part of the split, so the number of this command, "
        "which takes the whole split, can differ." if drawn else "",
        trained_by=command_line(f"selftaught {config.method}", given | settings),
        benchmark=run.task.data_sets[0] if len(run.task.data_sets) == 1 else "unknown",
        tags=[method.lower().replace(" ", "-"), "trl"],
    )  # fmt: skip


def accuracy_result(name: str, tally: Evaluation | Tally, what: str) -> Result:
    """Return an accuracy as a result of a card."""
    return Result(name, "accuracy", tally.accuracy, tally.low, tally.high, f"{tally.n:,} {what}")


def trained_from(name: str, start: str, row: Row, note: str = "") -> Trained:
    """Return a model of the lineage from its row of `metrics.jsonl`."""
    training = row["training"]
    count = training.get("trained on", row.get("funnel", {}).get("trained on", 0))
    return Trained(name, start, count, training["steps"], note)


def _evaluate(run: Run, style: PromptStyle) -> str:
    """Return the command that measures the accuracy of a model of the run on the test problems."""
    config = run.config
    settings: dict[str, object] = {"task": config.task}
    settings |= {f"task_options.{key}": value for key, value in config.task_options.items()}
    if style.as_messages:
        settings["prompt"] = "chat"
    else:
        settings["prompt"] = config.prompt if style.name == run.asked.name else "bare"
    if config.system_prompt:
        settings["system_prompt"] = config.system_prompt
    if config.max_tokens is not None:
        settings["max_tokens"] = config.max_tokens
    flags = command_line("selftaught evaluate --model MODEL", settings)
    for key, value in config.chat_template_kwargs.items():
        flags += f" --chat-template-kwargs.{key} {shlex.quote(json.dumps(value))}"
    return flags
