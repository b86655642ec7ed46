"""Plots as SVG, which is embedded in the HTML pages.

Plots are drawn in placeholder colors, which are replaced by CSS variables (`--ink`, `--grid`,
`--s0` to `--s7`), so that the style sheet sets the colors for light and dark mode. Text in a plot
stays text, ids contain the name of the plot, and the same data give the same bytes. Plots contain
no text of models or users. matplotlib is imported only when a plot is drawn, because it would slow
down `--help`.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Line = tuple[Sequence[float], Sequence[tuple[float, float, float]]]
"""X values, such as iterations, and (value, low, high) at each."""
Curve = Sequence[tuple[Sequence[int], Sequence[float]]]
"""Optimizer steps and the value at each step, one pair per iteration."""

LINES_SHOWN = 12
"""Maximum number of lines in one plot. The table contains all."""
COLOURS = 8
DASHES = ("solid", "dashed", "dotted")
MARKERS, GLYPHS = "osD^vPX*", "●■◆▲▼✚✖★"
"""Markers of lines in matplotlib, and the same markers as text in the legend."""

INK, GRID = "#0a0b01", "#0a0b02"
SERIES = tuple(f"#0a0c{index:02x}" for index in range(COLOURS))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}


def accuracy_plot(name: str, label: str, lines: Sequence[Line]) -> str:
    """Plot accuracy by iteration with 95% intervals, as bands for up to three lines, else as bars.

    Args:
        name: a name that is unique among the plots of a page.
        label: text for screen readers.
        lines: accuracies as shares.

    Returns:
        SVG.
    """

    from matplotlib.ticker import MaxNLocator

    def draw(axes: "Axes") -> None:
        for index, line in enumerate(lines[:LINES_SHOWN]):
            _draw_line(axes, line, index, band=len(lines) <= 3)
        axes.set_ylim(0, 102)
        ticks = range(0, 101, 20)
        axes.set_yticks(ticks, [f"{value}%" for value in ticks])
        last = max((iterations[-1] for iterations, _ in lines if iterations), default=0)
        axes.set_xlim(-0.25, max(last, 1) + 0.25)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(lambda at, _: f"{at:.0f}" if at else "base")
        axes.set_xlabel("iteration")

    return _svg(name, label, draw)


def _draw_line(axes: "Axes", line: Line, index: int, *, band: bool) -> None:
    iterations, values = line
    at, low, high = ([100 * value[end] for value in values] for end in range(3))
    colour = SERIES[index % COLOURS]
    if band and len(iterations) > 1:
        axes.fill_between(iterations, low, high, color=colour, alpha=0.18, linewidth=0)
    else:
        axes.vlines(iterations, low, high, color=colour, alpha=0.35, linewidth=1)
    style = DASHES[index // COLOURS % len(DASHES)]
    marker = MARKERS[index % len(MARKERS)]
    axes.plot(iterations, at, color=colour, marker=marker, linestyle=style, clip_on=False)


def curve_plot(name: str, label: str, pieces: Curve) -> str:
    """Plot a value over the optimizer steps of all iterations.

    A dotted line marks the end of an iteration.
    """

    def draw(axes: "Axes") -> None:
        for steps, values in pieces:
            axes.plot(steps, values, color=SERIES[0], marker="o" if len(steps) == 1 else None)
            axes.axvline(steps[-1], color=GRID, linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel("optimizer steps, all iterations")

    return _svg(name, label, draw)


def interval_plot(
    name: str,
    label: str,
    lines: Sequence[tuple[Sequence[float], Sequence[tuple[float, float, float]]]],
    *,
    across: str,
    up: str = "",
    percent: bool = True,
    log: bool = False,
) -> str:
    """Plot values with 95% intervals, as bands for up to three lines, else as bars.

    Args:
        name: a name that is unique among the plots of a page.
        label: text for screen readers.
        lines: x values, and (value, low, high) at each.
        across: label of the x axis.
        up: label of the y axis.
        percent: the values are shares and are shown as percentages.
        log: use a logarithmic x axis with base 2 and a tick at every x value.

    Returns:
        SVG.
    """

    def draw(axes: "Axes") -> None:
        scale = 100 if percent else 1
        for index, (at, points) in enumerate(lines[:LINES_SHOWN]):
            scaled = [tuple(value * scale / 100 for value in point) for point in points]
            _draw_line(axes, (at, scaled), index, band=len(lines) <= 3)  # type: ignore[arg-type]
        axes.set_ylim(bottom=0)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        numbers = sorted({number for at, _ in lines for number in at})
        if log and len(numbers) > 1:
            axes.set_xscale("log", base=2)
            axes.set_xticks(numbers, [f"{number:g}" for number in numbers])
            axes.minorticks_off()
        axes.set_xlabel(across)
        axes.set_ylabel(up)

    return _svg(name, label, draw)


def value_plot(
    name: str,
    label: str,
    lines: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    across: str,
    zero: bool = False,
) -> str:
    """Plot values over steps or another number.

    Args:
        zero: draw a line at 0 and include 0 in the y axis.
    """

    def draw(axes: "Axes") -> None:
        for index, (at, values) in enumerate(lines):
            few = len(at) <= LINES_SHOWN
            marker = MARKERS[index % len(MARKERS)] if few or len(lines) > 1 else None
            every = 1 if few else len(at) // 8
            axes.plot(at, values, color=SERIES[index % COLOURS], marker=marker, markevery=every)
        if zero:
            axes.axhline(0, color=GRID, linewidth=0.8)
        axes.set_xlabel(across)

    return _svg(name, label, draw)


def _svg(name: str, label: str, draw: "Callable[[Axes], None]") -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer, style = io.StringIO(), {**STYLE}
    style["svg.hashsalt"] = name
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    for index, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--s{index})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
