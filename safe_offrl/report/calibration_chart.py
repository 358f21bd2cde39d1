"""Pictures of how far estimates are to be trusted: the offline report, and the online phase."""

from __future__ import annotations

import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from safe_offrl.limits import quantity_named
from safe_offrl.report.charts import COLOURS, LIGHT, finish
from safe_offrl.report.charts.style import blank_figure
from safe_offrl.report.realised import realised
from safe_offrl.safety.calibration import CalibrationReport
from safe_offrl.stats.reliability import EDGES
from safe_offrl.types import Episode

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLOCKS = 8  # of episodes, into which an online phase is cut
MIN_BLOCK = {"accident": 25, "cost": 5}  # episodes: fewer have an interval that says nothing
MIN_BIN_EPISODES = 5  # behind a point of the reliability diagram
_BLUE, _ORANGE, _GREEN = COLOURS[:3]
_INK = "0.25"
_DASHED = (0, (4, 3))


def report_png(report: CalibrationReport) -> bytes:
    """The calibration report as a PNG: reliability, counts, ranking, estimates."""
    import matplotlib as mpl

    with mpl.rc_context(LIGHT):
        figure = blank_figure(11.5, 7.4)
        grid = figure.add_gridspec(2, 2, height_ratios=(1.0, 0.55))
        reliability = figure.add_subplot(grid[0, 0])
        _draw_reliability(reliability, report)
        _draw_counts(figure.add_subplot(grid[1, 0], sharex=reliability), report)
        _draw_ranking(figure.add_subplot(grid[0, 1]), report)
        _draw_start(figure.add_subplot(grid[1, 1]), report)
        title = (
            f"Safety critic on {report.episodes:,} held-out episodes, "
            f"{report.accident_episodes:,} with an accident"
        )
        return figure_png(figure, title)


def _draw_reliability(axis: Axes, report: CalibrationReport) -> None:
    # Bins that hold enough episodes.
    bins = [b for b in report.bins if b.episodes >= MIN_BIN_EPISODES]
    x = np.array([b.predicted for b in bins])
    y = np.array([b.outcome for b in bins])
    seen = np.array([b.seen for b in bins])
    errors = [y - [b.low for b in bins], [b.high for b in bins] - y]
    floor = _floor(report)
    # Outcomes against the diagonal.
    axis.plot([1e-9, 1.0], [1e-9, 1.0], color=_INK, linestyle=_DASHED, label="as estimated")
    axis.errorbar(
        x,
        y,
        yerr=np.clip(errors, 0.0, None),
        fmt="o-",
        color=_BLUE,
        linewidth=1.4,
        elinewidth=1.0,
        capsize=2.5,
        markersize=5,
        label="outcome, 95 % interval",
    )
    # The logged part of them.
    visible = seen > floor  # A zero has no place on this axis.
    axis.plot(
        x[visible],
        seen[visible],
        "o",
        markerfacecolor="none",
        color=_ORANGE,
        markersize=7,
        label="the logged part of it",
    )
    # Axes.
    axis.set_yscale("log")
    axis.set_ylim(floor, 1.05)
    _risk_axis(axis, floor)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(loc="upper left", fontsize=8.5, framealpha=0.85)
    what = quantity_named(report.constraint).risk
    finish(axis, f"Reliability: {what}", "what followed", "what the critic said")


def _draw_counts(axis: Axes, report: CalibrationReport) -> None:
    floor = _floor(report)
    edges = [floor, *EDGES, 1.0]
    for b in report.bins:
        k = int(np.digitize(b.predicted, EDGES))
        left, right = max(edges[k], floor), edges[k + 1]
        axis.bar(left, b.transitions, right - left, align="edge", color=_BLUE, edgecolor="white")
        if b.episodes < MIN_BIN_EPISODES:
            continue
        axis.annotate(
            f"{b.transitions:,}\n{b.episodes:,} ep.",
            (math.sqrt(left * right), b.transitions),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color=_INK,
        )
    axis.set_yscale("log")
    axis.set_ylim(bottom=0.7, top=15.0 * max(b.transitions for b in report.bins))
    _risk_axis(axis, floor)
    finish(axis, "Steps and episodes behind each point", "steps", "what the critic said")
    axis.grid(False, axis="x")


