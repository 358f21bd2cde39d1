"""The pictures of a comparison: panels, put together for a file or one by one for a page."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safe_offrl.errors import RunError
from safe_offrl.report.charts.constraints import constraint_panels
from safe_offrl.report.charts.curves import curve_panels
from safe_offrl.report.charts.outcome import outcome_panels, pareto_front
from safe_offrl.report.charts.style import COLOURS, LIGHT, Look, Panel, finish, groups_of, looks_of
from safe_offrl.report.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D

__all__ = [
    "CAPTION",
    "COLOURS",
    "LIGHT",
    "Look",
    "Panel",
    "Section",
    "finish",
    "legend_of",
    "pareto_front",
    "sections_of",
    "write_figure",
]

CAPTION = """\
Thick lines are means over a method's runs, of returns interquartile means. Bands are bootstrap \
intervals over runs, step by step; up to three
runs are drawn thinly instead. The band of the accident rate is the anytime-valid interval over \
all its episodes. In the plane large marks are
means over runs, hollow ones policies that never learned (as evaluated), and the dashed line is \
the Pareto front."""
_WIDTH, _ROW, _ENTRIES = 12.5, 4.0, 4  # inches; legend entries in a row


class Section(NamedTuple):
    """The charts of one environment that belong together."""

    environment: str
    title: str
    panels: list[Panel]


def sections_of(comparison: Comparison) -> list[Section]:
    """Every chart there is something to draw in, environment by environment."""
    looks = legend_of(comparison)
    sections = []
    for environment in comparison.environments:
        runs = [run for run in comparison.runs if run.env_id == environment]
        everyone = groups_of(runs, looks)
        online = groups_of([run for run in runs if run.episodes], looks)
        sections += [
            Section(environment, title, panels)
            for title, panels in (
                ("While learning", curve_panels(online) if online else []),
                ("Constraints", constraint_panels(online)),
                ("At the end", outcome_panels(everyone)),
            )
            if panels
        ]
    return sections


def legend_of(comparison: Comparison) -> dict[str, Look]:
    """How each method is drawn."""
    return looks_of(list(dict.fromkeys(run.method for run in comparison.runs)))


def write_figure(comparison: Comparison, path: Path) -> None:
    """Write all charts as one picture: PNG, or SVG by the name of the file.

    RunError if no run has learned online.
    """
    import matplotlib as mpl

    if not any(run.episodes for run in comparison.runs):
        raise RunError(
            "None of the runs has an online episode to draw. Name a fine-tuning run as well."
        )
    vector = path.suffix.lower() == ".svg"
    # With a salt, names inside an SVG are not random.
    with mpl.rc_context({**LIGHT, "svg.hashsalt": "safe-offrl"}):
        figure = _figure(comparison)
        if vector:
            figure.savefig(path, format="svg", metadata={"Date": None})
        else:
            figure.savefig(path, format="png", dpi=110)


def _figure(comparison: Comparison) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Panels.
    by_environment = {
        environment: [panel for section in sections for panel in section.panels]
        for environment, sections in itertools.groupby(
            sections_of(comparison), lambda section: section.environment
        )
    }
    # Layout.
    looks = legend_of(comparison)
    head = 0.35 + 0.28 * -(-len(looks) // _ENTRIES)
    heights = [0.45 + _ROW * -(-len(panels) // 2) for panels in by_environment.values()]
    foot = 0.75
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.08)
    figure = Figure(figsize=(_WIDTH, head + sum(heights) + foot), layout=layout)
    parts = figure.subfigures(
        2 + len(heights), 1, squeeze=False, height_ratios=[head, *heights, foot]
    )
    # Legend.
    top, *middle, bottom = parts.ravel()
    names = _counted(comparison)
    top.legend(
        [legend_sample(look) for look in looks.values()],
        [names[method] for method in looks],
        loc="center",
        ncols=min(len(looks), _ENTRIES),
        frameon=False,
        handlelength=3.5,
    )
    # Environments and caption.
    for part, (environment, panels) in zip(middle, by_environment.items(), strict=True):
        _draw_environment(part, environment, panels)
    bottom.text(0.012, 0.5, CAPTION, va="center", fontsize=9)
    return figure


def _draw_environment(part: SubFigure, environment: str, panels: Sequence[Panel]) -> None:
    part.suptitle(environment, x=0.012, ha="left", fontsize=14, fontweight="bold")
    axes = part.subplots(-(-len(panels) // 2), 2, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        panel.draw(axis)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)


def legend_sample(look: Look) -> Line2D:
    """What stands for a method in a legend."""
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        color=look.colour,
        linestyle=look.line,
        linewidth=2.5,
        marker=look.marker,
        markersize=6,
    )


def _counted(comparison: Comparison) -> dict[str, str]:
    """Methods with the number of their runs."""
    methods = [run.method for run in comparison.runs]
    return {m: f"{m} ({methods.count(m)} run{'s' * (methods.count(m) > 1)})" for m in set(methods)}
