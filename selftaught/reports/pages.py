"""HTML pages from templates, and how numbers and texts are shown on them."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from selftaught.evaluation.evaluator import Evaluation, Tally
from selftaught.printable import printable
from selftaught.records import OUTCOMES, Text
from selftaught.reports.plots import DASHES, GLYPHS, LINES_SHOWN


def uneven(evaluation: Evaluation) -> bool:
    """Whether groups differ in size, so that their mean is not the accuracy over all."""
    return len({tally.n for tally in evaluation.groups.values()}) > 1


def markdown(head: Sequence[str], body: Sequence[Sequence[str]], *, texts: int = 1) -> str:
    """A Markdown table whose first `texts` columns are text and whose others are numbers."""
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    cells = [[table_cell(cell) for cell in line] for line in (head, *body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], rule, *cells[1:]))


def table_cell(text: str) -> str:
    one_line = " ".join(printable(text).replace("\\", "\\\\").replace("|", "\\|").split())
    return one_line.replace("&", "&amp;").replace("<", "&lt;")


def iteration_name(number: int) -> str:
    """An iteration as a table calls it."""
    return "base" if number == 0 else str(number)


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f}%"


def interval(tally: Tally | Evaluation) -> str:
    """A 95% interval in percent, such as 90.8-94.9."""
    return f"{100 * tally.low:.1f}\N{EN DASH}{100 * tally.high:.1f}"


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def shortened(text: str, limit: int, *, tail: int = 0) -> str:
    """Text of at most `limit` characters and a note of what is left out, before the last `tail`."""
    if len(text) <= limit:
        return text
    end = text[len(text) - tail :]
    note = f"\n[… {len(text) - limit:,} of {len(text):,} characters not shown …]\n"
    return (text[: limit - tail] + note + end).rstrip("\n")


def prompt_text(prompt: Text) -> str:
    """A prompt as one text; messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)


def rendered(template: str, **told: object) -> str:
    """One HTML page from a template of `pages/`, everything in it escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
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
        **told,
    )
    return printable(page)


RATIONALE_SHOWN, PROMPT_SHOWN, FIELD_SHOWN = 2500, 1800, 300
"""Characters shown of a text; with 70 rollouts the page stays below 2 MB whatever they hold."""


STAGES = ("sample", "rationalize", "grade", "train", "evaluate")