def _floor(report: CalibrationReport) -> float:
    """Left end of the risk axis: just below what the critic says of a good many steps."""
    smallest = min(
        (b.predicted for b in report.bins if b.episodes >= MIN_BIN_EPISODES), default=0.01
    )
    return max(1e-4, 0.5 * min(smallest, 0.02))


def _risk_axis(axis: Axes, floor: float) -> None:
    axis.set_xscale("log")
    axis.set_xlim(floor, 1.05)
    axis.xaxis.set_major_formatter("{x:g}")


def _draw_ranking(axis: Axes, report: CalibrationReport) -> None:
    """Each pair of actions at one state, from the one that is most in error to the clearest."""
    contrasts = np.array(report.contrasts)
    share = (np.arange(len(contrasts)) + 0.5) / max(1, len(contrasts))
    for right, colour, label in (
        (False, _ORANGE, "the safe action called riskier"),
        (True, _BLUE, "the dangerous action called riskier"),
    ):
        some = (contrasts > 0.0) == right
        axis.fill_between(share[some], contrasts[some], step="mid", color=colour, alpha=0.5)
        axis.plot(share[some], contrasts[some], color=colour, linewidth=1.6, label=label)
    axis.axhline(0.0, color=_INK, linewidth=0.8)
    axis.axvline(0.5, color=_INK, linestyle=_DASHED, linewidth=1.0, label="chance")
    axis.set_xlim(0.0, 1.0)
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.legend(loc="upper left", fontsize=8.5, framealpha=0.85)
    verdict = "acts" if report.shield_acts else "abstains"
    finish(
        axis,
        f"Ranking {report.ranking:.2f} (at least {report.ranking_low:.2f}): the shield {verdict}",
        "difference in risk",
        f"{report.ranking_pairs:,} pairs of a dangerous and a safe action at one state",
    )


def _draw_start(axis: Axes, report: CalibrationReport) -> None:
    # Estimates.
    quantity = quantity_named(report.constraint)
    logged = quantity.select(report.behaviour_accident_rate, report.behaviour_cost)
    rows = {
        "upper estimate": (report.estimate_upper, _BLUE),
        "estimate": (report.estimate, _BLUE),
        "plain TD": (report.estimate_plain_td, _INK),
        "logged behaviour": (logged, _INK),
    }
    # Limit.
    axis.axvline(report.limit, color=_ORANGE, linestyle=_DASHED, linewidth=1.3)
    axis.annotate(
        f"{quantity.limit_in_words} {report.limit:g}",
        (report.limit, len(rows) - 0.5),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=_ORANGE,
    )
    # A line for each estimate.
    for y, (value, colour) in enumerate(rows.values()):
        axis.plot([0.0, value], [y, y], color=colour, linewidth=1.2, alpha=0.5)
        axis.plot([value], [y], "o", color=colour, markersize=7)
        axis.annotate(
            quantity.text(value),
            (value, y),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        )
    # Axes.
    largest = max(report.limit, *(v for v, _ in rows.values() if math.isfinite(v)))
    axis.set_xlim(0.0, 1.25 * largest)
    axis.set_ylim(-0.5, len(rows) - 0.2)
    axis.set_yticks(range(len(rows)), list(rows))
    finish(axis, "The new policy's estimate and the log", "", quantity.per_episode)


class Block(NamedTuple):
    """Successive episodes, the mean estimate they were played under, and what came of them."""

    first_step: int
    last_step: int
    episodes: int
    estimate: float
    realised: float
    low: float  # 95 % interval of what was realised
    high: float


