"""Pages of Quiet-STaR: the report of a training, and the thought explorer. Each is one HTML file.

Texts and thoughts are untrusted. They are escaped in the page, and its script inserts them as text.
The content security policy of the page allows only that script, by its hash.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from selftaught.printable import printable
from selftaught.quiet.evaluation import Measured
from selftaught.quiet.explore import Explored
from selftaught.records import write_atomically
from selftaught.reports.pages import rendered
from selftaught.reports.plots import value_plot

CURVES = (
    ("Training loss of the next token (nats)", ("nll_without", "nll_with"), False),
    ("Mean reward of a thought (nats, summed over the lookahead)", ("reward",), True),
    ("Share of thoughts with a positive advantage", ("positive_advantages",), True),
    ("Share of thoughts whose positive advantage is withheld by a check", ("withheld_advantages",), True),
    ("Differences between the thoughts of a position (nats, standard deviation)", ("reward_spread",), True),
    ("Share of distinct thoughts per position", ("distinct_thoughts",), True),
    ("Mean mixing weight of thoughts", ("mixing_weight",), True),
    ("Thoughts under the base model (nats per token, log of the perplexity)", ("thought_base_nll",), True),
    ("Divergence of thought tokens from the base model (nats per token)", ("thought_kl",), True),
    ("Share of repeated tokens in a thought", ("repeated_tokens",), True),
    ("Share of distinct thoughts in a text", ("distinct_in_text",), True),
    ("Entropy of thought tokens (nats)", ("thought_entropy",), True),
    ("Mean length of thoughts (sampled tokens)", ("thought_length",), True),
    ("Gain of the hardest and the easiest tenth of tokens (nats)", ("gain_decile_10", "gain_decile_1"), True),
    ("Text tokens per second", ("tokens_per_second",), True),
)  # fmt: skip
"""Plots: caption, names of the logged values, and whether to draw a line at 0."""
NAMES = {"nll_without": "without thoughts", "nll_with": "with thoughts",
         "gain_decile_10": "hardest tenth", "gain_decile_1": "easiest tenth"}  # fmt: skip
READABLE = {
    "thought_base_nll": "nats per token under the base model", "thought_kl": "divergence from it (nats per token)",
    "repeated_tokens": "repeated tokens", "distinct_thoughts": "distinct at a position",
    "distinct_in_text": "distinct in a text", "thought_entropy": "entropy (nats per token)",
}  # fmt: skip
"""Logged values in the table on thoughts over training, with their names."""
PARTS = 5
"""Number of rows of that table. Values are means over the steps of a part."""
POINTS = 120
"""Maximum number of points per curve. Neighboring points are averaged."""


def training_page(
    out: Path,
    log: Sequence[Mapping[str, float]],
    settings: Mapping[str, object],
    before: Measured | None = None,
    after: Measured | None = None,
) -> Path:
    """Write the report of a training: curves, gains and readability of thoughts on held-out texts,
    and settings.

    Args:
        out: the run folder.
        log: logged metrics, one dictionary per step.
        settings: settings to show.
        before: the base model on held-out texts. None: not measured.
        after: the trained model on held-out texts. None: not measured.

    Returns:
        The path of `report.html`.
    """
    plots = []
    for number, (caption, names, zero) in enumerate(CURVES):
        lines = [_curve(log, name) for name in names]
        if any(at for at, _ in lines):
            svg = value_plot(f"curve{number}", caption, lines, across="steps", zero=zero)
            plots.append({"caption": caption, "svg": Markup(svg), "names": [NAMES.get(n, n) for n in names]})  # fmt: skip
    page = rendered(
        "quiet.html.j2", title=out.name, plots=plots, settings=settings, before=before, after=after,
        readable=_readable(before, after), over_training=_over_training(log),
    )  # fmt: skip
    path = out / "report.html"
    write_atomically(path, page)
    return path


def _readable(before: Measured | None, after: Measured | None) -> list[tuple[str, str, str]]:
    """Return rows on how readable thoughts are: name, of the thoughts, of the texts themselves."""
    if after is None or after.legibility is None:
        return []
    found, text = after.legibility, "" if before is None else f"{before.nll_without:.3f}"
    rows = [
        ("nats per token under the base model", _interval(found.base_nll, ".3f"), text),
        ("repeated tokens", _interval(found.repeated_tokens, ".1%"),
         _interval(found.repeated_in_text, ".1%")),
        ("distinct thoughts at a position", _interval(found.distinct_thoughts, ".1%"), ""),
        ("distinct thoughts in a text", _interval(found.distinct_in_text, ".1%"), ""),
    ]  # fmt: skip
    return [row for row in rows if row[1]]


def _interval(value: Sequence[float] | None, form: str) -> str:
    """Return a mean with its 95% interval, if there is one. Empty if it was not measured."""
    if value is None:
        return ""
    mean, low, high = value
    return f"{mean:{form}}" + (f" [{low:{form}}, {high:{form}}]" if low == low else "")


def _over_training(log: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Return a table with a head on the thoughts in each of `PARTS` parts of a training."""
    names = [name for name in READABLE if any(name in row for row in log)]
    if not names:
        return []
    width = -(-len(log) // PARTS)
    table = [["steps", *(READABLE[name] for name in names)]]
    for first in range(0, len(log), width):
        part = log[first : first + width]
        values = [[row[name] for row in part if name in row] for name in names]
        cells = [f"{sum(one) / len(one):.3f}" if one else "" for one in values]
        table.append([f"{part[0]['step']:.0f} to {part[-1]['step']:.0f}", *cells])
    return table


def _curve(log: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Return steps and values of a metric, averaged over neighbors if there are more than
    `POINTS`."""
    points = [(row["step"], row[name]) for row in log if name in row]
    width = -(-len(points) // POINTS) or 1
    parts = [points[first : first + width] for first in range(0, len(points), width)]
    means = [tuple(sum(column) / len(part) for column in zip(*part, strict=True)) for part in parts]
    return [at for at, _ in means], [value for _, value in means]


def explorer_page(
    path: Path, title: str, first: str, tokens: Sequence[Explored], measured: object
) -> Path:
    """Write the thought explorer: a text whose tokens are colored by the gain of their thoughts.

    Args:
        path: HTML file to write.
        title: title of the page.
        first: first token of the text.
        tokens: the other tokens with their thoughts.
        measured: `Measured` of the text.

    Returns:
        `path`.
    """
    script = (Path(__file__).parent / "templates" / "explore.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data: list[dict[str, object]] = [_token_data(token) for token in tokens]
    page = rendered(
        "explore.html.j2",
        title=title,
        first=_shown(first),
        tokens=data,
        measured=measured,
        thoughts=len(tokens[0].thoughts) if tokens else 1,
        script=script,
        script_hash=Markup(f"sha256-{digest}"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def _token_data(token: Explored) -> dict[str, object]:
    """Return the values of a token that the script of the page reads."""

    def rows(top: Sequence[tuple[str, float]]) -> list[list[object]]:
        return [[printable(text), round(chance, 5)] for text, chance in top]

    return {
        "next": printable(token.next),
        "shown": _shown(token.next),
        "without": round(token.without, 6),
        "with": round(token.chance, 6),
        "gain": round(token.gain, 5),
        "gains": [round(gain, 5) for gain in token.gains],
        "weights": [round(weight, 4) for weight in token.weights],
        "thoughts": [printable(thought) for thought in token.thoughts],
        "thinks": token.thinks,
        "top_without": rows(token.top_without),
        "top_with": rows(token.top_with),
    }


def _shown(token: str) -> str:
    """Return a token as shown in the text. A line break is shown as a symbol and breaks the
    line."""
    return printable(token.replace("\n", "↵\n")) or "∅"
