"""Report of a run in HTML and Markdown: sections with text, tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from selftaught.evaluation.evaluator import Evaluation, Tally
from selftaught.printable import printable
from selftaught.records import write_atomically
from selftaught.reports.pages import markdown, percent, rendered, shortened
from selftaught.reports.plots import interval_plot
from selftaught.runs.folder import Row, read_json, read_rows

Point = tuple[float, float, float]
"""A value and the ends of its confidence interval."""


@dataclass(frozen=True)
class Figure:
    """A line plot."""

    caption: str
    lines: Sequence[tuple[str, Sequence[float], Sequence[Point]]]
    """Name, x values and y values with intervals of each line. A point without an interval contains
    the value three times."""
    across: str
    """Label of the x axis."""
    percent: bool = True
    """Show y values as percentages."""
    log: bool = True
    """Use a logarithmic x axis with base 2."""
    up: str = ""
    """Label of the y axis."""


@dataclass(frozen=True)
class Table:
    """A table of text cells. The first column contains the names of the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """Text below the table."""
    texts: Sequence[str] = ()
    """Names of the columns of text, other than the first. They are left-aligned and wrap."""
    best: Sequence[int] = ()
    """Indices of the rows that are marked as the best."""


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    title: str
    words: str
    """Text below the title."""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    link: tuple[str, str] | None = None
    """Text and file name of a link to another page in the same folder."""


def point(tally: Tally | Evaluation) -> Point:
    """Return a measured share with its confidence interval."""
    return tally.accuracy, tally.low, tally.high


def shown(at: Point | Tally | Evaluation) -> str:
    """Format a share and its 95% interval, such as `41.7% [37.0, 46.5]`."""
    value, low, high = at if isinstance(at, tuple) else point(at)
    return f"{percent(value)} [{100 * low:.1f}, {100 * high:.1f}]"


def method_report(out: Path, method: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write `report.html` and `report.md` into a run folder. Works during the run, too.

    Args:
        out: the run folder.
        method: name of the method.
        lead: the main result in a sentence.
        sections: the sections of the report.

    Returns:
        The path of `report.html`.
    """
    title = out.resolve().name
    summary = read_json(out / "summary.json")
    values = [_section_values(section, number) for number, section in enumerate(sections)]
    config = out / "config.yaml"
    page = rendered(
        "method.html.j2",
        title=title,
        method=method,
        lead=lead,
        sections=values,
        running=summary is None,
        seconds=_seconds(out),
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        versions=read_json(out / "versions.json") or {},
    )
    write_atomically(out / "report.md", _markdown(title, lead, sections))
    write_atomically(out / "report.html", page)
    return out / "report.html"


def _section_values(section: Section, number: int) -> dict[str, object]:
    """Return the values of a section for the template, with figures as SVG."""
    plots = []
    for index, figure in enumerate(section.figures):
        svg = interval_plot(
            f"plot{number}-{index}", figure.caption, [(at, values) for _, at, values in figure.lines],
            across=figure.across, up=figure.up, percent=figure.percent, log=figure.log,
        )  # fmt: skip
        plots.append({"caption": figure.caption, "svg": Markup(svg), "names": [line[0] for line in figure.lines]})  # fmt: skip
    return {"title": section.title, "words": section.words, "tables": section.tables,
            "plots": plots, "link": section.link}  # fmt: skip


def flagged_sections(rows: Sequence[Row]) -> list[Section]:
    """Return the section on the completions that the checks excluded; none without checks."""
    counted = [row for row in rows if "flagged" in row]
    if not counted:
        return []
    body = [
        [row["name"], f"{sum(row['flagged'].values()):,}",
         ", ".join(f"{count:,} {why.removeprefix('flagged: ')}" for why, count in row["flagged"].items()) or "none"]
        for row in counted
    ]  # fmt: skip
    words = (
        "Correct completions that a check flags, with the first check that does. They are in no "
        "training set and in no preference pair. What no check flags can still be harmful."
    )
    table = Table(["model", "excluded", "by check"], body, texts=["by check"])
    return [Section("Completions excluded by checks", words, [table])]


def _seconds(out: Path) -> list[tuple[str, dict[str, float]]]:
    """Return the seconds per stage for each row of `metrics.jsonl`."""
    rows = read_rows(out / "metrics.jsonl")
    return [(row["name"], row["seconds"]) for row in rows if row.get("seconds")]


def _markdown(title: str, lead: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}", lead]
    for section in sections:
        parts += [f"## {section.title}", section.words]
        for table in section.tables:
            parts += [markdown(table.head, table.rows), *([table.note] if table.note else [])]
    return printable("\n\n".join(shortened(part, 100_000) for part in parts if part) + "\n")
