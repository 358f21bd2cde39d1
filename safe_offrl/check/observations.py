"""Can what an environment shows be told apart? The scale and variation of its observations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.data.dataset import FLOAT32_EPS
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.observations import entry_name
from safe_offrl.record.env_report import EnvReport

ROUNDED = 1e-3  # float32 loses an entry's digits if it rounds by this share of its spread
FAR_FROM_ONE = 1e3  # a new network cannot tell inputs apart that are so much larger or smaller


def check_observations(report: EnvReport, env: AccidentEnv, values: NDArray[np.float64]) -> None:
    """Report on observations [n, O] as the environment gave them."""
    # Sizes and variation.
    largest = np.abs(values).max(axis=0)
    varies = values.min(axis=0) < values.max(axis=0)
    # An entry declared as float64 keeps its digits: an offset is subtracted in time.
    narrow = [np.full(p.stop - p.start, np.can_cast(p.box.dtype, np.float32)) for p in env.layout]
    narrow += [np.full(int(env.sums_cost), True)]
    coarse = FLOAT32_EPS * largest > ROUNDED * values.std(axis=0)
    rounded = np.flatnonzero(np.concatenate(narrow) & varies & coarse)
    constant = np.flatnonzero(~varies)
    distant = np.flatnonzero(varies & ((largest > FAR_FROM_ONE) | (largest < 1.0 / FAR_FROM_ONE)))
    # Report.
    report.measured |= {
        "largest_observation": float(largest.max()),
        "smallest_observation": float(largest.min()),
    }
    if len(rounded):
        report.add(
            "warn",
            "scale",
            f"{_entries(env, rounded)} so large, up to {largest[rounded].max():.3g}, that float32 "
            "rounds away how it varies. Declare that part of the observation space as float64, or "
            "subtract a constant in the environment.",
        )
    elif len(distant):
        report.add(
            "warn",
            "scale",
            f"{_entries(env, distant)} of another size than 1, {_sizes(largest[distant])}. "
            "Learning standardises it, but the policies that collect trains see it as it is: "
            "bring it near 1 in the environment, or log with behaviours of your own.",
        )
    if len(constant):
        report.add(
            "warn",
            "scale",
            f"{_entries(env, constant)} the same in every step seen. Leave out what never changes, "
            "or look whether it is filled.",
        )
    if not len(rounded) + len(distant) + len(constant):
        text = f"every entry varies, sizes {_sizes(largest)}; standardised in learning"
        report.add("ok", "scale", text)


def _sizes(largest: NDArray[np.float64]) -> str:
    """The least and the largest: "1e-07 to 1.2"; "1.2" if they are the same."""
    return " to ".join(dict.fromkeys(f"{size:.3g}" for size in (largest.min(), largest.max())))


def _entries(env: AccidentEnv, indices: Any) -> str:
    """The first three entries by name, and how many more: "a[0], a[1] and 4 more are"."""
    names = ", ".join(entry_name(env.layout, int(i)) for i in indices[:3])
    more = f" and {len(indices) - 3} more" if len(indices) > 3 else ""
    return f"{names}{more} {'is' if len(indices) == 1 else 'are'}"
