"""Tables of results as plain text and Markdown."""

from collections.abc import Sequence

from selftaught.evaluation.evaluator import Evaluation
from selftaught.records import OUTCOMES
from selftaught.reports.pages import interval, iteration_name, markdown, overall, percent, uneven
from selftaught.runs.folder import Row


def digits_table(rows: Sequence[Row]) -> str:
    """Return a table for the terminal: validation accuracy in percent, groups by iterations.

    Args:
        rows: rows of `metrics.jsonl`. A table has at most ten iterations; further ones follow in
            another table.
    """
    blocks = []
    for start in range(0, len(rows), 10):
        shown = rows[start : start + 10]
        validations = [Evaluation.from_dict(row["validation"]) for row in shown]
        heads = [iteration_name(row["iteration"]) for row in shown]
        table = [["iteration", *heads], *accuracy_lines(validations)]
        first = max(len(line[0]) for line in table)
        widths = [max(6, len(head)) for head in heads]
        blocks.append(
            "\n".join(
                "  ".join([line[0].ljust(first), *map(str.rjust, line[1:], widths)])
                for line in table
            )
        )
    return "\n\n".join(blocks)


def accuracy_lines(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Return table rows of accuracies: one per group and one for all, one column per evaluation."""
    names = list(dict.fromkeys(name for each in evaluations for name in each.groups))
    lines = [
        [
            name,
            *(percent(e.groups[name].accuracy) if name in e.groups else "-" for e in evaluations),
        ]
        for name in names
    ]
    if any(uneven(each) for each in evaluations):
        lines.append(["mean of groups", *(percent(e.group_mean.accuracy) for e in evaluations)])
    return [*lines, ["all", *(percent(overall(each).accuracy) for each in evaluations)]]


def markdown_table(evaluations: Sequence[Evaluation]) -> str:
    """Return a Markdown table with one row per evaluation: accuracy, 95% interval and outcomes.

    Where groups differ in size, the mean over groups follows with its interval.
    """
    with_mean = any(map(uneven, evaluations))

    def shares(e: Evaluation) -> list[str]:
        tallies = [overall(e), e.group_mean] if with_mean else [overall(e)]
        return [cell for tally in tallies for cell in (percent(tally.accuracy), interval(tally))]

    means = ["mean of groups", "95% interval"] if with_mean else []
    head = ["evaluation", "model", "n", "right", "accuracy", "95% interval", *means,
            "wrong", "no answer", "cut by length", "ungradable"]  # fmt: skip
    body = [
        [e.name, e.model, f"{e.n:,}", f"{e.right:,}", *shares(e)]
        + [f"{e.outcomes[outcome]:,}" for outcome in OUTCOMES[1:]]
        for e in evaluations
    ]
    return markdown(head, body, texts=2)
