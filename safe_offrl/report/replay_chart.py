"""The picture of a replay: of each version that acted, the estimate and the truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from safe_offrl.limits import quantity_named
from safe_offrl.report.calibration_chart import figure_png
from safe_offrl.report.charts import COLOURS, LIGHT, finish
from safe_offrl.report.charts.style import DASHED, blank_figure

_BLUE, _ORANGE = COLOURS[:2]
_GREY = "0.25"


def replay_png(result: Mapping[str, Any]) -> bytes:
    """A PNG of what replay.json holds: over the steps of the run, and one against the other."""
    import matplotlib as mpl

    quantity, limit = quantity_named(result["constraint"]), result["limit"]
    rows = result["versions"]
    truth, low, high = (np.array([row[key] for row in rows]) for key in ("truth", "low", "high"))
    estimate = np.array([np.nan if (e := row.get("estimate")) is None else e for row in rows])
    steps = np.array([row.get("step", 0) for row in rows])
    errors = np.clip([truth - low, high - truth], 0.0, None)
    style: dict[str, Any] = {"fmt": "s", "color": _ORANGE, "elinewidth": 1.1, "markersize": 4.5}
    most = 1.1 * float(np.nanmax([limit, *high, *estimate]))
    with mpl.rc_context(LIGHT):
        figure = blank_figure(11.5, 4.8)
        over_steps, plane = figure.subplots(1, 2, width_ratios=(1.7, 1.0))
        label = f"{result['episodes']} episodes, {quantity.interval}"
        over_steps.errorbar(steps, truth, yerr=errors, label=label, **style)
        over_steps.plot(steps, estimate, "o", color=_BLUE, markersize=4.5, label="estimate")
        name = f"{quantity.limit_in_words} {limit:g}"
        over_steps.axhline(limit, color=_GREY, linestyle=DASHED, linewidth=1.2, label=name)
        over_steps.set_ylim(0.0, most)
        over_steps.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
        over_steps.legend(loc="upper center", ncols=3, fontsize=8.5, framealpha=0.85)
        finish(over_steps, "Versions by the step at which they began", quantity.per_episode)
        plane.errorbar(estimate, truth, yerr=errors, **style)
        plane.plot([0.0, most], [0.0, most], color=_GREY, linestyle=DASHED, linewidth=1.1)
        plane.axhline(limit, color=_GREY, linestyle=DASHED, linewidth=1.2)
        plane.set_xlim(0.0, most)
        plane.set_ylim(0.0, most)
        finish(plane, "Truth against estimate", quantity.per_episode, "estimate")
        return figure_png(figure, f"{result['run']}: every version that acted, played again")
