"""The curve behind a calibration figure: risk against outcome.

Risks are small numbers, nearly all below a tenth. Hence bins in the steps 1, 2, 5 of a logarithmic
scale, where ten bins of equal width would put nearly every transition into the first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

EDGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # the first and last bin are open

Floats = NDArray[np.float32] | NDArray[np.float64]


class Bin(NamedTuple):
    """Transitions to which the critic gives about the same risk."""

    transitions: int
    episodes: int  # that they come from
    predicted: float  # mean risk
    outcome: float  # mean of what followed
    low: float  # 95 % interval of the outcome
    high: float
    seen: float  # the part of the outcome that is in the log, not the critic's own word


def reliability_bins(
    predicted: Floats, outcome: Floats, seen: Floats, episode: NDArray[np.int64]
) -> tuple[Bin, ...]:
    """The bins that are not empty, by rising risk; all arguments [N].

    The steps of an episode share its fate, so for the interval each episode counts as one draw.
    """
    bins = np.digitize(predicted, EDGES)
    result = []
    for k in np.unique(bins):
        members = bins == k
        episodes = len(np.unique(episode[members]))
        mean = float(outcome[members].mean())
        low, high = wilson_interval(mean, episodes)
        result.append(
            Bin(
                transitions=int(members.sum()),
                episodes=episodes,
                predicted=float(predicted[members].mean()),
                outcome=mean,
                low=low,
                high=high,
                seen=float(seen[members].mean()),
            )
        )
    return tuple(result)


def wilson_interval(mean: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of the expectation of n draws in [0, 1], z standard errors wide (Wilson 1927).

    ``(m + z^2/2n -+ z sqrt(m (1 - m)/n + z^2/4n^2)) / (1 + z^2/n)``. Draws between 0 and 1 vary
    less than the 0/1 draws that it is made for.
    """
    centre = mean + z * z / (2 * n)
    half = z * math.sqrt(mean * (1.0 - mean) / n + (z / (2 * n)) ** 2)
    scale = 1.0 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
