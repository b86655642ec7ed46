"""HTML pages from templates, and the formatting of numbers and texts."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from selftaught.evaluation.evaluator import Evaluation, Tally
from selftaught.printable import printable
from selftaught.records import OUTCOMES, Text
from selftaught.reports.plots import DASHES, GLYPHS, LINES_SHOWN


def uneven(evaluation: Evaluation) -> bool:
    """Return whether groups differ in size, so that their mean is not the overall accuracy."""
    return len({tally.n for tally in evaluation.groups.values()}) > 1


def overall(evaluation: Evaluation) -> Tally:
    """Return the accuracy over all rollouts, with its interval.

    Where all groups have the same size, it is the mean over groups, with the interval of that mean.
    """
    if uneven(evaluation):
        return Tally(
            evaluation.n, evaluation.right, evaluation.accuracy, evaluation.low, evaluation.high
        )
    return evaluation.group_mean


def markdown(head: Sequence[str], body: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """Return a Markdown table.

    Args:
        head: column names.
        body: rows.
        texts: number of text columns at the left. The other columns are numbers and right-aligned.
    """
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    cells = [[table_cell(cell) for cell in line] for line in (head, *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:]))


def table_cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    one_line = " ".join(printable(text).replace("\\", "\\\\").replace("|", "\\|").split())
    return one_line.replace("&", "&amp;").replace("<", "&lt;")


def iteration_name(number: int) -> str:
    """Return the name of an iteration in tables: "base" for 0."""
    return "base" if number == 0 else str(number)


def percent(share: float) -> str:
    """Format a share as a percentage with one decimal."""
    return f"{100 * share:.1f}%"


def interval(tally: Tally | Evaluation) -> str:
    """Format the 95% interval in percent, such as 90.8-94.9."""
    return f"{100 * tally.low:.1f}\N{EN DASH}{100 * tally.high:.1f}"


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def shortened(text: str, limit: int, *, tail: int = 0) -> str:
    """Shorten a text to `limit` characters.

    The removed part is replaced by a note with its length.

    Args:
        text: the text.
        limit: maximum number of characters, without the note.
        tail: number of characters to keep at the end.
    """
    if len(text) <= limit:
        return text
    end = text[len(text) - tail :]
    note = f"\n[… {len(text) - limit:,} of {len(text):,} characters not shown …]\n"
    return (text[: limit - tail] + note + end).rstrip("\n")


def prompt_text(prompt: Text) -> str:
    """Return a prompt as one text. Chat messages are shown with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)


def rendered(template: str, **values: object) -> str:
    """Render an HTML page. All values are escaped.

    Args:
        template: file name in `templates/`.
        values: variables of the template.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "overall": overall,
        "interval": interval,
        "duration": duration,
        "shortened": shortened,
        "prompt_text": prompt_text,
        "iteration_name": iteration_name,
    }
    environment.tests["uneven_groups"] = uneven
    page = environment.get_template(template).render(
        version=version("selftaught"),
        outcomes=OUTCOMES,
        stages=STAGES,
        lines_shown=LINES_SHOWN,
        rationale_shown=RATIONALE_SHOWN,
        prompt_shown=PROMPT_SHOWN,
        field_shown=FIELD_SHOWN,
        glyphs=GLYPHS,
        dashes=DASHES,
        **values,
    )
    return printable(page)


def rendered_markdown(
    template: str, filters: Mapping[str, Callable[..., str]], **values: object
) -> str:
    """Render a Markdown page. Values are not escaped, except by the filters that the template uses.

    Args:
        template: file name in `templates/`.
        filters: filters of the template by name.
        values: variables of the template.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return printable(environment.get_template(template).render(**values))


RATIONALE_SHOWN, PROMPT_SHOWN, FIELD_SHOWN = 2500, 1800, 300
"""Maximum number of characters that are shown of a text. They keep a page with 70 rollouts below 2
MB."""


STAGES = ("sample", "rationalize", "grade", "train", "evaluate")
