"""The picture of a comparison: four panels over environment steps, one colour a method."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.errors import RunError
from safe_offrl.report import Comparison, Row
from safe_offrl.run_data import RunData
from safe_offrl.statistics import run_level_interval
from safe_offrl.types import Episode

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito: distinguishable with every common kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888888")
LIGHT: dict[Any, Any] = {"grid.color": "0.92", "text.color": "0.2", "figure.facecolor": "white"}
_PALE, _PAPER = "0.85", "#121212"
DARK: dict[Any, Any] = {
    "figure.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
    "legend.facecolor": _PAPER,
    "grid.color": "0.25",
    "text.color": _PALE,
    "axes.edgecolor": _PALE,
    "axes.labelcolor": _PALE,
    "xtick.labelcolor": _PALE,
    "ytick.labelcolor": _PALE,
}
_WINDOW = 50  # episodes behind a smoothed return
_LONG_WINDOW = 100  # episodes behind a realised accident rate
_COST_WINDOW = 5  # episodes behind a realised cost: episodes that are charged by cost are long
_DOTTED, _DASHED = (0, (1, 1.2)), (0, (4, 3))

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def write_png(comparison: Comparison, path: Path) -> None:
    """Draw the runs that learned online; RunError if there are none."""
    runs = [run for run in comparison.runs if run.episodes]
    if not runs:
        raise RunError(
            "None of the runs has an online episode to draw. Name a fine-tuning run as well."
        )
    draw(runs, path)


def draw(runs: Sequence[RunData], target: Path | IO[bytes], *, dark: bool = False) -> None:
    """Write a PNG: accidents, rate or cost, return, and estimate against what was realised.

    Where the expected cost is constrained, cost per episode takes the place of the accident rate.
    Each run needs at least one episode. ``dark`` is for a dark page.
    """
    import matplotlib as mpl

    with mpl.rc_context(DARK if dark else LIGHT):
        _draw(runs, target)


def _draw(runs: Sequence[RunData], target: Path | IO[bytes]) -> None:
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    groups: dict[str, list[RunData]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    colours = dict(zip(groups, itertools.cycle(COLOURS), strict=False))

    by_cost = any(run.constraint == "cost" for run in runs)
    window, short = (_COST_WINDOW,) * 2 if by_cost else (_LONG_WINDOW, _WINDOW)

    figure = Figure(figsize=(12.5, 8.4), dpi=110, facecolor=rcParams["figure.facecolor"])
    FigureCanvasAgg(figure)
    accidents, rate, returns, estimate = figure.subplots(2, 2).ravel()
    for method, members in groups.items():
        _draw_accidents(accidents, members, colours[method])
        if by_cost:
            _draw_smoothed(rate, members, colours[method], _COST_WINDOW, lambda e: e.cost)
        else:
            _draw_rate(rate, members, colours[method])
        _draw_smoothed(returns, members, colours[method], short, lambda e: e.episode_return)
        _draw_estimate(estimate, members, colours[method], window)

    finish(accidents, "Accidents so far", "episodes with an accident, each run")
    if by_cost:
        finish(rate, f"Cost, mean of {_COST_WINDOW} episodes", "cost (thin: runs, thick: mean)")
        quantity = "cost per episode"
    else:
        confidence = f"{100 * min(run.confidence for run in runs):g} %"
        title = f"Accident rate so far, anytime {confidence} band"
        finish(rate, title, "accidents per episode")
        quantity = "accident probability per episode"
    finish(returns, f"Return, mean of {short} episodes", "return (thin: runs, thick: mean)")
    finish(estimate, "Estimate against reality", quantity)
    last = max(run.episodes[-1].total_steps for run in runs)
    for axis in (accidents, rate, returns, estimate):
        axis.set_xlim(0, 1.02 * last)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
    for axis in (accidents, rate, estimate):
        axis.set_ylim(bottom=0)
    if not by_cost:
        rate.set_ylim(top=_rate_ceiling(groups))
    for axis in (rate, estimate):
        for name, limit in {_limit(run) for run in runs if not math.isnan(run.limit)}:
            axis.set_ylim(top=max(axis.get_ylim()[1], 1.15 * limit))
            _draw_limit(axis, name, limit)

    ink = rcParams["text.color"]
    dots = Line2D([], [], color=ink, linewidth=1.6, marker="o", markersize=3.5)
    dotted = Line2D([], [], color=ink, linewidth=1.4, linestyle=_DOTTED)
    labels = ["estimate of the acting policy", f"realised, last {window} episodes"]
    estimate.legend([dots, dotted], labels, fontsize=8.5, loc="best", framealpha=0.85)
    figure.tight_layout(rect=(0, 0, 1, 0.955), h_pad=2.0, w_pad=2.0)
    environments = ", ".join(sorted({run.env_id for run in runs}))
    figure.text(0.012, 0.985, environments, va="top", fontsize=14, fontweight="bold")
    figure.legend(
        [Line2D([], [], color=colours[method], linewidth=3.5) for method in groups],
        [f"{m} ({len(g)} run{'s' * (len(g) > 1)})" for m, g in groups.items()],
        loc="upper right",
        bbox_to_anchor=(0.995, 0.998),
        ncols=4,
        frameon=False,
    )
    figure.savefig(target, format="png")


def draw_outcome(comparison: Comparison, target: Path | IO[bytes], *, dark: bool = False) -> None:
    """Write a PNG of how the runs ended: return against accidents or cost, and return profiles.

    A method is on the front if no other has both a higher mean return and fewer accidents. A
    profile is the share of its runs that reach a return (Agarwal et al. 2021, arXiv:2108.13264).
    """
    import matplotlib as mpl

    with mpl.rc_context(DARK if dark else LIGHT):
        _draw_outcome(comparison, target)


def _draw_outcome(comparison: Comparison, target: Path | IO[bytes]) -> None:
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, list[Row]] = {}
    for row in comparison.rows:
        if row.episodes:
            groups.setdefault(row.method, []).append(row)
    by_cost = any(run.constraint == "cost" for run in comparison.runs)
    figure = Figure(figsize=(12.5, 4.4), dpi=110, facecolor=rcParams["figure.facecolor"])
    FigureCanvasAgg(figure)
    plane, profile = figure.subplots(1, 2)
    centres = []
    lowest = min((row.final_return.value for rows in groups.values() for row in rows), default=0.0)
    for (method, rows), colour in zip(groups.items(), itertools.cycle(COLOURS), strict=False):
        x = np.array([row.cost.value if by_cost else row.per_1000_steps.value for row in rows])
        y = np.array([row.final_return.value for row in rows])
        plane.scatter(x, y, s=26, color=colour, alpha=0.6, linewidths=0)
        plane.scatter([x.mean()], [y.mean()], s=110, color=colour, label=method)
        centres.append((float(x.mean()), float(y.mean())))
        reached = np.sort(y)
        left = np.concatenate([[lowest], reached, reached[-1:]])
        share = np.concatenate([[1.0], 1.0 - np.arange(len(y)) / len(y), [0.0]])
        profile.step(left, share, where="pre", color=colour, linewidth=1.8, label=method)
    front = pareto_front(centres)
    plane.plot(*zip(*front, strict=True), color=rcParams["text.color"], linestyle=_DASHED, zorder=0)
    quantity = "cost per episode" if by_cost else "accidents per 1000 steps"
    finish(plane, "Return against accidents while learning", "final return", quantity)
    finish(profile, "Share of the runs that reach a return", "share of runs", "final return")
    plane.set_xlim(left=0)
    profile.set_ylim(0, 1.05)
    plane.legend(fontsize=8.5, framealpha=0.85)
    figure.tight_layout(w_pad=2.0)
    figure.savefig(target, format="png")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (harm, gain) that no other beats in both, by rising harm."""
    front: list[tuple[float, float]] = []
    for harm, gain in sorted(set(points), key=lambda p: (p[0], -p[1])):
        if not front or gain > front[-1][1]:
            front.append((harm, gain))
    return front


