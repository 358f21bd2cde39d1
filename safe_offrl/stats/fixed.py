"""What a fixed number of episodes shows: one look, at the end.

The bounds that hold while one is looking are those of :mod:`safe_offrl.stats.anytime`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from safe_offrl.stats.anytime import betabinomial_sequence, require_counts, run_level_upper

Number = TypeVar("Number", int, float)

# --- one frozen policy --------------------------------------------------------------------------


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided interval of a constant probability, for ONE look at a fixed n.

    Looking after every episode breaks it (24-28 % of runs miss at "95 %"):
    use :func:`betabinomial_sequence` then.
    """
    one_sided = (1.0 + confidence) / 2.0
    return clopper_pearson_lower(k, n, one_sided), clopper_pearson_upper(k, n, one_sided)


def clopper_pearson_upper(k: int, n: int, confidence: float = 0.95) -> float:
    """Exact one-sided upper bound of a constant probability, for one look at a fixed n."""
    require_counts(k, n)
    return 1.0 if k == n else float(special.betaincinv(k + 1.0, n - k, confidence))


def clopper_pearson_lower(k: int, n: int, confidence: float = 0.95) -> float:
    """Exact one-sided lower bound of a constant probability, for one look at a fixed n."""
    require_counts(k, n)
    return 0.0 if k == 0 else float(special.betaincinv(k, n - k + 1.0, 1.0 - confidence))


# --- what a number of episodes can show -------------------------------------------------------


def error_share(confidence: float, k: int) -> float:
    """Error that the k-th statement of a series may use: 6 / (pi^2 k^2) of 1 - ``confidence``.

    The shares of all k = 1, 2, ... sum to 1, so all statements together are at ``confidence``.
    """
    return (1.0 - confidence) * 6.0 / (math.pi * k) ** 2


def shared_confidence(confidence: float, statements: int) -> float:
    """Confidence of each of so many statements that are to hold together at ``confidence``.

    The error is split evenly between them (Bonferroni).
    """
    return confidence if statements == 1 else 1.0 - (1.0 - confidence) / statements


class PerTool(NamedTuple, Generic[Number]):
    """One number for each of the three tools."""

    fixed: Number  # Clopper-Pearson, one look at a fixed n
    anytime: Number  # beta-binomial sequence, one frozen policy, looking all the time
    run_level: Number  # mean over a run of changing policies, looking all the time


def fewest(enough: int, holds: Callable[[int], bool]) -> int:
    """The smallest number above ``enough // 2`` that ``holds``; so must all that are larger."""
    fewer = enough // 2
    while not holds(enough):
        fewer, enough = enough, 2 * enough
    while enough - fewer > 1:
        middle = (fewer + enough) // 2
        fewer, enough = (fewer, middle) if holds(middle) else (middle, enough)
    return enough


def episodes_needed(epsilon: float, confidence: float = 0.95) -> PerTool[int]:
    """Accident-free episodes after which each tool's upper bound is at most ``epsilon``."""
    alpha = 1.0 - confidence
    return PerTool(
        fixed=math.ceil(math.log(alpha) / math.log1p(-epsilon)),
        anytime=fewest(1, lambda n: betabinomial_sequence(0, n, confidence)[1] <= epsilon),
        run_level=math.ceil(run_level_upper(0, confidence) / epsilon),
    )


def smallest_epsilon(episodes: int, confidence: float = 0.95) -> PerTool[float]:
    """Upper bound of each tool after ``episodes`` without accident: the best a budget can show."""
    if episodes < 1:
        return PerTool(1.0, 1.0, 1.0)
    return PerTool(
        fixed=clopper_pearson_upper(0, episodes, confidence),
        anytime=betabinomial_sequence(0, episodes, confidence)[1],
        run_level=min(1.0, run_level_upper(0, confidence) / episodes),
    )


# --- comparing runs ---------------------------------------------------------------------------


class RateRatio(NamedTuple):
    """Ratio of two accident rates with its exact interval and two-sided p-value of "equal"."""

    ratio: float  # NaN when neither had an accident
    low: float
    high: float
    p_value: float


def rate_ratio(
    k1: int, exposure1: float, k2: int, exposure2: float, confidence: float = 0.95
) -> RateRatio:
    """Compare two accident totals exactly, each over its exposure (steps or episodes).

    Given k1 + k2, Poisson totals make k1 binomial with share r e1 / (r e1 + e2); the interval of
    the share (Clopper-Pearson) maps to that of the ratio r = (k1 / e1) / (k2 / e2). It covers the
    chance of accidents, not differences between seeds.
    """
    if exposure1 <= 0 or exposure2 <= 0:
        raise ValueError(f"exposures must be positive, got {exposure1} and {exposure2}")
    if k1 + k2 == 0:
        return RateRatio(math.nan, 0.0, math.inf, 1.0)

    def to_ratio(share: float) -> float:
        return math.inf if share >= 1.0 else share / (1.0 - share) * exposure2 / exposure1

    low, high = clopper_pearson(k1, k1 + k2, confidence)
    share = exposure1 / (exposure1 + exposure2)  # under "equal rates"
    below = float(special.bdtr(k1, k1 + k2, share))
    above = 1.0 if k1 == 0 else float(special.bdtrc(k1 - 1, k1 + k2, share))
    p_value = min(1.0, 2.0 * min(below, above))
    return RateRatio(to_ratio(k1 / (k1 + k2)), to_ratio(low), to_ratio(high), p_value)


class Mean(NamedTuple):
    """A mean with its standard error."""

    value: float
    error: float


def mean_and_error(values: ArrayLike) -> Mean:
    """The mean, and its error by the spread of the values; NaN for what too few leave open."""
    x = np.asarray(values, dtype=np.float64)
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return Mean(float(x.mean()) if len(x) else math.nan, error)


def mean_lower(values: ArrayLike, confidence: float) -> float:
    """One-sided lower bound of a mean, by Student's t; -inf without a second value.

    Exact where values are normal. Of costs, most of them small and a few large, it is on the safe
    side; the upper bound would not be, and there is none here.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return -math.inf
    mean, error = mean_and_error(x)
    return mean - float(special.stdtrit(len(x) - 1, confidence)) * error


def standard_errors(confidence: float) -> float:
    """How many standard errors a one-sided normal upper limit lies above the mean.

    The quantile to three decimals, so that at 0.95 it is the 1.645 that every earlier run decided
    by, to the last bit; what is left out is small beside the error of any standard error.
    """
    return round(float(special.ndtri(confidence)), 3)
