"""Report page of a comparison of several methods."""

from collections.abc import Sequence
from pathlib import Path

from selftaught.evaluation.evaluator import accuracy_of
from selftaught.reports.method_page import Figure, Section, Table, method_report, shown
from selftaught.runs.folder import Row, read_rows


def report(out: Path) -> Path:
    """Write `report.html` and `report.md` of a comparison. Works during the run, too.

    Args:
        out: the run folder.

    Returns:
        The path of `report.html`.
    """
    rows = [row for row in read_rows(out / "metrics.jsonl") if "choices" in row]
    if not rows:
        return method_report(out, "comparison", "There are no results yet.", [])
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
        (f"{row['name']}, {'best' if rule == 'best' else 'majority'} of k", [int(k) for k in ks],
         [tuple(row["choices"][rule][k]) for k in ks])
        for row in rows for rule in ("best", "majority") if rule in row["choices"]
    ]  # fmt: skip
    count = accuracy_of(rows[0]).n
    words = (
        f"All methods are evaluated on the same {count} test problems. Intervals are 95% "
        "confidence intervals. Tokens sampled: tokens generated for training data, the seed set "
        "included. Tokens trained: tokens processed in training, over all epochs."
    )
    greedy = [accuracy_of(row).accuracy for row in rows]
    first = greedy.index(max(greedy))
    table = Table(head, body, budget_notes(rows), texts=["settings"], best=[first])
    section = Section("Accuracy and cost of each method", words, [table],
                      [Figure("Test accuracy by number of candidates", lines, "candidates, k")])  # fmt: skip
    best_row = rows[first]
    lead = f"Best greedy accuracy: {best_row['name']}, {shown(accuracy_of(best_row))}."
    return method_report(out, "comparison", lead, [section])


def _settings(row: Row) -> str:
    settings = row.get("settings", {})
    return ", ".join(f"{name} {_one(value)}" for name, value in settings.items()) or "-"


def _one(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def budget_notes(rows: Sequence[Row]) -> str:
    """Return a note on methods that missed the token budget or trained for only a few steps.

    Empty if there are none.
    """
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
        "The budgets are not equal: "
        + " ".join(notes)
        + " The numbers of samples are integers and are "
        "planned from a small pilot. A larger --budget or more problems reduces the differences."
    )


TOLERATED = 0.1
"""Maximum relative difference from the token budget that needs no note."""


FEW_STEPS = 10
"""Number of optimizer steps of the last training below which the report has a note."""
