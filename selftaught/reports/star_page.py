"""Report page of a STaR run, and the comparison page of several STaR runs.

Model text is untrusted: Jinja2 escapes it, `printable` replaces control characters, and the page
forbids scripts and network access. Only the plots, which contain no model text, are not escaped.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

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
from selftaught.reports.paired import Paired, outcomes, paired, problem_key
from selftaught.reports.plots import (
    Curve,
    Line,
    accuracy_plot,
    curve_plot,
)
from selftaught.reports.tables import accuracy_lines, markdown_table
from selftaught.runs.folder import Row, read_json, read_rows
from selftaught.tasks import open_task

T = TypeVar("T")

ROLLOUTS_SHOWN = 10
"""Maximum number of rollouts of each kind on the page."""

TRAINING_ROLLOUTS = ("rollouts.graded.jsonl", "rationalized.graded.jsonl")


@dataclass(frozen=True)
class Run:
    """The contents of a run folder, which may be incomplete."""

    folder: Path
    rows: list[Row]
    """Rows of `metrics.jsonl`: one per iteration, the base model first."""
    validations: list[Evaluation]
    """Validation results, one per row."""
    summary: Row | None
    """Contents of `summary.json`. None means the run has not ended."""
    config: str
    """Text of `config.yaml`."""
    versions: Row
    """Contents of `versions.json`."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def options(self) -> Row:
        """Contents of `config.yaml`. Empty if the file is not a mapping in YAML."""
        try:
            found = yaml.safe_load(self.config)
        except yaml.YAMLError:  # edited by the user; the page shows the text unchanged
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def best(self) -> int:
        """Number of the best iteration so far, by the mean accuracy over groups. 0: base model."""
        if self.summary is not None:
            return self.summary["best"]
        means = [each.group_mean.accuracy for each in self.validations]
        return self.iterations[means.index(max(means))] if means else 0

    @property
    def base_and_best(self) -> tuple[Evaluation, Evaluation] | None:
        """Evaluations of the base model and of the best iteration.

        On the test split if the run has ended, else on the validation split. None means no results yet.
        """
        if self.summary is not None and "test" in self.summary:
            test = self.summary["test"]
            return Evaluation.from_dict(test["base"]), Evaluation.from_dict(test["best"])
        by_iteration = dict(zip(self.iterations, self.validations, strict=True))
        return (by_iteration[0], by_iteration[self.best]) if 0 in by_iteration else None

    @property
    def iterations(self) -> list[int]:
        """Number of the iteration of each row."""
        return [row["iteration"] for row in self.rows]

    @property
    def measured(self) -> list[Evaluation]:
        """Evaluations other than those of iterations: the test split and its comparisons."""
        if self.summary is None:
            return []
        tests = [self.base_and_best] if "test" in self.summary else []
        compared = [Evaluation.from_dict(row) for row in self.summary.get("comparisons", ())]
        return [each for pair in tests if pair for each in pair] + compared


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: the folder is not the run folder of a STaR run, or a file in it is not JSON.
    """
    if not any((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        raise ValueError(
            f"{folder} is not a run folder: expected metrics.jsonl or config.yaml in it, found "
            "neither. Give the folder that `selftaught star --out` wrote."
        )
    rows = read_rows(folder / "metrics.jsonl")
    config = folder / "config.yaml"
    run = Run(
        folder,
        rows,
        [Evaluation.from_dict(row["validation"]) for row in rows if "validation" in row],
        read_json(folder / "summary.json"),
        config.read_text(encoding="utf-8") if config.is_file() else "",
        read_json(folder / "versions.json") or {},
    )
    # Only the options of STaR contain `rationalization`.
    other_method = not rows and bool(run.options) and "rationalization" not in run.options
    if other_method or len(run.validations) < len(rows):
        raise ValueError(
            f"{folder} is not a run of STaR. One page can show several runs only if all are runs "
            "of STaR. Run `selftaught report` with this folder alone; to compare methods, use "
            "`selftaught compare`."
        )
    return run


def report(run: Path) -> Path:
    """Write `report.html` and `report.md` into the folder of a STaR run. Works during the run, too.

    Args:
        run: the run folder.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: the folder is not the run folder of a STaR run.
    """
    contents = read_run(run)
    kinds = rollout_kinds(run)
    page = rendered(
        "run.html.j2", title=contents.name, run=contents, kinds=kinds, headline=headline,
        funnel_line=funnel_line, changes=changes(contents), about_changes=about_changes(contents),
        **_run_plots(contents),
    )  # fmt: skip
    write_atomically(run / "report.md", _run_markdown(contents))
    write_atomically(run / "report.html", page)
    return run / "report.html"


def compare_runs(runs: Sequence[Path], out: Path) -> Path:
    """Write a page that compares several STaR runs.

    Args:
        runs: at least two run folders.
        out: HTML file to write.

    Returns:
        `out`.

    Raises:
        ValueError: fewer than two folders, or a folder is not the run folder of a STaR run.
    """
    contents = [read_run(run) for run in runs]
    if len(contents) < 2:
        raise ValueError(f"expected at least two run folders to compare, got {len(contents)}.")
    lines = [_line(run, lambda evaluation: evaluation.group_mean) for run in contents]
    plot = Markup(
        accuracy_plot("runs", "Validation accuracy by iteration, one line per run", lines)
    )
    pairs = [run.base_and_best for run in contents]
    means = [(pair[0].group_mean, pair[1].group_mean) if pair else None for pair in pairs]
    groups = list(dict.fromkeys(group for pair in pairs if pair for group in pair[1].groups))
    first, *others = contents
    against = [(run.name, best_difference(first, run)) for run in others]
    differing = _differences([run.options for run in contents])
    page = rendered(
        "compare.html.j2",
        title=f"Comparison of {len(contents)} runs",
        runs=contents,
        pairs=pairs,
        means=means,
        against=against,
        groups=groups,
        differing=differing,
        plot=plot,
    )
    write_atomically(out, page)
    return out


def changes(run: Run) -> list[tuple[str, str, Paired]]:
    """Return the problems gained and lost: name of the model, what it is compared with, difference.

    Every iteration is compared with the one before it on the validation problems. In a run that has
    ended, the best iteration is also compared with the base model on the test problems. Models without
    graded completions are left out.
    """
    names = [
        (iteration_name(after), iteration_name(before),
         f"iteration-{before}/validation", f"iteration-{after}/validation")
        for before, after in pairwise(run.iterations)
    ]  # fmt: skip
    if run.best and run.summary is not None:
        names.append((f"{run.best}, test", "base, test", "test-base", f"test-iteration-{run.best}"))
    found = []
    for name, against, first, second in names:
        one, other = (outcomes(run.folder / f"{at}.graded.jsonl") for at in (first, second))
        if (difference := paired(one, other)) is not None:
            found.append((name, against, difference))
    return found


def about_changes(run: Run) -> str:
    """Explain the table of gained and lost problems, and what of it can be chance."""
    engine = run.options.get("sampler", "transformers")
    repeats = (
        "With the engine of this run, transformers, a model that is measured again in the same batches "
        "gives the same completions, so the changes are those of the model."
        if engine == "transformers"
        else f"With the engine of this run, {engine}, two measurements of one model can differ, because "
        "greedy completions can depend on the other requests in a batch. The counts include such "
        "differences; the run does not measure how many."
    )
    return printable(
        "Gained: problems that only this model has right. Lost: problems that only the model before it "
        "has right. If training made the model neither better nor worse, each of these problems would be "
        "gained or lost with equal probability; p is the probability of counts at least as unequal as "
        "these (exact McNemar test, two-sided). A large p does not show that two models are equal. "
        + repeats
    )


def difference_lines(runs: Sequence[Path]) -> list[str]:
    """Return a line for every run but the first: the paired difference of its best model."""
    first, *others = [read_run(run) for run in runs]
    lines = []
    for run in others:
        one = best_difference(first, run)
        lines.append(
            f"{run.name} against {first.name}: no shared test problems, or a run has not ended"
            if one is None
            else f"{run.name} against {first.name}: {100 * one.difference:+.1f} points "
            f"[{100 * one.low:+.1f}, {100 * one.high:+.1f}] on {one.n} test problems; gained "
            f"{one.gained}, lost {one.lost}, p = {one.p:.2g} (exact McNemar test)"
        )
    return lines


def best_difference(first: Run, second: Run) -> Paired | None:
    """Return the paired difference of the best models of two runs, on the test problems they share.

    The metric is that of the console and of the run's page: the mean over groups, where the task has any.
    None where one of the runs has not ended, or they share no problem.
    """
    found = []
    for run in (first, second):
        name = f"test-iteration-{run.best}" if run.best else "test-base"
        found.append(outcomes(run.folder / f"{name}.graded.jsonl"))
    return paired(found[0], found[1], _groups(first, found[0]))


def _groups(run: Run, names: Iterable[str]) -> dict[str, str]:
    """The group of every problem of a run's test file; empty where the task has no groups."""
    config = run.options
    if run.base_and_best is None or not run.base_and_best[1].groups or "task" not in config:
        return {}
    task = open_task(config["task"], **config.get("task_options", {}))
    group = task.group
    if group is None:
        return {}
    wanted = set(names)
    found = {problem_key(one): group(one) for one in task.problems("test")}
    return {name: group for name, group in found.items() if name in wanted}