def _draw_accidents(axis: Axes, runs: Sequence[RunData], colour: str) -> None:
    ends = []
    for run in runs:
        steps = [0, *(e.total_steps for e in run.episodes)]
        count = np.cumsum([0, *(e.accident for e in run.episodes)])
        axis.step(steps, count, where="post", color=colour, linewidth=1.3, alpha=0.75)
        ends.append(int(count[-1]))
    axis.annotate(
        f"{ends[0]}" if len(ends) == 1 else f"mean {np.mean(ends):.0f}",
        (1.0, float(np.mean(ends))),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=9.5,
        color=colour,
        fontweight="bold",
    )


def _draw_rate(axis: Axes, runs: Sequence[RunData], colour: str) -> None:
    steps, rate, low, high = _pooled_rate(runs)
    axis.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
    axis.plot(steps, rate, color=colour, linewidth=1.8)


def _pooled_rate(runs: Sequence[RunData]) -> tuple[NDArray[np.float64], ...]:
    """(steps, rate, low, high) of all runs of a method together, at equal steps.

    To the run-level bounds, independent runs in any order that does not look ahead are one long
    run; hence sorted by the step at which an episode BEGINS (accidents make episodes end early).
    """
    everything = [e for run in runs for e in run.episodes]
    episodes = sorted(everything, key=lambda e: e.total_steps - e.steps)
    counts = np.cumsum([e.accident for e in episodes])
    confidence = min(run.confidence for run in runs)
    n = np.arange(1.0, len(episodes) + 1)
    low, high = np.array([run_level_interval(int(k), confidence) for k in counts]).T / n
    steps = np.maximum.accumulate([float(e.total_steps) for e in episodes])
    return steps, counts / n, low, high.clip(max=1.0)


