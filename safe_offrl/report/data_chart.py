"""The picture of a dataset: what it paid and cost, when accidents happened, where it was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from safe_offrl.check.inspect import (
    TIME_BINS,
    DatasetSummary,
    first_accidents,
    principal_components,
)
from safe_offrl.data.dataset import Dataset
from safe_offrl.report.charts import COLOURS, LIGHT, finish
from safe_offrl.report.charts.style import blank_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 20_000  # of the state panel: more make the file larger, not the picture clearer
MAX_GROUPS = len(COLOURS) - 1  # with a colour of their own; the rest share the last


def write_data_png(dataset: Dataset, summary: DatasetSummary, path: Path) -> None:
    """Write a PNG of four panels: return against cost, accident times, states, actions."""
    import matplotlib as mpl

    with mpl.rc_context(LIGHT):
        _draw_all(dataset, summary, path)


def _draw_all(dataset: Dataset, summary: DatasetSummary, path: Path) -> None:
    figure = blank_figure(12.5, 8.4)
    plane, times, states, actions = figure.subplots(2, 2).ravel()
    _draw_episodes(plane, dataset, summary)
    _draw_times(times, dataset)
    _draw_states(states, dataset)
    _draw_actions(actions, dataset)
    figure.tight_layout(rect=(0, 0, 1, 0.955), h_pad=2.0, w_pad=2.0)
    title = f"{summary.env_id or 'dataset'}: {summary.episodes:,} episodes, "
    figure.text(
        0.012,
        0.985,
        title + f"{summary.transitions:,} transitions",
        va="top",
        fontsize=14,
        fontweight="bold",
    )
    figure.savefig(path)


def _draw_episodes(axis: Axes, dataset: Dataset, summary: DatasetSummary) -> None:
    # Behaviours.
    index = dataset.episode_behaviours
    if index is None:
        index = np.zeros(dataset.episodes, dtype=int)
        names = ["episodes"]
    else:
        names = [str(b.get("name")) for b in dataset.metadata["behaviours"]]
    # Episodes.
    for k in np.unique(index):
        members = index == k
        axis.scatter(
            dataset.episode_costs[members],
            dataset.episode_returns[members],
            s=14,
            alpha=0.6,
            linewidths=0,
            color=COLOURS[min(k, MAX_GROUPS)],
            label=names[k] if k < MAX_GROUPS or len(names) == MAX_GROUPS + 1 else None,
        )
    if len(names) > MAX_GROUPS + 1:
        label = f"{len(names) - MAX_GROUPS} more"
        axis.scatter([], [], s=14, color=COLOURS[MAX_GROUPS], label=label)
    # Limit.
    if summary.constraint == "cost":
        axis.axvline(summary.limit, color="0.25", linestyle=(0, (4, 3)), linewidth=1.1)
        axis.annotate(
            f"limit {summary.limit:g}",
            (summary.limit, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -10),
            textcoords="offset points",
            fontsize=8.5,
            color="0.25",
        )
    # Legend and title.
    axis.legend(fontsize=8, framealpha=0.85)
    finish(axis, "Return against cost, one dot an episode", "return", "cost of the episode")


def _draw_times(axis: Axes, dataset: Dataset) -> None:
    axis.hist(first_accidents(dataset), 2 * TIME_BINS, range=(0.0, 1.0), color=COLOURS[1])
    finish(axis, "First accident of each episode", "episodes", "share of the horizon that is over")


def _draw_states(axis: Axes, dataset: Dataset) -> None:
    step = max(1, -(-len(dataset.rows) // MAX_POINTS))
    points = principal_components(dataset.transitions.observations[::step].numpy())
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    accident = dataset.transitions.accidents[::step].numpy() > 0
    x, y = points.T
    axis.scatter(x[~accident], y[~accident], s=3, alpha=0.25, linewidths=0, color=COLOURS[0])
    axis.scatter(x[accident], y[accident], s=9, alpha=0.7, linewidths=0, color=COLOURS[1])
    finish(
        axis,
        "States (orange: accident steps)",
        "second principal component",
        "first principal component",
    )


def _draw_actions(axis: Axes, dataset: Dataset) -> None:
    actions = dataset.transitions.actions.numpy()
    if dataset.discrete:
        axis.bar(np.arange(actions.shape[1]), actions.mean(axis=0), color=COLOURS[0])
        finish(axis, "Actions", "share of the steps", "action")
        return
    for k in range(min(actions.shape[1], len(COLOURS))):
        counts, edges = np.histogram(actions[:, k], 40, (-1.0, 1.0), density=True)
        axis.step(edges[:-1], counts, where="post", color=COLOURS[k], label=f"action {k}")
    axis.legend(fontsize=8, framealpha=0.85)
    finish(axis, "Actions", "density", "from -1 to 1, the bounds of the environment")
