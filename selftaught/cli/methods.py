"""The commands of the methods: STaR, RFT, V-STaR, per-step DPO and their comparison."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.arguments import add_options
from selftaught.cli.output import DONE, bold, progress_bar, say
from selftaught.cli.push import HubOptions, check_push, hub_options, push_after
from selftaught.cli.stages import task_flags, values_of
from selftaught.evaluation.evaluator import Evaluation
from selftaught.methods.catalog import METHODS, method_of_folder
from selftaught.methods.config import MethodConfig
from selftaught.methods.plan import plan
from selftaught.printable import counted, printable
from selftaught.runs.folder import ProgressReporter, Row, check_config, read_json, read_rows


@dataclass(frozen=True)
class DryRun:
    """The option `--dry-run`, which every method has."""

    heading: ClassVar[str] = "run"

    dry_run: bool = False
    """Check all options and inputs, print the plan, a time and the first prompt, and stop. For the
    time, some prompts are sampled and one step is trained; nothing is stored."""


def add_arguments(command: str, parser: ArgumentParser, given: Sequence[str]) -> Sequence[type]:
    """Add the options of a method and return their dataclasses."""
    del given
    parser.add_argument("--method", type=str, default=command)  # `config.yaml` contains it
    more = () if command == "compare" else (HubOptions,)  # a comparison has several models
    return add_options(parser, METHODS[command].config, DryRun, *more)


def run(command: str, options: Namespace) -> int:
    """Run a method and return the exit code."""
    method, values = METHODS[command], values_of(options)
    if (named := values.pop("method")) != command:
        raise ValueError(
            f"Expected options of {command!r} in the --config file, got those of {named!r}. Use: "
            f"selftaught {named} --config FILE"
        )
    dry_run = values.pop("dry_run")
    hub = HubOptions() if command == "compare" else hub_options(values)
    refuse_old_batches(options)
    config = method.config(**values)
    if dry_run:
        opened = method.open(config)
        say(plan(opened, method.work(opened), method.cost(opened), method.changeable))
        return DONE
    check_config(config.out, config.plain(), method.changeable, config.updated)
    check_push(hub, config.out)
    if done := read_rows(config.out / "metrics.jsonl"):
        last = done[-1]
        after = f"iteration {last['iteration']}" if "iteration" in last else repr(last.get("name"))
        say(f"Continuing {config.out} after {after}.")
    line = iteration_line if command == "star" else stage_line
    reporter = ProgressReporter(
        iteration=lambda row: print(line(row), flush=True), progress=progress_bar
    )
    summary = method.run(config, reporter)
    print("\n" + (star_ending(config, summary) if command == "star" else ending(config, summary)))
    push_after(hub, config.out)
    return DONE


def refuse_old_batches(options: Namespace) -> None:
    """Raise a `ValueError` if a --config file of an earlier version would get another batch size.

    Earlier versions did not multiply gradient accumulation by the number of processes.
    """
    for path in options.get("config") or []:
        given = yaml.safe_load(Path(str(path)).read_text(encoding="utf-8")) or {}
        steps = given.get("gradient_accumulation_steps")
        processes = given.get("num_processes", 1)
        if steps is None or "train_batch_size" in given or processes == 1:
            continue
        size = given.get("per_device_train_batch_size", 8) * steps
        raise ValueError(
            f"{path} has gradient_accumulation_steps without train_batch_size. Up to now this meant "
            f"{size} examples per optimizer step for any number of processes; as in TRL, it now "
            f"means {size * processes} with {processes} processes. Replace it by train_batch_size: "
            f"{size} or {size * processes}."
        )


def stage_line(row: Row) -> str:
    """Return the line that reports a finished stage."""
    if "name" not in row:  # a row of STaR inside a comparison
        return f"STaR, iteration {row['iteration']}"
    seconds = f"{sum(row.get('seconds', {}).values()):.0f} s"
    parts = []
    if "training" in row:
        training = row["training"]
        parts.append(f"{counted(training['steps'], 'step')} on {training['trained on']:,}, loss {training['loss']:.3f}")  # fmt: skip
    if "test" in row:
        test = row["test"]
        parts.append(f"test {test['accuracy']:.1%} [{test['low']:.1%}, {test['high']:.1%}]")
    if (outcome := row.get("summary", row.get("told"))) is not None:  # "told" in older runs
        parts.append(str(outcome))
    return printable(f"{row['name']:<24} {' · '.join([*parts, seconds])}")


def ending(config: MethodConfig, summary: Row) -> str:
    """Return the results and the paths of the outputs."""
    lines = [(config.out / "report.md").read_text(encoding="utf-8")]
    if "best model" in summary:
        lines.append(_model_line(config.out, summary["best model"]))
    if "verifier" in summary:
        lines.append(f"Verifier {summary['verifier']}")
    next_command = f"Next    selftaught report {config.out} ANOTHER_RUN"
    return printable("\n".join([*lines, *_places(config.out), next_command]))


def _model_line(out: Path, model: str) -> str:
    """Return the line that names the best model, which a run without a better one has not trained."""
    trained = Path(model).resolve().is_relative_to(out.resolve())
    return f"Model   {model}{'' if trained else ' (the base model: no trained model was better)'}"


def _places(out: Path) -> list[str]:
    return [
        f"Page    {out / 'report.html'}",
        f"Run     {out}  (all rollouts and metrics)",
    ]


def iteration_line(row: Row) -> str:
    """Return the line that reports a finished iteration of STaR."""
    mean = Evaluation.from_dict(row["validation"]).group_mean
    held_out = f"held-out {mean.accuracy:.1%} [{mean.low:.1%}, {mean.high:.1%}]"
    seconds = f"{sum(row['seconds'].values()):.0f} s"
    if row["iteration"] == 0:
        return f"base          {bold(held_out)} · {seconds}"
    funnel = row["funnel"]
    dropped = ", ".join(f"{count} {why}" for why, count in funnel["dropped"].items()) or "none"
    sampled, rationalized = (sum(funnel[kind].values()) for kind in ("sampled", "rationalized"))
    from_text = row["training"].get("tokenized from text", 0)
    again = f"{from_text} tokenized from text · " if from_text else ""
    return (
        f"iteration {row['iteration']:<3} kept {funnel['kept']} of {sampled} · rationalized "
        f"{funnel['kept rationalized']} of {rationalized} · dropped: {dropped} · "
        f"{again}train loss {row['training']['loss']:.3f} · {bold(held_out)} · {seconds}"
    )


def star_ending(config: MethodConfig, summary: Row) -> str:
    """Return the results of STaR, the paths of the outputs, and the next commands."""
    out, best_model = config.out, summary["best model"]
    base, best = (
        Evaluation.from_dict(summary["test"][name]).group_mean for name in ("base", "best")
    )
    groups = len(summary["test"]["best"]["groups"])
    over = f", mean of {groups} groups" if groups > 1 else ""
    lines = [
        _model_line(out, best_model),
        *_places(out),
        f"Next    selftaught evaluate --model {best_model}{_asked(config)} --out {out / 'evaluate.jsonl'}",
        f"        selftaught report {out} ANOTHER_RUN",
    ]
    tested = (
        f"Test, never trained on: {base.accuracy:.1%} [{base.low:.1%}, {base.high:.1%}] -> "
        f"{bold(f'{best.accuracy:.1%}')} [{best.low:.1%}, {best.high:.1%}] ({best.n} problems{over})."
    )
    which = f"Best: iteration {summary['best']}." if summary["best"] else "No iteration beat the base model."  # fmt: skip
    stopped = f"Stopped: {summary['why stopped']}. {which}"
    from selftaught.reports.tables import digits_table

    table = digits_table(read_rows(out / "metrics.jsonl"))
    return "\n".join([printable(table), "", printable(stopped), tested, *map(printable, lines)])


def _asked(config: MethodConfig) -> str:
    """Return the flags with which `selftaught evaluate` uses the same task and prompts."""
    flags = task_flags(config.task, config.task_options)
    if config.prompt != "few_shot":
        flags += f" --prompt {config.prompt}"
    if config.system_prompt:
        flags += f" --system-prompt {shlex.quote(config.system_prompt)}"
    for key, value in config.chat_template_kwargs.items():
        flags += f" --chat-template-kwargs.{key} {shlex.quote(json.dumps(value))}"
    return flags if config.max_tokens is None else f"{flags} --max-tokens {config.max_tokens}"


def report_of(folder: Path) -> Callable[[Path], Path] | None:
    """Return the function that writes the page of a run folder; None for an unfinished STaR folder.

    Raises:
        ValueError: the folder was not made by a method; the message says where its results are.
    """
    if (name := method_of_folder(folder)) is not None:
        return METHODS[name].report
    status, config = read_json(folder / "status.json") or {}, folder / "config.yaml"
    options = _options(config)
    if "preset" in options or status.get("method") == "Quiet-STaR":
        return _quiet_page
    if "pauses" in options:
        raise ValueError(
            f"{folder} contains measurements with pause tokens, which have no page. Repeat the "
            f"command with --config {config} to print their table; nothing is measured again."
        )
    if (folder / "config.json").is_file():
        raise ValueError(
            f"Expected a run folder, got the model {folder}. Give the run folder that contains it, "
            f"or measure the model: selftaught evaluate --model {folder}."
        )
    stores = sorted(path.name for path in folder.glob("*.jsonl"))
    if stores and not options and "metrics.jsonl" not in stores:
        raise ValueError(
            f"Expected a run folder, got {folder} with the outputs of single stages "
            f"({', '.join(stores[:3])}). Only runs have a page; `selftaught evaluate` prints a "
            "table."
        )
    return None


def _options(config: Path) -> Mapping[str, Any]:
    return (yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config.is_file() else {}


def _quiet_page(folder: Path) -> Path:
    """Return the page of a Quiet-STaR run, which its training writes when it ends.

    Raises:
        ValueError: the training has not finished.
    """
    page = folder / "report.html"
    if not page.is_file():
        raise ValueError(
            f"The Quiet-STaR run in {folder} has not finished. It writes its page, {page}, at the "
            f"end. See its progress with: selftaught status {folder}"
        )
    return page
