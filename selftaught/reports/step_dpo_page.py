"""The page of a per-step DPO run."""

import math
from collections.abc import Sequence
from pathlib import Path

from selftaught import metrics
from selftaught.evaluation.evaluator import accuracy_of
from selftaught.records import read_rollouts
from selftaught.reports.method_page import Figure, Section, Table, method_report, point, shown
from selftaught.runs.folder import Row, read_rows

NAMES: dict[str, str] = {
    "sft": "SFT", "rft": "RFT", "dpo": "DPO, random pairs", "dpo_edit": "DPO, most distant pairs",
    "step_dpo": "per-step DPO", "advantage": "advantage-weighted",
}  # fmt: skip


def report(out: Path) -> Path:
    """Write `report.html` and `report.md` of a run, also while it runs; returns the page."""
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
        "All methods learn from the same samples of the same SFT model. \u201cSFT needs\u201d is how many "
        "times the problems SFT would need for the same error, read off its own curve; its 95% interval "
        "draws the test problems anew. Beyond: SFT was not as good at any size measured."
    )
    link = ("The steps, their values and pits", "steps.html") if (out / "steps.html").exists() else None  # fmt: skip
    section = Section(
        "Error against the number of problems", words,
        [Table(head, body)], [Figure("Test error", lines, "training problems")] if lines else [], link,
    )  # fmt: skip
    best = next((row for row in reversed(rows) if row["method"] == "step_dpo"), None)
    lead = f"Per-step DPO reaches {shown(accuracy_of(best))} on {best['size']} problems." if best else "Nothing is measured yet."  # fmt: skip
    return method_report(out, "per-step DPO", lead, [section])


def _error(row: Row) -> tuple[float, float, float]:
    at, low, high = point(accuracy_of(row))
    return 1 - at, 1 - high, 1 - low


def efficiency_shown(out: Path, row: Row, sft: Sequence[Row]) -> str:
    """How many times a row's problems SFT would need for its error, with the interval, in words."""
    if row["method"] == "sft" or len(sft) < 2:
        return "-"
    curve = [(each["size"], _verdicts(out, each)) for each in sft]
    own = _verdicts(out, row)
    ratio, low, high = metrics.efficiency(curve, row["size"], own)

    def told(value: float) -> str:
        return "beyond" if math.isinf(value) else f"{value:.1f}\u00d7"

    return f"{told(ratio)} [{told(low)}, {told(high)}]"


def _verdicts(out: Path, row: Row) -> list[bool]:
    """Right or not, by test problem, in their order."""
    folder = out / f"size-{row['size']}" / row["method"]
    return [bool(one.correct) for one in read_rollouts(folder / "test.graded.jsonl")]
