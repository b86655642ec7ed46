"""The page of a comparison of several methods."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selftaught.evaluation.evaluator import accuracy_of
from selftaught.reports.method_page import Figure, Section, Table, method_report, shown
from selftaught.runs.folder import Row, read_rows


def report(out: Path) -> Path:
    """Write `report.html` and `report.md` of a comparison, also while it runs; returns the page."""
    rows = [row for row in read_rows(out / "metrics.jsonl") if "choices" in row]
    if not rows:
        return method_report(out, "comparison", "Nothing is measured yet.", [])
    ks = list(rows[0]["choices"]["majority"])
    n = ks[-1]

    def best(row: Row) -> str:
        return shown(tuple(row["choices"]["best"][n])) if "best" in row["choices"] else "-"

    head = ["method", "greedy", f"majority of {n}", f"best of {n}", f"any of {n}", "tokens sampled",
            "tokens trained", "minutes", "settings"]  # fmt: skip
    body = [
        [row["name"], shown(accuracy_of(row)), shown(tuple(row["choices"]["majority"][n])), best(row),
         shown(tuple(row["choices"]["pass"][n])), f"{row['sampled tokens']:,}",
         f"{row.get('trained tokens', row.get('training', {}).get('tokens', 0)):,}",
         f"{row.get('minutes', sum(row['seconds'].values()) / 60):.1f}", _settings(row)]
        for row in rows
    ]  # fmt: skip
    lines = [
        (f"{row['name']}, {'best' if way == 'best' else 'majority'} of k", [int(k) for k in ks],
         [tuple(row["choices"][way][k]) for k in ks])
        for row in rows for way in ("best", "majority") if way in row["choices"]
    ]  # fmt: skip
    count = accuracy_of(rows[0]).n
    words = (
        f"The same {count} test problems for all; 95% intervals. Tokens sampled are those drawn to "
        "learn from, the seed set's included; tokens trained, all that trainings read."
    )
    section = Section("Methods side by side", words, [Table(head, body, budget_notes(rows))],
                      [Figure("Right among k candidates", lines, "candidates, k")])  # fmt: skip
    finest = max(rows, key=lambda row: accuracy_of(row).accuracy)
    lead = f"Best greedy accuracy: {finest['name']}, {shown(accuracy_of(finest))}."
    return method_report(out, "comparison", lead, [section])


def _settings(row: Row) -> str:
    told = row.get("settings", {})
    return ", ".join(f"{name} {_one(value)}" for name, value in told.items()) or "-"


def _one(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, Sequence) else str(value)


def budget_notes(rows: Sequence[Row]) -> str:
    """Which methods sampled another number of tokens than the budget, or hardly trained."""
    notes = []
    for row in rows:
        if budget := row.get("budget"):
            sampled, share = row["sampled tokens"], row["sampled tokens"] / budget
            if abs(share - 1) > TOLERATED:
                notes.append(f"{row['name']} sampled {sampled:,} tokens, {share:.0%} of the budget of {budget:,}.")  # fmt: skip
            if 0 < row["last steps"] < FEW_STEPS:
                notes.append(f"{row['name']}'s last training had only {row['last steps']} optimizer step{'s' * (row['last steps'] > 1)}.")  # fmt: skip
    if not notes:
        return ""
    return (
        "Not at an equal budget: " + " ".join(notes) + " Numbers of samples are whole and are "
        "planned from a pilot; a larger --budget or more problems brings the methods closer together."
    )


TOLERATED = 0.1
"""How far from the budget a method may sample before the report says so."""


FEW_STEPS = 10
"""Optimizer steps below which the report says that a method hardly trained."""
