"""The command of STaR."""

import json
import shlex
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from selftaught.cli.output import DONE, bold, progress_bar, say
from selftaught.cli.stages import task_flags, values_of
from selftaught.printable import printable

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selftaught.methods.star import StarConfig


def plain_defaults(config: "StarConfig") -> dict[str, Any]:
    """The config's fields as defaults of a parser."""
    return {one.name: getattr(config, one.name) for one in fields(config)}


def star(options: "Namespace") -> int:
    from selftaught.methods.star import StarConfig, plan, run_star
    from selftaught.reports.tables import digits_table
    from selftaught.runs.folder import Watch, read_rows

    dry_run = options.pop("dry_run")
    config = StarConfig(**values_of(options))
    if dry_run:
        say(plan(config))
        return DONE
    metrics = config.out / "metrics.jsonl"
    if done := read_rows(metrics):
        say(f"Continuing {config.out} after iteration {done[-1]['iteration']}.")

    def tell(row: dict[str, Any]) -> None:
        print(_iteration_line(row), flush=True)

    summary = run_star(config, Watch(iteration=tell, progress=progress_bar))
    say("\n" + digits_table(read_rows(metrics)))
    print("\n" + _ending(config, summary))
    return DONE


def _iteration_line(row: dict[str, Any]) -> str:
    """What happened in an iteration, in one line."""
    from selftaught.evaluation.evaluator import Evaluation

    mean = Evaluation.from_dict(row["validation"]).group_mean
    held_out = f"held-out {mean.accuracy:.1%} [{mean.low:.1%}, {mean.high:.1%}]"
    seconds = f"{sum(row['seconds'].values()):.0f} s"
    if row["iteration"] == 0:
        return f"base          {bold(held_out)} · {seconds}"
    funnel = row["funnel"]
    dropped = ", ".join(f"{count} {why}" for why, count in funnel["dropped"].items()) or "none"
    sampled, rationalized = (sum(funnel[kind].values()) for kind in ("sampled", "rationalized"))
    from_text = row["training"].get("tokenized from text", 0)
    told = f"{from_text} tokenized from text · " if from_text else ""
    return (
        f"iteration {row['iteration']:<3} kept {funnel['kept']} of {sampled} · rationalized "
        f"{funnel['kept rationalized']} of {rationalized} · dropped: {dropped} · "
        f"{told}train loss {row['training']['loss']:.3f} · {bold(held_out)} · {seconds}"
    )


def _ending(config: "StarConfig", summary: dict[str, Any]) -> str:
    """Where everything is, and what to do next."""
    from selftaught.evaluation.evaluator import Evaluation

    out = config.out
    asked = task_flags(config.task, config.task_options)
    if config.prompt != "few_shot":
        asked += f" --prompt {config.prompt}"
    if config.system_prompt:
        asked += f" --system-prompt {shlex.quote(config.system_prompt)}"
    for key, value in config.chat_template_kwargs.items():
        asked += f" --chat-template-kwargs.{key} {shlex.quote(json.dumps(value))}"
    if config.max_tokens is not None:
        asked += f" --max_tokens {config.max_tokens}"
    base, best = (
        Evaluation.from_dict(summary["test"][name]).group_mean for name in ("base", "best")
    )
    lines = [
        f"Stopped: {summary['why stopped']}. Best: iteration {summary['best']}."
        if summary["best"]
        else f"Stopped: {summary['why stopped']}. No iteration beat the base model.",
        f"Model   {summary['best model']}",
        f"Page    {out / 'report.html'}",
        f"Run     {out}  (every rollout, every metric; repeat the command to continue)",
        f"Next    selftaught evaluate --model {summary['best model']}{asked} "
        f"--out {out / 'evaluate.jsonl'}",
        f"        selftaught report {out} ANOTHER_RUN",
    ]
    tested = (
        f"Test, never trained on: {base.accuracy:.1%} [{base.low:.1%}, {base.high:.1%}] -> "
        f"{bold(f'{best.accuracy:.1%}')} [{best.low:.1%}, {best.high:.1%}] ({best.n} problems)."
    )
    stopped, *where = map(printable, lines)
    return "\n".join([stopped, tested, *where])
