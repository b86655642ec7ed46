"""Report page of a V-STaR run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from selftaught.evaluation.candidates import Choice, share
from selftaught.evaluation.evaluator import accuracy_of
from selftaught.metrics import difference_interval
from selftaught.reports.method_page import (
    Figure,
    Section,
    Table,
    flagged_sections,
    method_report,
    shown,
)
from selftaught.runs.folder import Row, read_rows


def report(out: Path) -> Path:
    """Write `report.html` and `report.md` of a V-STaR run. Works during the run, too.

    Args:
        out: the run folder.

    Returns:
        The path of `report.html`.
    """
    rows = read_rows(out / "metrics.jsonl")
    generators = [row for row in rows if "test" in row]
    choices = {row["name"].removeprefix("choices: "): row for row in rows if "choices" in row}
    sections = []
    lead = "There are no results yet."
    if "V-STaR" in choices:
        main = choices["V-STaR"]["choices"]
        ks = [int(k) for k in main["best"]]
        lead = _lead(main, ks[-1])
        sections.append(_choices_section(choices, ks))
    if cells := _table_of(choices):
        sections.append(Section("Generators by verifiers", "Test accuracy of best-of-k with all candidates, for each generator and verifier. Verifier n is trained on completions of the iterations up to n.", [cells]))  # fmt: skip
    head = ["generator", "test, greedy", "samples", "right", "trained on", "tokens trained"]
    body = [
        [row["name"], shown(accuracy_of(row)), _count(row, "sampled"), _count(row, "right"),
         f"{row['training']['trained on']:,}", f"{row['training']['tokens']:,}"]
        for row in generators
    ]  # fmt: skip
    sections.append(Section("Generators", "Each generator is the base model, fine-tuned on all correct completions up to its iteration.", [Table(head, body)]))  # fmt: skip
    return method_report(out, "V-STaR", lead, [*sections, *flagged_sections(rows)])


def _choices_section(choices: Mapping[str, Row], ks: Sequence[int]) -> Section:
    main = choices["V-STaR"]["choices"]
    names: list[tuple[str, Choice]] = [("any correct (pass@k)", "pass"), ("verifier, best of k", "best"),
                                    ("majority", "majority"), ("verifier, weighted majority", "weighted")]  # fmt: skip
    lines = [(name, ks, [share(main[rule][str(k)]) for k in ks]) for name, rule in names]
    others = {
        name: row["choices"] for name, row in choices.items()
        if name != "V-STaR" and " with V" not in name
    }  # fmt: skip
    lines += [(f"{name}, best of k", ks, [share(values["best"][str(k)]) for k in ks]) for name, values in others.items()]  # fmt: skip
    rows = [[name, *(shown(point) for point in points)] for name, _, points in lines]
    rows += [
        [f"{name}, majority", *(shown(share(values["majority"][str(k)])) for k in ks)]
        for name, values in others.items()
        if "outcome" not in name
    ]
    figure = Figure("Test accuracy by number of candidates", lines, "candidates, k")
    words = (
        "All rules choose among the same candidates of each problem. Intervals are 95% confidence "
        "intervals over problems. " + _difference(main, ks[-1])
    )
    return Section("Selection among candidates", words, [Table(["choice", *map(str, ks)], rows)], [figure])  # fmt: skip


def _lead(values: Row, n: int) -> str:
    best, majority, one = (share(values[rule][str(n)]) for rule in ("best", "majority", "sample"))
    return (
        f"Test accuracy with {n} candidates: verifier (best of {n}) {shown(best)}, majority vote "
        f"{shown(majority)}, a single sample {shown(one)}."
    )


def _difference(values: Row, n: int) -> str:
    mean, low, high = difference_interval(values["majority"][str(n)], values["best"][str(n)])
    return (
        f"At k={n}, accuracy with the verifier minus accuracy with the majority vote is "
        f"{100 * mean:+.1f} percentage points [{100 * low:+.1f}, {100 * high:+.1f}], paired by "
        "problem."
    )


def _table_of(choices: Mapping[str, Row]) -> Table | None:
    """Return the table of generators by verifiers. None means no such results."""
    cells = {
        tuple(name.split(" with ")): row["choices"]["best"]
        for name, row in choices.items()
        if " with V" in name
    }
    if not cells:
        return None
    generators = sorted({cell[0] for cell in cells})
    verifiers = sorted({cell[1] for cell in cells})
    k = list(next(iter(cells.values())))[-1]
    rows = [
        [
            generator,
            *(
                shown(share(cells[generator, one][k])) if (generator, one) in cells else "-"
                for one in verifiers
            ),
        ]
        for generator in generators
    ]
    return Table([f"best of {k}", *verifiers], rows)


def _count(row: Row, key: str) -> str:
    return f"{row[key]:,}" if key in row else "-"
