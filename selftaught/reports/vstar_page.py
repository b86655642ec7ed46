"""The page of a V-STaR run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selftaught.evaluation.candidates import Choice, share
from selftaught.evaluation.evaluator import accuracy_of
from selftaught.metrics import difference_interval
from selftaught.reports.method_page import Figure, Section, Table, method_report, shown
from selftaught.runs.folder import Row, read_rows


def report(out: Path) -> Path:
    """Write `report.html` and `report.md` of a run of V-STaR, also while it runs; returns the page."""
    rows = read_rows(out / "metrics.jsonl")
    generators = [row for row in rows if "test" in row]
    choices = {row["name"].removeprefix("choices: "): row for row in rows if "choices" in row}
    sections = []
    lead = "Nothing is chosen yet."
    if "V-STaR" in choices:
        main = choices["V-STaR"]["choices"]
        ks = [int(k) for k in main["best"]]
        lead = _lead(main, ks[-1])
        sections.append(_choices_section(choices, ks))
    if cells := _table_of(choices):
        sections.append(Section("Generators by verifiers", "Each generator's candidates chosen by each verifier, which knows the iterations up to its number; best of all candidates.", [cells]))  # fmt: skip
    head = ["generator", "test, greedy", "samples", "right", "trained on", "tokens trained"]
    body = [
        [row["name"], shown(accuracy_of(row)), _count(row, "sampled"), _count(row, "right"),
         f"{row['training']['trained on']:,}", f"{row['training']['tokens']:,}"]
        for row in generators
    ]  # fmt: skip
    sections.append(Section("Generators", "Each is the base model, fine-tuned on all right completions so far.", [Table(head, body)]))  # fmt: skip
    return method_report(out, "V-STaR", lead, sections)


def _choices_section(choices: Mapping[str, Row], ks: Sequence[int]) -> Section:
    main = choices["V-STaR"]["choices"]
    names: list[tuple[str, Choice]] = [("any right (pass@k)", "pass"), ("verifier, best of k", "best"),
                                    ("majority", "majority"), ("verifier, weighted majority", "weighted")]  # fmt: skip
    lines = [(name, ks, [share(main[way][str(k)]) for k in ks]) for name, way in names]
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
    figure = Figure("Right choices among k candidates, test problems", lines, "candidates, k")
    words = "All from the same candidates per problem; 95% intervals over problems. " + _difference(
        main, ks[-1]
    )
    return Section("Choosing among candidates", words, [Table(["choice", *map(str, ks)], rows)], [figure])  # fmt: skip


def _lead(values: Mapping[str, Any], n: int) -> str:
    best, majority, one = (share(values[way][str(n)]) for way in ("best", "majority", "sample"))
    return (
        f"Of {n} candidates the verifier chooses a right one in {shown(best)} of the test problems, the "
        f"majority in {shown(majority)}; one candidate is right in {shown(one)}."
    )


def _difference(values: Mapping[str, Any], n: int) -> str:
    mean, low, high = difference_interval(values["majority"][str(n)], values["best"][str(n)])
    return (
        f"At k={n} the verifier is {100 * mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] "
        "from the majority, problem by problem."
    )


def _table_of(choices: Mapping[str, Row]) -> Table | None:
    """Generators by verifiers."""
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
