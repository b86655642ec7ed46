"""What a run did, told from its folder: tables for the terminal and one self-contained HTML page.

Model text is data here: Jinja2 escapes all of it, `printable` spells its control characters out,
and the page forbids scripts and the network. The plots hold none of it: they alone are Markup.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from markupsafe import Markup

from selftaught.evaluation.evaluator import Evaluation, Tally
from selftaught.printable import printable
from selftaught.records import OUTCOMES, Rollout, read_jsonl, rollout_from, write_atomically
from selftaught.reports.pages import (
    interval,
    iteration_name,
    markdown,
    percent,
    rendered,
    table_cell,
)
from selftaught.reports.plots import (
    Curve,
    Line,
    accuracy_plot,
    curve_plot,
)
from selftaught.reports.tables import accuracy_lines, markdown_table
from selftaught.runs.folder import read_json, read_rows

T = TypeVar("T")

ROLLOUTS_SHOWN = 10
"""Rollouts of each kind on the page."""

TRAINING_ROLLOUTS = ("rollouts.graded.jsonl", "rationalized.graded.jsonl")


@dataclass(frozen=True)
class Run:
    """A run folder as far as it has been written."""

    folder: Path
    rows: list[dict[str, Any]]
    """One per iteration, the base model first, as in `metrics.jsonl`."""
    validations: list[Evaluation]
    """One per row."""
    summary: dict[str, Any] | None
    """None while the run has not ended."""
    config: str
    versions: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def best(self) -> int:
        """The best iteration by the mean over groups, so far if the run has not ended; 0: base."""
        if self.summary is not None:
            return self.summary["best"]
        means = [each.group_mean.accuracy for each in self.validations]
        return self.iterations[means.index(max(means))] if means else 0

    @property
    def base_and_best(self) -> tuple[Evaluation, Evaluation] | None:
        """The two evaluations to compare: on the test split once there, else on validation."""
        if self.summary is not None and "test" in self.summary:
            test = self.summary["test"]
            return Evaluation.from_dict(test["base"]), Evaluation.from_dict(test["best"])
        by_iteration = dict(zip(self.iterations, self.validations, strict=True))
        return (by_iteration[0], by_iteration[self.best]) if 0 in by_iteration else None

    @property
    def iterations(self) -> list[int]:
        """The number of each row's iteration."""
        return [row["iteration"] for row in self.rows]

    @property
    def measured(self) -> list[Evaluation]:
        """Everything measured beside the iterations: the test split, and what it is compared to."""
        if self.summary is None:
            return []
        tests = [self.base_and_best] if "test" in self.summary else []
        compared = [Evaluation.from_dict(row) for row in self.summary.get("comparisons", ())]
        return [each for pair in tests if pair for each in pair] + compared


def read_run(folder: Path) -> Run:
    """What a run folder holds so far.

    Raises:
        ValueError: it is no run folder, or a file in it cannot be read as JSON.
    """
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        raise ValueError(
            f"{folder} is not a run folder: expected metrics.jsonl or config.yaml in it, found "
            "neither. Give the folder that `selftaught star --out` wrote."
        )
    rows = read_rows(folder / "metrics.jsonl")
    config = folder / "config.yaml"
    try:
        told = (
            (yaml.safe_load(config.read_text(encoding="utf-8")) or {}) if config.is_file() else {}
        )
    except yaml.YAMLError:  # changed by hand; the page shows it as it is
        told = {}
    begun = not rows and bool(told) and "rationalization" not in told  # by another command
    if begun or any("validation" not in row for row in rows):
        raise ValueError(
            f"{folder} is no run of STaR, and only those are put side by side; its own page is written "
            "by `selftaught report` with this folder alone, and `selftaught compare` compares methods."
        )
    return Run(
        folder,
        rows,
        [Evaluation.from_dict(row["validation"]) for row in rows],
        read_json(folder / "summary.json"),
        config.read_text(encoding="utf-8") if config.is_file() else "",
        read_json(folder / "versions.json") or {},
    )


def report(run: Path) -> Path:
    """Write `report.html` and `report.md` into a run folder, also while it runs; returns the page."""
    told = read_run(run)
    kinds = rollout_kinds(run)
    page = rendered(
        "run.html.j2", title=told.name, run=told, kinds=kinds, headline=headline,
        funnel_line=funnel_line, **_run_plots(told),
    )  # fmt: skip
    write_atomically(run / "report.md", _run_markdown(told))
    write_atomically(run / "report.html", page)
    return run / "report.html"


