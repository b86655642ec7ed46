"""Report page of a per-step DPO run."""

import math
from collections.abc import Sequence
from pathlib import Path

from selftaught import metrics
from selftaught.evaluation.evaluator import accuracy_of
from selftaught.records import read_rollouts
from selftaught.reports.method_page import (
    Figure,
    Section,
    Table,
    flagged_sections,
    method_report,
    point,
    shown,
)
from selftaught.runs.folder import Row, read_rows

NAMES: dict[str, str] = {
    "sft": "SFT", "rft": "RFT", "dpo": "DPO, random pairs", "dpo_edit": "DPO, most distant pairs",
    "step_dpo": "per-step DPO", "advantage": "advantage-weighted",
}  # fmt: skip


def report(out: Path) -> Path:
    """Write `report.html` and `report.md` of a per-step DPO run. Works during the run, too.

    Args:
        out: the run folder.

    Returns:
        The path of `report.html`.
    """
    rows = [row for row in read_rows(out / "metrics.jsonl") if "test" in row]
    by_method: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["size"]):
        by_method.setdefault(row["method"], []).append(row)
    lines = [
        (NAMES[method], [row["size"] for row in found], [_error(row) for row in found])
        for method, found in by_method.items()
    ]
    head = ["problems", "method", "test, greedy", "pairs or examples", "tokens trained", "tokens sampled", "SFT needs"]  # fmt: skip
    body = [
        [str(row["size"]), NAMES[row["method"]], shown(accuracy_of(row)), f"{row['training']['trained on']:,}",
         f"{row['training']['tokens']:,}", f"{row.get('sampled tokens', 0):,}", efficiency_shown(out, row, by_method.get("sft", []))]
        for row in sorted(rows, key=lambda row: (row["size"], list(NAMES).index(row["method"])))
    ]  # fmt: skip
    words = (
        "All methods use the same samples of the same SFT model. \u201cSFT needs\u201d is the "
        "factor by which SFT needs more training problems for the same test error, interpolated on "
        "its curve. Its 95% interval is a bootstrap over test problems. \u201cBeyond\u201d: SFT did "
        "not reach this error at any measured size."
    )
    link = ("Values of the steps, and first pits", "steps.html") if (out / "steps.html").exists() else None  # fmt: skip
    section = Section(
        "Test error by number of training problems", words,
        [Table(head, body, texts=["method"])], [Figure("Test error", lines, "training problems")] if lines else [], link,
    )  # fmt: skip
    best = next((row for row in reversed(rows) if row["method"] == "step_dpo"), None)
    lead = f"Per-step DPO reaches {shown(accuracy_of(best))} on {best['size']} problems." if best else "There are no results yet."  # fmt: skip
    return method_report(out, "per-step DPO", lead, [section, *flagged_sections(rows)])


def _error(row: Row) -> tuple[float, float, float]:
    at, low, high = point(accuracy_of(row))
    return 1 - at, 1 - high, 1 - low


def efficiency_shown(out: Path, row: Row, sft: Sequence[Row]) -> str:
    """Format the factor by which SFT needs more problems for the error of a row, with its
    interval."""
    if row["method"] == "sft" or len(sft) < 2:
        return "-"
    curve = [(each["size"], _verdicts(out, each)) for each in sft]
    own = _verdicts(out, row)
    ratio, low, high = metrics.efficiency(curve, row["size"], own)

    def factor(value: float) -> str:
        return "beyond" if math.isinf(value) else f"{value:.1f}\u00d7"

    return f"{factor(ratio)} [{factor(low)}, {factor(high)}]"


def _verdicts(out: Path, row: Row) -> list[bool]:
    """Return whether each test problem was answered correctly, in the order of the problems."""
    folder = out / f"size-{row['size']}" / row["method"]
    return [bool(one.correct) for one in read_rollouts(folder / "test.graded.jsonl")]
