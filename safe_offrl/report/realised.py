"""What episodes of one policy, or of several, amounted to, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from safe_offrl.stats.fixed import (
    clopper_pearson,
    clopper_pearson_lower,
    clopper_pearson_upper,
    mean_and_error,
    mean_bounds,
)
from safe_offrl.types import Episode


class Realised(NamedTuple):
    """A value in the unit of what is constrained, and a two-sided interval to draw."""

    value: float
    low: float
    high: float


def realised(episodes: Sequence[Episode], constraint: str) -> Realised:
    """Of an accident rate with Clopper-Pearson's 95 % interval, of a cost with two errors."""
    if constraint == "cost":
        mean, error = mean_and_error([episode.cost for episode in episodes])
        return Realised(mean, max(0.0, mean - 2.0 * error), mean + 2.0 * error)
    accidents = sum(episode.accident for episode in episodes)
    return Realised(accidents / len(episodes), *clopper_pearson(accidents, len(episodes)))


def one_sided_bounds(
    episodes: Sequence[Episode], constraint: str, confidence: float
) -> tuple[float, float]:
    """Lower and upper bound, each by itself at ``confidence``; one look at a fixed number."""
    if constraint == "cost":
        lower, upper = mean_bounds([episode.cost for episode in episodes], confidence)
        return max(0.0, lower), upper
    accidents, n = sum(episode.accident for episode in episodes), len(episodes)
    return (
        clopper_pearson_lower(accidents, n, confidence),
        clopper_pearson_upper(accidents, n, confidence),
    )
