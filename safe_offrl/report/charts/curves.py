"""Panels over environment steps: return, accidents, accident rate or cost, estimates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from safe_offrl.limits import Quantity, quantity_named
from safe_offrl.report.charts.style import (
    DOTTED,
    POINTS,
    Curve,
    Group,
    Panel,
    draw_group,
    draw_limit,
    finish,
    in_words,
    mean_of_curves,
    over_steps,
    quantity_of,
    together,
)
from safe_offrl.report.run_data import RunData
from safe_offrl.report.summaries import final_return
from safe_offrl.stats.anytime import run_level_interval
from safe_offrl.stats.resampling import iqm, iqm_of_curves
from safe_offrl.types import Episode

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WINDOW = 50  # episodes behind a smoothed return
_LONG_WINDOW = 100  # episodes behind a realised accident rate
_COST_WINDOW = 5  # episodes behind a realised cost: episodes that are charged by cost are long
_LABELLED = 6  # methods whose number of accidents stands beside its curve


def curve_panels(groups: Sequence[Group]) -> list[Panel]:
    """Return, accidents so far, accident rate (or cost), estimate against what was realised.

    Of runs with at least one episode each. Where the expected cost is constrained, cost per episode
    takes the place of the accident rate.
    """
    # Numbers of the captions.
    quantity = quantity_of(groups)
    of_episode = quantity.of_episode
    window, short = quantity.select((_LONG_WINDOW, _WINDOW), (_COST_WINDOW,) * 2)
    ends = {g.label: f"{iqm([final_return(r) for r in g.runs]):.4g}" for g in groups}
    totals = {g.label: f"{np.mean([r.accidents for r in g.runs]):.3g}" for g in groups}
    rates = {g.label: f"{_pooled_end(g.runs):.2%}" for g in groups}
    costs = {
        g.label: f"{np.mean([of_episode(e) for r in g.runs for e in r.episodes]):.3g}"
        for g in groups
    }
    estimates = {
        g.label: f"{np.mean(known):.3g}"
        for g in groups
        if (known := [r.estimate for r in g.runs if not math.isnan(r.estimate)])
    }
    # Accident rate or cost.
    confidence = f"{100 * min(run.confidence for g in groups for run in g.runs):g} %"
    cost = quantity.cost[:1].upper() + quantity.cost[1:]
    rate = quantity.select(
        Panel(
            "rate",
            f"Accident rate so far, anytime {confidence} band",
            lambda axis: _draw_rates(axis, groups),
            f"Accidents per episode so far, all runs of a method together, with anytime-valid "
            f"{confidence} bands, over environment steps. At the end: {in_words(rates)}.",
        ),
        Panel(
            "cost",
            f"{cost}, mean of {window} episodes",
            lambda axis: _draw_cost(axis, groups, quantity, f"{cost}, mean of {window} episodes"),
            f"{cost} per episode over environment steps. Mean of all episodes: {in_words(costs)}.",
        ),
    )
    # Panels.
    return [
        Panel(
            "return",
            f"Return, mean of {short} episodes",
            lambda axis: _draw_return(axis, groups, short),
            "Return over environment steps, interquartile mean over runs. "
            f"Final return: {in_words(ends)}.",
        ),
        Panel(
            "accidents",
            "Accidents so far",
            lambda axis: _draw_accidents(axis, groups),
            "Episodes with an accident so far, over environment steps, mean over runs. "
            f"At the end: {in_words(totals)}.",
        ),
        rate,
        Panel(
            "estimate",
            "Estimate against reality",
            lambda axis: _draw_estimates(axis, groups, window),
            "The safety critic's estimate of the acting policy and what was realised in the last "
            f"{window} episodes, over environment steps. Estimates of the final policies: "
            f"{in_words(estimates) or 'none'}.",
        ),
    ]


def _draw_return(axis: Axes, groups: Sequence[Group], window: int) -> None:
    for group in groups:
        curves = [c for run in group.runs if len((c := smoothed(run, window, known_return))[0])]
        if curves:
            draw_group(axis, group, *together(curves), iqm_of_curves)
    finish(axis, f"Return, mean of {window} episodes", "return, IQM over runs")
    over_steps(axis, groups)


def _draw_accidents(axis: Axes, groups: Sequence[Group]) -> None:
    ends = []
    for group in groups:
        grid, counts = accidents_so_far(group.runs)
        ends.append(float(draw_group(axis, group, grid, counts, mean_of_curves)[-1]))
    finish(axis, "Accidents so far", "episodes with an accident, mean over runs")
    over_steps(axis, groups)
    axis.set_ylim(bottom=0)
    if len(groups) > _LABELLED:
        return
    gap = 0.055 * (axis.get_ylim()[1] or 1.0)
    for group, end, place in zip(groups, ends, spread(ends, gap), strict=True):
        axis.annotate(
            f"{end:.0f}" if len(group.runs) == 1 else f"mean {end:.3g}",
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=group.look.colour,
            fontweight="bold",
            annotation_clip=False,
            gid=group.look.gid,
        )


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Moves values up where they are closer than ``gap`` to the one below; keeps their order."""
    places = [0.0] * len(values)
    lowest = -math.inf
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        places[i] = lowest = max(values[i], lowest)
        lowest += gap
    return places


def accidents_so_far(runs: Sequence[RunData], points: int = POINTS) -> Curve:
    """Accidents of each run in episodes that had ended by each of equal steps: ([P], [n, P]).

    A run that stopped early has no more accidents after that.
    """
    grid = np.linspace(0.0, max(run.episodes[-1].total_steps for run in runs), points)
    counts = []
    for run in runs:
        ends = [e.total_steps for e in run.episodes]
        count = np.cumsum([0.0, *(e.accident for e in run.episodes)])
        counts.append(count[np.searchsorted(ends, grid, side="right")])
    return grid, np.array(counts)