def compare_runs(runs: Sequence[Path], out: Path) -> Path:
    """Write one page that puts several runs side by side; returns it."""
    told = [read_run(run) for run in runs]
    if len(told) < 2:
        raise ValueError(f"expected at least two run folders to compare, got {len(told)}.")
    lines = [_line(run, lambda evaluation: evaluation.group_mean) for run in told]
    plot = Markup(accuracy_plot("runs", "Held-out accuracy by iteration, a line per run", lines))
    pairs = [run.base_and_best for run in told]
    groups = list(dict.fromkeys(group for pair in pairs if pair for group in pair[1].groups))
    differing = _differences([yaml.safe_load(run.config) or {} for run in told])
    page = rendered(
        "compare.html.j2",
        title=f"{len(told)} runs side by side",
        runs=told,
        pairs=pairs,
        groups=groups,
        differing=differing,
        plot=plot,
    )
    write_atomically(out, page)
    return out


def _differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The settings in which configs differ, each with its value in every one."""
    flat = [dict(_leaves(config)) for config in configs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    shown = {key: [str(config.get(key, "-")) for config in flat] for key in keys}
    return {key: values for key, values in shown.items() if len(set(values)) > 1}


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


# Tables in plain text and in Markdown


def _run_markdown(run: Run) -> str:
    parts = [f"# {table_cell(run.name)}", table_cell(headline(run))]
    if run.validations:
        heads = [iteration_name(number) for number in run.iterations]
        accuracies = markdown(["accuracy", *heads], accuracy_lines(run.validations))
        parts += ["## Held-out accuracy by iteration", accuracies]
    if any("funnel" in row for row in run.rows):
        body = [[str(row["iteration"]), *(f"{n:,}" for n in funnel_line(row["funnel"]).values())]
                for row in run.rows if "funnel" in row]  # fmt: skip
        head = ["iteration", *funnel_line(next(r["funnel"] for r in run.rows if "funnel" in r))]
        parts += ["## What became of the questions", markdown(head, body)]
    if run.measured:
        parts += ["## Test and comparisons", markdown_table(run.measured)]
    return "\n\n".join(parts) + "\n"


# Words and numbers of the page


# Rollouts to show


@dataclass(frozen=True)
class Shown:
    """A rollout on the page, with the iteration it comes from."""

    iteration: int
    rollout: Rollout


@dataclass(frozen=True)
class Kind:
    """A kind of rollout: how many the run has, and a few spread over it."""

    name: str
    total: int
    shown: list[Shown]


def rollout_kinds(run: Path) -> list[Kind]:
    """For every kind of rollout, the same ten at every call, spread over the iterations.

    The direct samples of training are shown; before the first iteration, those of validation.
    """
    names = [*OUTCOMES, "rationalized, right", "rationalized, not right"]
    totals = dict.fromkeys(names, 0)
    found: dict[str, list[list[Shown]]] = {name: [] for name in names}
    for iteration, path in _graded_files(run):
        kept = {name: _Spread(2 * ROLLOUTS_SHOWN) for name in names}
        for row in read_jsonl(path):
            if row.get("outcome") is not None:
                rollout = rollout_from(row)
                kept[_kind(rollout)].add(rollout)
        for name, spread in kept.items():
            totals[name] += spread.seen
            found[name].append([Shown(iteration, rollout) for rollout in spread.items])
    return [Kind(name, totals[name], _in_turn(found[name], ROLLOUTS_SHOWN)) for name in names]


def _graded_files(run: Path) -> list[tuple[int, Path]]:
    """The graded rollouts to show, by iteration."""
    for names in (TRAINING_ROLLOUTS, ("validation.graded.jsonl",)):
        files = [
            (int(folder.name.removeprefix("iteration-")), folder / name)
            for folder in run.glob("iteration-*")
            if folder.name.removeprefix("iteration-").isdecimal()
            for name in names
            if (folder / name).is_file()
        ]
        if files:
            return sorted(files)
    return []


def _kind(rollout: Rollout) -> str:
    if rollout.origin == "rationalized":
        return f"rationalized, {'right' if rollout.outcome == 'right' else 'not right'}"
    return str(rollout.outcome)


class _Spread:
    """At most `limit` evenly spaced rollouts of a stream that is too long to keep."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.items: list[Rollout] = []
        self.seen = 0
        self._stride = 1

    def add(self, item: Rollout) -> None:
        """Offer the next item of the stream."""
        if self.seen % self._stride == 0:
            if len(self.items) == self.limit:
                self.items = self.items[::2]
                self._stride *= 2
            if self.seen % self._stride == 0:
                self.items.append(item)
        self.seen += 1


