"""What seeds say: bootstraps and exact tests that draw whole runs, or pairs of runs.

The tools of anytime.py and fixed.py treat episodes and cover the chance of accidents. These treat
runs, and cover that another seed gives another run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

MOST_EXACT = 14  # of so many pairs all 2^n sign flips are looked at, of more random ones
RANDOM_FLIPS = 20_000
_FLIP_SEED = 0

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def bootstrap_band(
    curves: ArrayLike,
    statistic: Statistic,
    rng: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Percentile bootstrap of a curve over runs, point by point: [n, P] -> ([P], [P]).

    ``statistic`` reduces the first axis: [n, ...] -> [...]. Whole curves are drawn, so that a run
    is in a resample at all its points or at none.
    """
    values = np.asarray(curves, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"curves must be [n, P] with n >= 1, got {values.shape}")
    n = len(values)
    draws = statistic(values[rng.integers(n, size=(n, resamples))])
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail], axis=0)
    return low, high


def ratio_interval(
    strata: Sequence[ArrayLike],
    rng: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> tuple[float, float]:
    """Paired bootstrap of the ratio of two total rates, drawing pairs within each stratum.

    Each stratum is [n_i, 4], a row a pair: count and exposure of the first, of the second. The
    ratio is (sum k1 / sum e1) / (sum k2 / sum e2) over all drawn pairs. A draw without any count
    says nothing: it counts as 0 for the lower bound and as infinity for the upper one.
    """
    totals = np.zeros((resamples, 4))
    for stratum in strata:
        rows = np.asarray(stratum, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != 4 or not len(rows):
            raise ValueError(f"every stratum must be [n, 4] with n >= 1, got {rows.shape}")
        totals += rows[rng.integers(len(rows), size=(resamples, len(rows)))].sum(axis=1)
    k1, e1, k2, e2 = totals.T
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (k1 / e1) / (k2 / e2)
    tail = (1.0 - confidence) / 2.0
    # It does not interpolate, because nothing lies between a number and infinity.
    low = np.quantile(np.nan_to_num(ratios, nan=0.0, posinf=np.inf), tail, method="lower")
    high = np.quantile(
        np.nan_to_num(ratios, nan=np.inf, posinf=np.inf), 1.0 - tail, method="higher"
    )
    return float(low), float(high)


def sign_flip_p_value(differences: ArrayLike) -> float:
    """Exact two-sided p-value of "within each pair, either could have been the other".

    The share of all 2^n sign patterns whose |sum| is at least the observed one (Fisher's
    randomisation test for pairs). With n pairs it is never below 2 / 2^n. From MOST_EXACT pairs on,
    RANDOM_FLIPS random patterns, the observed one among them.
    """
    x = np.asarray(differences, dtype=np.float64)
    if x.ndim != 1 or not len(x):
        raise ValueError(f"differences must be [n] with n >= 1, got {x.shape}")
    n = len(x)
    if n <= MOST_EXACT:
        patterns = np.arange(2**n)[:, None] >> np.arange(n) & 1
    else:
        patterns = np.random.default_rng(_FLIP_SEED).integers(2, size=(RANDOM_FLIPS, n))
        patterns[0] = 1
    sums = np.abs((2.0 * patterns - 1.0) @ x)
    # Rounding may tell sums apart that are equal on paper.
    return float((sums >= abs(x.sum()) - 1e-9 * np.abs(x).sum()).mean())


def iqm(values: ArrayLike) -> float:
    """Interquartile mean: the mean after dropping floor(n / 4) values at each end.

    Agarwal et al. 2021 (rliable), which uses scipy's trim_mean(0.25). NaN when there is no value.
    """
    flat = np.ravel(np.asarray(values, dtype=np.float64))
    return float(iqm_of_curves(flat)) if len(flat) else math.nan


def iqm_of_curves(curves: ArrayLike) -> NDArray[np.float64]:
    """Interquartile mean over the first axis, point by point: [n, ...] -> [...]."""
    ordered = np.sort(np.asarray(curves, dtype=np.float64), axis=0)
    cut = len(ordered) // 4
    return np.asarray(ordered[cut : len(ordered) - cut].mean(axis=0))


def bootstrap_interval(
    strata: Sequence[ArrayLike],
    statistic: Callable[[NDArray[np.float64]], float],
    rng: np.random.Generator,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    """Stratified percentile bootstrap of ``statistic``.

    Each stratum is an array [n_i, ...]; its rows are drawn with replacement within the stratum, and
    the statistic gets all drawn rows together [sum n_i, ...]. Paired data: one row holds the pair.
    """
    arrays = [np.asarray(s, dtype=np.float64) for s in strata]
    if not arrays or any(len(a) == 0 for a in arrays):
        raise ValueError("every stratum needs at least one row")
    draws = [
        statistic(np.concatenate([a[rng.integers(len(a), size=len(a))] for a in arrays]))
        for _ in range(resamples)
    ]
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return float(low), float(high)