def _differences(configs: Sequence[Mapping[str, object]]) -> dict[str, list[str]]:
    """Return the settings that differ between configs, with the value in each config."""
    flat = [dict(_leaves(config)) for config in configs]
    keys = list(dict.fromkeys(key for config in flat for key in config))
    shown = {key: [str(config.get(key, "-")) for config in flat] for key in keys}
    return {key: values for key, values in shown.items() if len(set(values)) > 1}


def _leaves(tree: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
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
        parts += ["## Validation accuracy by iteration", accuracies]
    if found := changes(run):
        body = [[name, against, f"{one.n:,}", f"{one.gained:,}", f"{one.lost:,}",
                 f"{one.gained - one.lost:+,}", f"{one.p:.2g}"] for name, against, one in found]  # fmt: skip
        head = ["iteration", "against", "problems", "gained", "lost", "net", "p"]
        parts += [
            "## Problems gained and lost",
            markdown(head, body, texts=2),
            table_cell(about_changes(run)),
        ]
    if any("funnel" in row for row in run.rows):
        body = [[str(row["iteration"]), *(f"{n:,}" for n in funnel_line(row["funnel"]).values())]
                for row in run.rows if "funnel" in row]  # fmt: skip
        head = ["iteration", *funnel_line(next(r["funnel"] for r in run.rows if "funnel" in r))]
        parts += ["## Outcomes by iteration", markdown(head, body)]
    if run.measured:
        parts += ["## Test results and comparisons", markdown_table(run.measured)]
    return "\n\n".join(parts) + "\n"


# Rollouts to show


@dataclass(frozen=True)
class Shown:
    """A rollout on the page, with the number of its iteration."""

    iteration: int
    rollout: Rollout


@dataclass(frozen=True)
class Kind:
    """A kind of rollout, such as an outcome."""

    name: str
    total: int
    """Number of rollouts of this kind in the run."""
    shown: list[Shown]
    """The rollouts that the page shows."""


def rollout_kinds(run: Path) -> list[Kind]:
    """Select up to ten rollouts of every kind, spread over the iterations. Deterministic.

    The rollouts are those for training problems. If there are none yet, those of validation are
    used.
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
    return [Kind(name, totals[name], _evenly(found[name], ROLLOUTS_SHOWN)) for name in names]


def _graded_files(run: Path) -> list[tuple[int, Path]]:
    """Return the files with the graded rollouts to show, with their iterations."""
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
    """Keeps at most `limit` evenly spaced rollouts of a stream that is too long for memory."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.items: list[Rollout] = []
        self.seen = 0
        self._stride = 1

    def add(self, item: Rollout) -> None:
        """Add the next item of the stream."""
        if self.seen % self._stride == 0:
            if len(self.items) == self.limit:
                self.items = self.items[::2]
                self._stride *= 2
            if self.seen % self._stride == 0:
                self.items.append(item)
        self.seen += 1


def _evenly(groups: Sequence[Sequence[T]], limit: int) -> list[T]:
    """Select `limit` items: equally many of every group if possible, evenly spaced in each
    group."""
    shares = [0] * len(groups)
    while sum(shares) < min(limit, sum(map(len, groups))):
        for index, group in enumerate(groups):
            if shares[index] < len(group) and sum(shares) < limit:
                shares[index] += 1
    return [
        group[position * len(group) // share]
        for group, share in zip(groups, shares, strict=True)
        for position in range(share)
    ]


# The page


def _run_plots(run: Run) -> dict[str, object]:
    """Return the plots of the page of a run. None means no data yet."""
    plots: dict[str, object] = {
        "accuracy_plot": None,
        "group_plot": None,
        "loss_plot": None,
        "rate_plot": None,
    }
    groups = list(dict.fromkeys(name for each in run.validations for name in each.groups))
    if run.rows:
        every = _line(run, lambda evaluation: evaluation.group_mean)
        plots["accuracy_plot"] = Markup(
            accuracy_plot("accuracy", "Validation accuracy by iteration", [every])
        )
    if groups:
        lines = [
            _line(run, lambda evaluation, g=group: evaluation.groups.get(g)) for group in groups
        ]
        plots["group_plot"] = Markup(
            accuracy_plot("groups", "Validation accuracy by iteration, one line per group", lines)
        )
    if loss := _curve(run.rows, "loss"):
        plots["loss_plot"] = Markup(curve_plot("loss", "Training loss by step", loss))
    if rate := _curve(run.rows, "learning_rate"):
        plots["rate_plot"] = Markup(curve_plot("rate", "Learning rate by step", rate))
    return plots | {"groups": groups}


def _line(run: Run, pick: Callable[[Evaluation], Tally | Evaluation | None]) -> Line:
    """Return a line of an accuracy plot.

    Args:
        pick: selects the value to plot from a validation result. None means the iteration has no point.
    """
    picked = [(at, pick(each)) for at, each in zip(run.iterations, run.validations, strict=True)]
    found = [(at, tally) for at, tally in picked if tally is not None]
    return [at for at, _ in found], [(t.accuracy, t.low, t.high) for _, t in found]


def _curve(rows: Sequence[Row], key: str) -> Curve:
    """Return the logged values of `key` per iteration, with at most about 200 points each."""
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
    """Return the result and the state of a run in one sentence."""
    if run.base_and_best is None:
        return "There are no results yet: the validation of the base model has not ended."
    base, best = (each.group_mean for each in run.base_and_best)
    groups = len(run.base_and_best[0].groups)
    model = run.options.get("model", run.base_and_best[0].model)
    split = "test" if run.measured else "validation"
    over = f", the mean of {groups} groups" if groups > 1 else ""
    done = run.iterations[-1]
    if done == 0 and run.summary is None:
        return printable(
            f"Still running: no iteration has ended; the base model, {model}, reaches "
            f"{percent(base.accuracy)} ({interval(base)}) on the {split} problems."
        )
    iterations = f"{done} iteration{'s' * (done != 1)} from {model}"
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
        return printable(f"Still running: {iterations}; {result} so far.")
    minutes = run.summary.get("minutes")
    took = f" in {minutes:.1f} minutes" if minutes is not None else ""
    return printable(f"{iterations}{took}: {result}; stopped: {run.summary['why stopped']}.")


def funnel_line(funnel: Row) -> dict[str, int]:
    """Return the counts of an iteration, from the questions asked to the examples trained on."""
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