def _rate_ceiling(groups: Mapping[str, Sequence[RunData]]) -> float:
    """Top of the rate panel: the bounds after the first tenth of the steps, which say little."""
    tops = [run.limit for runs in groups.values() for run in runs if run.limit == run.limit]
    for runs in groups.values():
        steps, _, _, high = _pooled_rate(runs)
        tops.append(float(high[steps >= 0.1 * steps[-1]].max()))
    return min(1.0, 1.15 * max(tops))


def _limit(run: RunData) -> tuple[str, float]:
    return ("epsilon" if run.constraint == "accident" else "limit"), run.limit


def _draw_smoothed(
    axis: Axes,
    runs: Sequence[RunData],
    colour: str,
    window: int,
    value: Callable[[Episode], float],
) -> None:
    curves = [_smoothed(run, window, value) for run in runs]
    for curve in curves:
        axis.plot(*curve, color=colour, linewidth=0.8, alpha=0.45)
    axis.plot(*_average(curves), color=colour, linewidth=2.2)


def _draw_estimate(axis: Axes, runs: Sequence[RunData], colour: str, window: int) -> None:
    by_cost = runs[0].constraint == "cost"
    realised = [
        _smoothed(run, window, lambda e: e.cost if by_cost else float(e.accident)) for run in runs
    ]
    axis.plot(*_average(realised), color=colour, linewidth=1.5, linestyle=_DOTTED)
    estimates = [
        (np.array([d.step for d in known], dtype=float), np.array([d.v_deployed for d in known]))
        for run in runs
        if (known := [d for d in run.decisions if not math.isnan(d.v_deployed)])
    ]
    if estimates:
        axis.plot(*_average(estimates, 40), color=colour, linewidth=1.6, marker="o", markersize=3)


def _draw_limit(axis: Axes, name: str, limit: float) -> None:
    from matplotlib import rcParams

    ink, paper = rcParams["text.color"], rcParams["axes.facecolor"]
    axis.axhline(limit, color=ink, linestyle=_DASHED, linewidth=1.1, zorder=1)
    axis.annotate(
        f"{name} {limit:g}",
        (0.5, limit),
        xycoords=("axes fraction", "data"),
        ha="center",
        va="center",
        fontsize=8.5,
        color=ink,
        bbox={"facecolor": paper, "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
    )


def _smoothed(run: RunData, window: int, value: Callable[[Episode], float]) -> Curve:
    """Moving average over ``window`` episodes (or all, if fewer) against the steps at its end."""
    window = min(window, len(run.episodes))
    total = np.cumsum([0.0, *(value(e) for e in run.episodes)])
    steps = np.array([e.total_steps for e in run.episodes], dtype=np.float64)
    return steps[window - 1 :], (total[window:] - total[:-window]) / window


def _average(curves: Sequence[Curve], points: int = 200) -> Curve:
    """Mean of the curves over the steps that all of them cover."""
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(first, max(first, last), points)
    return grid, np.mean([np.interp(grid, x, y) for x, y in curves], axis=0)


def finish(axis: Axes, title: str, ylabel: str, xlabel: str = "environment steps charged") -> None:
    """Title, labels and a quiet grid, the same for every panel."""
    axis.set_title(title, loc="left", fontsize=11.5, fontweight="bold")
    axis.set_ylabel(ylabel, fontsize=9.5)
    axis.set_xlabel(xlabel, fontsize=9.5)
    axis.grid(True, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5, color="0.5")