def _in_turn(piles: Sequence[Sequence[T]], limit: int) -> list[T]:
    """`limit` items, an equal share from every pile as far as it goes, evenly spaced in each."""
    shares = [0] * len(piles)
    while sum(shares) < min(limit, sum(map(len, piles))):
        for index, pile in enumerate(piles):
            if shares[index] < len(pile) and sum(shares) < limit:
                shares[index] += 1
    return [
        pile[position * len(pile) // share]
        for pile, share in zip(piles, shares, strict=True)
        for position in range(share)
    ]


# The page


def _run_plots(run: Run) -> dict[str, Any]:
    """The plots of a run's page; None where there is nothing to draw yet."""
    drawn: dict[str, Any] = dict.fromkeys(("accuracy_plot", "group_plot", "loss_plot", "rate_plot"))
    groups = list(dict.fromkeys(name for each in run.validations for name in each.groups))
    if run.rows:
        every = _line(run, lambda evaluation: evaluation.group_mean)
        drawn["accuracy_plot"] = Markup(
            accuracy_plot("accuracy", "Held-out accuracy by iteration", [every])
        )
    if groups:
        lines = [
            _line(run, lambda evaluation, g=group: evaluation.groups.get(g)) for group in groups
        ]
        drawn["group_plot"] = Markup(
            accuracy_plot("groups", "Held-out accuracy by iteration, a line per group", lines)
        )
    if loss := _curve(run.rows, "loss"):
        drawn["loss_plot"] = Markup(curve_plot("loss", "Training loss by step", loss))
    if rate := _curve(run.rows, "learning_rate"):
        drawn["rate_plot"] = Markup(curve_plot("rate", "Learning rate by step", rate))
    return drawn | {"groups": groups}


def _line(run: Run, pick: Callable[[Evaluation], Tally | Evaluation | None]) -> Line:
    """One line of an accuracy plot: what `pick` takes of each validation, where it takes any."""
    picked = [(at, pick(each)) for at, each in zip(run.iterations, run.validations, strict=True)]
    found = [(at, tally) for at, tally in picked if tally is not None]
    return [at for at, _ in found], [(t.accuracy, t.low, t.high) for _, t in found]


def _curve(rows: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """The logged values of `key`, iteration after iteration, at most about 200 points in each."""
    pieces, before = [], 0
    for row in rows:
        training = row.get("training", {})
        points = [
            (before + entry["step"], entry[key])
            for entry in training.get("log", ())
            if math.isfinite(entry.get(key, math.nan))
        ]
        if points:
            pieces.append(tuple(zip(*points[:: -(-len(points) // 200)], strict=True)))
        before += training.get("steps", 0)
    return pieces


def headline(run: Run) -> str:
    """One sentence: what the run did and where it stands."""
    if run.base_and_best is None:
        return "Nothing is measured yet: the base model's validation has not ended."
    base, best = (each.group_mean for each in run.base_and_best)
    model, groups = run.base_and_best[0].model, len(run.base_and_best[0].groups)
    split = "test" if run.measured else "validation"
    over = f", the mean of {groups} groups" if groups > 1 else ""
    done = run.iterations[-1]
    if done == 0 and run.summary is None:
        return printable(
            f"Still running: nothing is trained yet; the base model, {model}, reaches "
            f"{percent(base.accuracy)} ({interval(base)}) on the {split} problems."
        )
    told = f"{done} iteration{'s' * (done != 1)} from {model}"
    if run.best == 0:
        result = (
            f"none better than the base model's {percent(base.accuracy)} on the {split} problems"
        )
    else:
        result = (
            f"{split} accuracy from {percent(base.accuracy)} to {percent(best.accuracy)} "
            f"({interval(best)}{over}) after iteration {run.best}"
        )
    if run.summary is None:
        return printable(f"Still running: {told}; {result} so far.")
    minutes = run.summary.get("minutes")
    took = f" in {minutes:.1f} minutes" if minutes is not None else ""
    return printable(f"{told}{took}: {result}; stopped: {run.summary['why stopped']}.")


def funnel_line(funnel: Mapping[str, Any]) -> dict[str, int]:
    """One iteration's counts in the order in which rollouts fall away."""
    sampled, hinted = funnel["sampled"], funnel.get("rationalized") or {}
    unanswered = sampled["no answer"] + sampled["cut by length"]
    return {
        "asked": funnel["asked"],
        "answered": sum(sampled.values()) - unanswered,
        "right": sampled["right"],
        "wrong": sampled["wrong"],
        "no answer": sampled["no answer"],
        "cut by length": sampled["cut by length"],
        "ungradable": sampled["ungradable"],
        "hinted": funnel.get("hinted", 0),
        "rationalized right": hinted.get("right", 0),
        "trained on": funnel["trained on"],
    }
