"""Panels of the constraints, iteration by iteration: did they hold, and how close were they."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from safe_offrl.report.charts.style import (
    Curve,
    Group,
    Panel,
    draw_group,
    draw_limit,
    finish,
    in_words,
    mean_of_curves,
    over_steps,
    together,
)
from safe_offrl.report.decisions import LoggedDecision
from safe_offrl.report.run_data import RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RECENT = 10  # iterations
_WIDE = 10.0  # ratios above this need a logarithmic axis


def constraint_panels(groups: Sequence[Group]) -> list[Panel]:
    """Share of iterations with both constraints held, KL over delta, estimate over its limit.

    Of the policy that acts, as measured; a quantity that no run measured has no panel.
    """
    # Runs that measured them.
    measured = _with_measurements(groups, lambda d: 0.0 if d.measured else math.nan)
    moved = _with_measurements(groups, _kl_share)
    estimated = _with_measurements(groups, _estimate_share)
    panels = []
    # Share of iterations that held both.
    if measured:
        shares = {
            g.label: f"{np.mean([d.satisfied for r in g.runs for d in r.decisions]):.1%}"
            for g in measured
        }
        panels.append(
            Panel(
                "held",
                f"Both constraints held, last {_RECENT} iterations",
                lambda axis: _draw_held(axis, measured),
                f"Share of the last {_RECENT} iterations after which the acting policy had both "
                "measured constraints satisfied, over environment steps. "
                f"Of all iterations: {in_words(shares)}.",
            )
        )
    # Divergence and estimate over their limits.
    for name, title, shown, value in (
        ("kl", _divergence_title(moved), moved, _kl_share),
        ("limit", "Estimate of the acting policy, over its limit", estimated, _estimate_share),
    ):
        if shown:
            panels.append(_share_panel(name, title, shown, value))
    return panels


def _share_panel(
    name: str, title: str, groups: Sequence[Group], value: Callable[[LoggedDecision], float]
) -> Panel:
    largest = {
        g.label: f"{max(y.max() for run in g.runs if len(y := _curve(run, value)[1])):.3g}"
        for g in groups
    }
    return Panel(
        name,
        title,
        lambda axis: _draw_share(axis, title, groups, value),
        f"{title}, over environment steps, mean over runs; below 1 the constraint holds. "
        f"Largest of any run: {in_words(largest)}.",
    )


def _divergence_title(groups: Sequence[Group]) -> str:
    """By its name; its unit, which is delta's, is said where it is not delta's usual one."""
    found = {d.divergence for group in groups for run in group.runs for d in run.decisions}
    names, units = (" or ".join(sorted({x[i] for x in found})) for i in (0, 1))
    delta = "delta" if units in ("", "nats") else f"delta in {units}"
    return f"{names} between consecutive acting policies, over {delta}"


def _kl_share(decision: LoggedDecision) -> float:
    return decision.movement / decision.delta


def _estimate_share(decision: LoggedDecision) -> float:
    return decision.estimate_share


def _curve(run: RunData, value: Callable[[LoggedDecision], float]) -> Curve:
    """The iterations in which it was measured."""
    known = [(d.step, y) for d in run.decisions if not math.isnan(y := value(d))]
    return np.array([x for x, _ in known], float), np.array([y for _, y in known], float)


def _with_measurements(
    groups: Sequence[Group], value: Callable[[LoggedDecision], float]
) -> list[Group]:
    """The groups, and of them the runs, that measured it; without measurement KL is not 0."""
    found = []
    for group in groups:
        runs = [
            run
            for run in group.runs
            if any(d.measured for d in run.decisions) and len(_curve(run, value)[0])
        ]
        if runs:
            found.append(group._replace(runs=runs))
    return found


def held(run: RunData, window: int = _RECENT) -> Curve:
    """Share of the last ``window`` iterations (or of those so far) that satisfied both."""
    total = np.cumsum([0.0, *(d.satisfied for d in run.decisions)])
    n = np.arange(1, len(total))
    first = np.maximum(n - window, 0)
    return np.array([d.step for d in run.decisions], float), (total[n] - total[first]) / (n - first)


def _draw_held(axis: Axes, groups: Sequence[Group]) -> None:
    for group in groups:
        draw_group(axis, group, *together([held(run) for run in group.runs]), mean_of_curves)
    title = f"Both constraints held, last {_RECENT} iterations"
    finish(axis, title, "share of iterations, mean over runs")
    over_steps(axis, groups)
    axis.set_ylim(-0.02, 1.04)


def _draw_share(
    axis: Axes, title: str, groups: Sequence[Group], value: Callable[[LoggedDecision], float]
) -> None:
    highest = 1.0
    for group in groups:
        curves = [_curve(run, value) for run in group.runs]
        line = draw_group(axis, group, *together(curves), mean_of_curves)
        highest = max(highest, float(line.max()))
    finish(axis, title, "share of the limit, mean over runs")
    over_steps(axis, groups)
    if highest > _WIDE:
        axis.set_yscale("symlog", linthresh=1.0)
    axis.set_ylim(bottom=0)
    draw_limit(axis, "", 1.0)