def _draw_rates(axis: Axes, groups: Sequence[Group]) -> None:
    # The bounds of the first tenth of the steps say little and would decide the scale.
    tops = [run.limit for g in groups for run in g.runs if not math.isnan(run.limit)]
    for group in groups:
        look = group.look
        steps, rate, low, high = pooled_rate(group.runs)
        axis.fill_between(
            steps, low, high, color=look.colour, alpha=look.band, linewidth=0, gid=look.gid
        )
        axis.plot(steps, rate, **look.curve())
        tops.append(float(high[steps >= 0.1 * steps[-1]].max()))
    finish(axis, _rate_title(groups), "accidents per episode")
    over_steps(axis, groups)
    axis.set_ylim(0, min(1.0, 1.15 * max(tops)))
    _draw_limits(axis, groups)


def _rate_title(groups: Sequence[Group]) -> str:
    confidence = f"{100 * min(run.confidence for g in groups for run in g.runs):g} %"
    return f"Accident rate so far, anytime {confidence} band"


def pooled_rate(runs: Sequence[RunData], points: int = POINTS) -> tuple[NDArray[np.float64], ...]:
    """(steps, rate, low, high) of all runs of a method together, at about ``points`` steps.

    To the run-level bounds, independent runs in any order that does not look ahead are one long
    run; hence sorted by the step at which an episode BEGINS (accidents make episodes end early).
    """
    everything = [e for run in runs for e in run.episodes]
    episodes = sorted(everything, key=lambda e: e.total_steps - e.steps)
    counts = np.cumsum([e.accident for e in episodes])
    confidence = min(run.confidence for run in runs)
    shown = np.unique(np.linspace(0, len(episodes) - 1, min(points, len(episodes))).astype(int))
    n = shown + 1.0
    low, high = np.array([run_level_interval(int(k), confidence) for k in counts[shown]]).T / n
    steps = np.maximum.accumulate([float(e.total_steps) for e in episodes])[shown]
    return steps, counts[shown] / n, low, high.clip(max=1.0)


def _pooled_end(runs: Sequence[RunData]) -> float:
    return sum(run.accidents for run in runs) / sum(len(run.episodes) for run in runs)


def _draw_cost(axis: Axes, groups: Sequence[Group], quantity: Quantity, title: str) -> None:
    for group in groups:
        curves = [smoothed(run, _COST_WINDOW, quantity.of_episode) for run in group.runs]
        draw_group(axis, group, *together(curves), mean_of_curves)
    finish(axis, title, f"{quantity.cost}, mean over runs")
    over_steps(axis, groups)
    axis.set_ylim(bottom=0)
    _draw_limits(axis, groups)


def _draw_estimates(axis: Axes, groups: Sequence[Group], window: int) -> None:
    from matplotlib import rcParams
    from matplotlib.lines import Line2D

    quantity = quantity_of(groups)
    for group in groups:
        estimates = [curve for run in group.runs if len((curve := _estimates(run))[0])]
        if estimates:
            draw_group(axis, group, *together(estimates, 60), mean_of_curves, linewidth=1.6)
        if estimates or not group.look.crowded:
            realised = [smoothed(run, window, quantity.of_episode) for run in group.runs]
            grid, values = together(realised)
            thin = {"linestyle": DOTTED, "linewidth": 1.5, "marker": ""}
            axis.plot(grid, mean_of_curves(values), **group.look.curve(**thin))
    finish(axis, "Estimate against reality", quantity.per_episode)
    over_steps(axis, groups)
    axis.set_ylim(bottom=0)
    _draw_limits(axis, groups)
    ink = rcParams["text.color"]
    lines = [Line2D([], [], color=ink, linewidth=1.6, linestyle=s) for s in ("-", DOTTED)]
    labels = ["estimate of the acting policy", f"realised, last {window} episodes"]
    axis.legend(lines, labels, fontsize=8.5, loc="best", framealpha=0.85)


def _estimates(run: RunData) -> Curve:
    known = [d for d in run.decisions if not math.isnan(d.v_deployed)]
    return np.array([d.step for d in known], float), np.array([d.v_deployed for d in known])


def _draw_limits(axis: Axes, groups: Sequence[Group]) -> None:
    limits = {
        (quantity_named(run.constraint).bound, run.limit)
        for group in groups
        for run in group.runs
        if not math.isnan(run.limit)
    }
    for name, limit in sorted(limits):
        draw_limit(axis, name, limit)


def known_return(episode: Episode) -> float:
    """Return of an episode that was seen to its end; NaN of another."""
    return episode.episode_return if episode.outcome == "complete" else math.nan


def smoothed(run: RunData, window: int, value: Callable[[Episode], float]) -> Curve:
    """Moving average over ``window`` episodes (or all, if fewer) against the steps at its end.

    Episodes whose value is NaN are left out; without any other the curve is empty.
    """
    ends = np.array([e.total_steps for e in run.episodes], dtype=np.float64)
    values = np.array([value(e) for e in run.episodes], dtype=np.float64)
    steps, values = ends[~np.isnan(values)], values[~np.isnan(values)]
    if not len(values):
        return steps, values
    window = min(window, len(values))
    total = np.cumsum([0.0, *values])
    return steps[window - 1 :], (total[window:] - total[:-window]) / window
