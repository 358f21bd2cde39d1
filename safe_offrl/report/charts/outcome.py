"""Panels of how the runs ended: return against harm, return profiles, estimates against reality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from safe_offrl.limits import ACCIDENT, Quantity
from safe_offrl.report.charts.style import DASHED, Group, Panel, finish, in_words, quantity_of
from safe_offrl.report.run_data import RunData
from safe_offrl.report.summaries import learned_online, outcome
from safe_offrl.stats.fixed import clopper_pearson, mean_and_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def outcome_panels(groups: Sequence[Group]) -> list[Panel]:
    """Plane with its Pareto front, profile, and final estimates against evaluations if any.

    A policy that never learned stands where it was evaluated. Groups without any outcome are left
    out; a method is on the front if no other has both a higher mean return and less harm. A profile
    is the share of a method's runs that reach a return (Agarwal et al. 2021, arXiv:2108.13264).
    """
    # Runs with an outcome.
    quantity = quantity_of(groups)
    shown = [g._replace(runs=r) for g in groups if (r := _finite(g.runs, quantity))]
    if not shown:
        return []
    # Plane and front.
    centres = {g.label: _centre(g.runs, quantity) for g in shown}
    front = pareto_front(list(centres.values()))
    on_front = [label for label, centre in centres.items() if centre in front]
    words = in_words(
        {label: f"{gain:.4g} at {harm:.3g}" for label, (harm, gain) in centres.items()}
    )
    # Profile.
    best = {
        g.label: f"{min(map(outcome, g.runs)):.4g} to {max(map(outcome, g.runs)):.4g}"
        for g in shown
    }
    # Panels.
    panels = [
        Panel(
            "plane",
            _plane_title(quantity),
            lambda axis: _draw_plane(axis, shown, quantity),
            f"Final return against {quantity.rate}, mean over runs: {words}. "
            f"On the Pareto front: {', '.join(on_front)}.",
        ),
        Panel(
            "profile",
            "Share of the runs that reach a return",
            lambda axis: _draw_profile(axis, shown),
            f"Share of each method's runs that reach a final return. Returns: {in_words(best)}.",
        ),
    ]
    # Estimates against evaluations.
    judged = [g._replace(runs=r) for g in groups if (r := [x for x in g.runs if _judged(x)])]
    if judged:
        pairs = {g.label: _judgement(g.runs, quantity) for g in judged}
        against = in_words({n: f"{x:.3g} against {y:.3g}" for n, (x, y, _, _) in pairs.items()})
        panels.append(
            Panel(
                "final-estimate",
                "Estimate of the final policy against its evaluation",
                lambda axis: _draw_judgement(axis, judged, quantity),
                f"The safety critic's estimate of the final policies against what their evaluation "
                f"found, mean over runs: {against}.",
            )
        )
    return panels


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (harm, gain) that no other beats in both, by rising harm."""
    front: list[tuple[float, float]] = []
    for harm, gain in sorted(set(points), key=lambda p: (p[0], -p[1])):
        if not front or gain > front[-1][1]:
            front.append((harm, gain))
    return front


def harm(run: RunData, quantity: Quantity) -> float:
    """Cost per episode or accidents per 1000 steps: while learning, else of the evaluation."""
    if learned_online(run):
        accidents = run.accidents
        cost = math.fsum(quantity.cost_of(e.cost, e.signal_costs) for e in run.episodes)
        return quantity.rate_of(accidents, cost, len(run.episodes), run.episodes[-1].total_steps)
    if run.evaluation is None:
        return math.nan
    played = run.evaluation
    n = played.episodes
    cost = n * played.cost_in(quantity).value
    return quantity.rate_of(played.accidents, cost, n, n * played.mean_length)


def _finite(runs: Sequence[RunData], quantity: Quantity) -> list[RunData]:
    return [r for r in runs if math.isfinite(outcome(r)) and math.isfinite(harm(r, quantity))]


def _centre(runs: Sequence[RunData], quantity: Quantity) -> tuple[float, float]:
    return float(np.mean([harm(r, quantity) for r in runs])), float(np.mean([*map(outcome, runs)]))


def _draw_plane(axis: Axes, groups: Sequence[Group], quantity: Quantity) -> None:
    from matplotlib import rcParams

    for group in groups:
        look = group.look
        learned = any(run.episodes for run in group.runs)
        style: dict[str, Any] = {"marker": look.marker, "edgecolors": look.colour, "gid": look.gid}
        style["facecolors"] = look.colour if learned else "none"
        x = [harm(run, quantity) for run in group.runs]
        if len(x) > 1:
            axis.scatter(x, [*map(outcome, group.runs)], s=18, alpha=0.5, linewidths=0.8, **style)
        centre = _centre(group.runs, quantity)
        axis.scatter([centre[0]], [centre[1]], s=95, linewidths=1.6, **style)
    front = pareto_front([_centre(group.runs, quantity) for group in groups])
    axis.plot(*zip(*front, strict=True), color=rcParams["text.color"], linestyle=DASHED, zorder=0)
    finish(axis, _plane_title(quantity), "final return", quantity.rate)
    axis.set_xlim(left=0)


def _plane_title(quantity: Quantity) -> str:
    return f"Return against {quantity.rate.split()[0]} while learning"


def _draw_profile(axis: Axes, groups: Sequence[Group]) -> None:
    lowest = min(outcome(run) for group in groups for run in group.runs)
    for group in groups:
        reached = np.sort([outcome(run) for run in group.runs])
        n = len(reached)
        left = np.concatenate([[lowest], reached, reached[-1:]])
        share = np.concatenate([[1.0], 1.0 - np.arange(n) / n, [0.0]])
        axis.step(left, share, where="pre", **group.look.curve(markevery=None))
    finish(axis, "Share of the runs that reach a return", "share of runs", "final return")
    axis.set_ylim(0, 1.05)


def _judged(run: RunData) -> bool:
    return run.evaluation is not None and not math.isnan(run.estimate)


def _judgement(runs: Sequence[RunData], quantity: Quantity) -> tuple[float, float, float, float]:
    """(mean estimate, evaluated value, low, high) of runs that have both."""
    estimate = float(np.mean([run.estimate for run in runs]))
    played = [run.evaluation for run in runs if run.evaluation is not None]
    if quantity is not ACCIDENT:
        costs = [e.cost_in(quantity) for e in played]
        mean, error = mean_and_error([cost.value for cost in costs])
        margin = 2.0 * (costs[0].error if len(played) == 1 else error)
        return estimate, mean, max(0.0, mean - margin), mean + margin
    k, n = sum(e.accidents for e in played), sum(e.episodes for e in played)
    return estimate, k / n, *clopper_pearson(k, n, min(run.confidence for run in runs))


def _draw_judgement(axis: Axes, groups: Sequence[Group], quantity: Quantity) -> None:
    from matplotlib import rcParams

    top = 0.0
    for group in groups:
        look = group.look
        x, y, low, high = _judgement(group.runs, quantity)
        top = max(top, x, high)
        axis.vlines([x], low, high, color=look.colour, linewidth=1.5, gid=look.gid)
        axis.scatter([x], [y], s=60, marker=look.marker, color=look.colour, gid=look.gid)
    ink = rcParams["text.color"]
    axis.plot([0, 1.1 * top], [0, 1.1 * top], color=ink, linestyle=DASHED, linewidth=1.1, zorder=0)
    finish(
        axis,
        "Estimate of the final policy against its evaluation",
        quantity.evaluated,
        "estimate (mean over runs)",
    )
    axis.set_xlim(0, 1.1 * top or 1.0)
    axis.set_ylim(0, 1.1 * top or 1.0)
