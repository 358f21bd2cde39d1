"""What episodes of one policy, or of several, amounted to, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from safe_offrl.limits import quantity_named
from safe_offrl.stats.fixed import (
    clopper_pearson,
    clopper_pearson_lower,
    mean_and_error,
    mean_lower,
)
from safe_offrl.types import Episode


class Realised(NamedTuple):
    """A value in the unit of what is constrained, with a two-sided 95 % interval to draw.

    ``at_least`` is a one-sided lower bound, for one look at a fixed number of episodes.
    """

    value: float
    low: float
    high: float
    at_least: float


def realised(episodes: Sequence[Episode], constraint: str, confidence: float = 0.95) -> Realised:
    """Of an accident rate with bounds of Clopper and Pearson; of a cost two standard errors, and
    Student's bound, at ``confidence`` as the other.
    """
    if constraint != "accident":
        costs = [quantity_named(constraint).of_episode(episode) for episode in episodes]
        mean, error = mean_and_error(costs)
        low, high = max(0.0, mean - 2.0 * error), mean + 2.0 * error
        return Realised(mean, low, high, max(0.0, mean_lower(costs, confidence)))
    accidents, n = sum(episode.accident for episode in episodes), len(episodes)
    at_least = clopper_pearson_lower(accidents, n, confidence)
    return Realised(accidents / n, *clopper_pearson(accidents, n), at_least)