def online_blocks(
    episodes: Sequence[Episode], iterations: Sequence[Mapping[str, Any]], constraint: str
) -> tuple[Block, ...]:
    """An online phase in up to BLOCKS blocks of equally many episodes; () if nothing was estimated.

    The estimate of an episode is that of the policy that played it, as it was measured BEFORE: in
    the last iteration that had ended. Episodes without one (the warm-up) are left out. Interval: of
    an accident rate Clopper-Pearson's, of a cost two standard errors. ``iterations`` are the lines
    of iterations.jsonl; ``constraint`` is the limit's.
    """
    forecasts: list[tuple[int, float]] = []
    for line in iterations:
        replaced = line["accepted"] or line["rolled_back"]
        value = line["v_candidate" if replaced else "v_previous"]
        forecasts.append((int(line["step"]), math.nan if value is None else float(value)))
    known: list[tuple[Episode, float]] = []
    k = -1
    for episode in episodes:
        begin = episode.total_steps - episode.steps
        while k + 1 < len(forecasts) and forecasts[k + 1][0] <= begin:
            k += 1
        if k >= 0 and not math.isnan(forecasts[k][1]):
            known.append((episode, forecasts[k][1]))
    count = min(BLOCKS, len(known) // MIN_BLOCK.get(constraint, MIN_BLOCK["cost"]))
    cuts = [round(i * len(known) / count) for i in range(count + 1)] if count else []
    return tuple(_block(known[a:b], constraint) for a, b in itertools.pairwise(cuts))


def _block(members: Sequence[tuple[Episode, float]], constraint: str) -> Block:
    played = [episode for episode, _ in members]
    value, low, high, _ = realised(played, constraint)
    return Block(
        first_step=played[0].total_steps - played[0].steps,
        last_step=played[-1].total_steps,
        episodes=len(members),
        estimate=statistics.fmean(estimate for _, estimate in members),
        realised=value,
        low=low,
        high=high,
    )


def online_png(blocks: Sequence[Block], constraint: str, limit: float) -> bytes:
    """The blocks of an online phase (at least one) as a PNG: what was estimated, what happened."""
    import matplotlib as mpl

    quantity = quantity_named(constraint)
    with mpl.rc_context(LIGHT):
        figure = blank_figure(9.0, 4.8)
        axis = figure.subplots()
        # What was realised.
        middle = [(b.first_step + b.last_step) / 2.0 for b in blocks]
        values = np.array([b.realised for b in blocks])
        errors = [values - [b.low for b in blocks], [b.high for b in blocks] - values]
        axis.errorbar(
            middle,
            values,
            yerr=np.clip(errors, 0.0, None),
            fmt="s",
            color=_ORANGE,
            elinewidth=1.1,
            capsize=3,
            markersize=6,
            label=f"realised, {quantity.interval}",
        )
        # Estimates and limit.
        estimates = [b.estimate for b in blocks]
        axis.plot(middle, estimates, "o-", color=_BLUE, linewidth=1.6, label="estimated before")
        name = quantity.limit_in_words
        axis.axhline(limit, color=_INK, linestyle=_DASHED, label=f"{name} {limit:g}")
        # Axes.
        axis.set_xlim(0, 1.02 * blocks[-1].last_step)
        axis.set_ylim(0, 1.25 * max(limit, *estimates, *(b.high for b in blocks)))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
        axis.legend(loc="upper center", ncols=3, fontsize=8.5, framealpha=0.85)
        episodes = sum(b.episodes for b in blocks)
        finish(axis, f"{episodes:,} episodes in {len(blocks)} blocks", quantity.per_episode)
        return figure_png(figure, "Estimate of the policy that acted, and what happened")


def figure_png(figure: Figure, title: str) -> bytes:
    """A figure under its title as a PNG."""
    figure.tight_layout(rect=(0, 0, 1, 0.95), h_pad=1.6, w_pad=2.0)
    figure.text(0.012, 0.985, title, va="top", fontsize=14, fontweight="bold")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
