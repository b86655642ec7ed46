"""Report page of an RFT run."""

from collections.abc import Sequence
from pathlib import Path

from selftaught.evaluation.evaluator import accuracy_of
from selftaught.reports.method_page import (
    Figure,
    Point,
    Section,
    Table,
    flagged_sections,
    method_report,
    point,
    shown,
)
from selftaught.runs.folder import Row, read_rows


def report(out: Path) -> Path:
    """Write `report.html` and `report.md` of an RFT run. Works during the run, too.

    Args:
        out: the run folder.

    Returns:
        The path of `report.html`.
    """
    rows = read_rows(out / "metrics.jsonl")
    swept = sorted((row for row in rows if row["name"].startswith("RFT")), key=lambda row: row["k"])
    ks = [row["k"] for row in swept]

    def counts(key: str) -> list[Point]:
        return [(row[key],) * 3 for row in swept]

    accuracy = Figure(
        "Test accuracy by samples per problem",
        [("RFT", ks, [point(accuracy_of(row)) for row in swept])],
        "samples per problem, k",
    )
    paths = Figure(
        "Distinct and kept completions per problem",
        [
            ("distinct", ks, counts("distinct per problem")),
            ("kept", ks, counts("kept per problem")),
        ],
        "samples per problem, k",
        percent=False,
    )
    head = ["model", "test, greedy", "right per problem", "distinct per problem", "trained on", "tokens trained"]  # fmt: skip
    body = [
        [current_name(row["name"]), shown(accuracy_of(row)), _number(row, "right per problem"),
         _number(row, "distinct per problem"), f"{row['training']['trained on']:,}",
         f"{row['training']['tokens']:,}"]
        for row in rows
    ]  # fmt: skip
    words = (
        "Each model is the base model, fine-tuned on the seed set (the rationales of the dataset, "
        "or correct completions of the base model) and on one correct completion per distinct "
        "solution path. SFT is fine-tuned on the seed set only."
    )
    section = Section("Accuracy and distinct solution paths", words, [Table(head, body)], [accuracy, paths] if swept else [])  # fmt: skip
    return method_report(out, "RFT", _lead(rows, swept), [section, *flagged_sections(rows)])


OLD_NAMES = {
    "all right ones, k=": "all correct completions, k=",
    "as many at random, k=": "random sample, k=",
    "D alone, as many steps as k=": "D only, steps of k=",
}
"""Beginnings of names of rows that earlier versions wrote, and the present ones."""


def current_name(name: str) -> str:
    """Return the present name of a row of `metrics.jsonl`, which an earlier version may have written."""
    for old, new in OLD_NAMES.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _lead(rows: Sequence[Row], swept: Sequence[Row]) -> str:
    first = next((row for row in rows if row["name"] == "SFT"), None)
    parts = [f"SFT: {shown(accuracy_of(first))}."] if first else []
    if swept:
        last = swept[-1]
        parts.append(f"RFT with k={last['k']}: {shown(accuracy_of(last))} on {accuracy_of(last).n} test problems (greedy decoding).")  # fmt: skip
    return " ".join(parts) or "There are no results yet."


def _number(row: Row, key: str) -> str:
    return f"{row[key]:.2f}" if key in row else "-"
