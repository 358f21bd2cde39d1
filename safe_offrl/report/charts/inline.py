"""A chart as SVG inside a page: one drawing for light and dark screens, coloured by the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from safe_offrl.report.charts.style import COLOURS, Look, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that stand for what the page says they are; no chart uses them otherwise.
_INK, _GRID, _PAPER = "#010203", "#040506", "#070809"
VARIABLES = {_INK: "--ink", _GRID: "--grid", _PAPER: "--paper"}
VARIABLES |= {colour.lower(): f"--c{i}" for i, colour in enumerate(COLOURS)}
_STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": _PAPER,
    "legend.facecolor": _PAPER,
    "legend.edgecolor": _GRID,
    "grid.color": _GRID,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched
    "svg.hashsalt": "safe-offrl",
}
_SIZE, _SAMPLE = (6.1, 4.1), (0.55, 0.19)  # inches


def inline_svg(panel: Panel, prefix: str) -> str:
    """The chart as an <svg> element; ``prefix`` makes its ids its own among others of the page."""
    return _svg(panel.draw, prefix, _SIZE)


def inline_sample(look: Look, prefix: str) -> str:
    """The line and the mark that stand for a method in a legend."""

    def draw(axis: Axes) -> None:
        axis.set_axis_off()
        axis.set_xlim(0, 1)
        line = {"linestyle": look.line, "linewidth": 2.5}
        axis.plot([0, 1], [0, 0], color=look.colour, **line)
        axis.plot([0.5], [0], color=look.colour, marker=look.marker, markersize=6.5)

    return _svg(draw, prefix, _SAMPLE)


def _svg(draw: Callable[[Axes], None], prefix: str, size: tuple[float, float]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None})
    text = target.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    # The charts are described in words beside them; their tick labels one by one would say nothing.
    head = r'<svg aria-hidden="true" viewBox="\1">'
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', head, text, count=1)
    # A method's lines are found by their class: they are several, and an id is one thing's.
    text = re.sub(r'id="(method-\d+)"', r'class="\1"', text)
    text = re.sub(r'id="', f'id="{prefix}-', text)
    text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{prefix}-", text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    text = re.sub(r"#[0-9a-f]{6}", _variable, text)
    # A hundredth of a point is not seen.
    text = re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), text)
    return re.sub(r"\s*\n\s*", "\n", text)


def _variable(match: re.Match[str]) -> str:
    name = VARIABLES.get(match[0])
    return f"var({name})" if name else match[0]
