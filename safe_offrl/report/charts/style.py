"""What every panel has in common: colours, one look for each method, titles, grids, curves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_offrl.limits import ACCIDENT, Quantity, quantity_named
from safe_offrl.report.run_data import RunData
from safe_offrl.report.summaries import BOOTSTRAP_SEED
from safe_offrl.stats.resampling import Statistic, bootstrap_band

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito: distinguishable with every common kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
MARKERS = "osD^vP*Xh<>pd"
LIGHT: dict[Any, Any] = {"grid.color": "0.92", "text.color": "0.2", "figure.facecolor": "white"}
DOTTED, DASHED = (0, (1, 1.2)), (0, (4, 3))
# After all colours were used they come again in another line style. Dotted is "realised".
LINES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (6, 1.4, 1.4, 1.4)))
THIN_RUNS = 3  # up to so many runs are drawn each; of more, the band of a bootstrap over runs
POINTS = 120  # of a drawn curve

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def blank_figure(width: float, height: float) -> Figure:
    """A white figure of this size in inches, which no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


class Look(NamedTuple):
    """How one method is drawn, the same in every panel."""

    number: int
    colour: str
    line: Any
    marker: str
    crowded: bool  # more methods than colours: curves carry their markers

    @property
    def band(self) -> float:
        """Opacity of its bands: many bands over each other must leave the lines visible."""
        return 0.07 if self.crowded else 0.16

    def curve(self, **changes: Any) -> dict[str, Any]:
        """Arguments of ``Axes.plot``."""
        style: dict[str, Any] = {"color": self.colour, "linestyle": self.line, "linewidth": 1.9}
        if self.crowded:
            start = 0.02 + 0.13 * (self.number % 7) / 7
            style |= {"marker": self.marker, "markersize": 4.5, "markevery": (start, 0.13)}
        return style | {"gid": self.gid} | changes

    @property
    def gid(self) -> str:
        """What a page finds the method's lines by."""
        return f"method-{self.number}"


class Group(NamedTuple):
    """The runs of one method, at least one, and how they are drawn."""

    label: str
    look: Look
    runs: list[RunData]


class Panel(NamedTuple):
    """One chart: how to draw it, and the same in words for those who do not see it."""

    name: str
    title: str
    draw: Callable[[Axes], None]
    words: str


def quantity_of(groups: Sequence[Group]) -> Quantity:
    """What is compared: a cost, as soon as a run constrains it."""
    limited = [run.constraint for g in groups for run in g.runs if run.constraint != "accident"]
    return quantity_named(limited[0]) if limited else ACCIDENT


def looks_of(methods: Sequence[str]) -> dict[str, Look]:
    """One look a method, in the order given."""
    crowded = len(methods) > len(COLOURS)
    markers = itertools.cycle(MARKERS)
    return {
        method: Look(
            i,
            COLOURS[i % len(COLOURS)],
            LINES[i // len(COLOURS) % len(LINES)],
            next(markers),
            crowded,
        )
        for i, method in enumerate(methods)
    }


def groups_of(runs: Sequence[RunData], looks: Mapping[str, Look]) -> list[Group]:
    """The runs of each method that has some."""
    by_method: dict[str, list[RunData]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    return [Group(m, look, by_method[m]) for m, look in looks.items() if m in by_method]


def finish(axis: Axes, title: str, ylabel: str, xlabel: str = "environment steps charged") -> None:
    """Title, labels and a quiet grid, the same for every panel."""
    axis.set_title(title, loc="left", fontsize=11.5, fontweight="bold")
    axis.set_ylabel(ylabel, fontsize=9.5)
    axis.set_xlabel(xlabel, fontsize=9.5)
    axis.grid(True, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5, color="0.5")


def over_steps(axis: Axes, groups: Sequence[Group]) -> None:
    """The x axis of all panels over environment steps: from 0 to the longest run."""
    axis.set_xlim(0, 1.02 * max(run.episodes[-1].total_steps for g in groups for run in g.runs))
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")


def draw_limit(axis: Axes, name: str, limit: float) -> None:
    """A dashed line with its name on it, inside the panel."""
    from matplotlib import rcParams

    ink, paper = rcParams["text.color"], rcParams["axes.facecolor"]
    axis.set_ylim(top=max(axis.get_ylim()[1], 1.15 * limit))
    axis.axhline(limit, color=ink, linestyle=DASHED, linewidth=1.1, zorder=1)
    axis.annotate(
        f"{name} {limit:g}" if name else "",
        (0.5, limit),
        xycoords=("axes fraction", "data"),
        ha="center",
        va="center",
        fontsize=8.5,
        color=ink,
        bbox={"facecolor": paper, "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
    )


def draw_group(
    axis: Axes,
    group: Group,
    grid: NDArray[np.float64],
    curves: NDArray[np.float64],
    statistic: Statistic,
    **changes: Any,
) -> NDArray[np.float64]:
    """One line over runs; each of a few runs thinly, of more a band. Returns the line.

    ``curves`` [n, P]. The band is the pointwise 95 % (or the runs' confidence) bootstrap over runs.
    """
    look, line = group.look, statistic(curves)
    if 1 < len(curves) <= THIN_RUNS:
        for curve in curves:
            axis.plot(grid, curve, color=look.colour, linewidth=0.8, alpha=0.45, gid=look.gid)
    elif len(curves) > THIN_RUNS:
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        confidence = min(run.confidence for run in group.runs)
        low, high = bootstrap_band(curves, statistic, rng, confidence=confidence)
        axis.fill_between(
            grid, low, high, color=look.colour, alpha=look.band, linewidth=0, gid=look.gid
        )
    axis.plot(grid, line, **look.curve(**changes))
    return line


def together(curves: Sequence[Curve], points: int = POINTS) -> Curve:
    """The curves at equal steps that all of them cover: ([P], [n, P])."""
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(first, max(first, last), points)
    return grid, np.array([np.interp(grid, x, y) for x, y in curves])


def mean_of_curves(curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the first axis."""
    return np.asarray(curves.mean(axis=0))


def in_words(values: Mapping[str, str]) -> str:
    """The numbers of a chart: "constrained 7.0, rlpd 26.0"."""
    return ", ".join(f"{label} {value}" for label, value in values.items())
