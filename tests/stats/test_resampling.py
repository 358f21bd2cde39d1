"""Bootstraps and sign flips over runs, against answers worked out by hand."""

import itertools
import math

import numpy as np
import pytest

from safe_offrl.stats.resampling import (
    MOST_EXACT,
    bootstrap_band,
    iqm_of_curves,
    ratio_interval,
    sign_flip_p_value,
)


def _mean(x):
    return x.mean(axis=0)


def test_a_band_of_two_runs_by_hand():
    """Of 0 and 1 the mean of a resample is 0, 1/2 or 1, with probabilities 1/4, 1/2 and 1/4."""
    curves = [[0.0, 3.0], [1.0, 3.0]]
    low, high = bootstrap_band(curves, _mean, np.random.default_rng(0))
    assert (low.tolist(), high.tolist()) == ([0.0, 3.0], [1.0, 3.0])
    low, high = bootstrap_band(curves, _mean, np.random.default_rng(0), confidence=0.4)
    assert (low[0], high[0]) == (0.5, 0.5)


def test_a_band_draws_whole_runs():
    """Two mirrored runs: with whole curves drawn, both points of a resample always sum to 1."""
    sums = []

    def statistic(x):
        sums.append(x.mean(axis=0).sum(axis=1))
        return x.mean(axis=0)

    bootstrap_band([[0.0, 1.0], [1.0, 0.0]], statistic, np.random.default_rng(0))
    assert np.allclose(sums[0], 1.0)


def test_a_band_of_the_interquartile_mean_by_hand():
    """Four runs at 0, one at 100: up to one copy of it is cut off, which is 74 % of resamples."""
    curves = np.array([[0.0], [0.0], [0.0], [0.0], [100.0]])
    low, high = bootstrap_band(curves, iqm_of_curves, np.random.default_rng(0), confidence=0.4)
    assert (low[0], high[0]) == (0.0, 0.0)
    _, high = bootstrap_band(curves, _mean, np.random.default_rng(0), confidence=0.4)
    assert high[0] == 20.0


@pytest.mark.parametrize("curves", [[1.0, 2.0], np.zeros((0, 3))])
def test_a_band_needs_curves(curves):
    with pytest.raises(ValueError, match="curves must be"):
        bootstrap_band(curves, _mean, np.random.default_rng(0))


def test_a_ratio_against_all_resamples():
    """Three pairs: 27 equally likely resamples, whose quantiles can be written down."""
    rows = np.array([[1.0, 10.0, 4.0, 20.0], [2.0, 10.0, 1.0, 10.0], [0.0, 10.0, 3.0, 10.0]])
    ratios = []
    for drawn in itertools.product(rows, repeat=3):
        k1, e1, k2, e2 = np.sum(drawn, axis=0)
        ratios.append((k1 / e1) / (k2 / e2))
    low, high = ratio_interval([rows], np.random.default_rng(0), confidence=0.8)
    expected = np.quantile(ratios, [0.1, 0.9], method="inverted_cdf")
    assert (low, high) == pytest.approx(tuple(expected))


def test_a_ratio_draws_within_strata():
    """One pair in each stratum, nothing to draw: 1 + 2 in 20 steps against 4 + 1 in 30."""
    strata = [[[1.0, 10.0, 4.0, 20.0]], [[2.0, 10.0, 1.0, 10.0]]]
    expected = (3 / 20) / (5 / 30)
    found = ratio_interval(strata, np.random.default_rng(0))
    assert found == pytest.approx((expected, expected))


def test_a_ratio_without_accidents_says_nothing():
    nothing = [[0.0, 10.0, 0.0, 10.0]] * 4
    assert ratio_interval([nothing], np.random.default_rng(0)) == (0.0, math.inf)
    one_sided = [[0.0, 10.0, 3.0, 10.0]] * 4
    assert ratio_interval([one_sided], np.random.default_rng(0)) == (0.0, 0.0)
    assert ratio_interval([[[3.0, 10.0, 0.0, 10.0]] * 4], np.random.default_rng(0)) == (
        math.inf,
        math.inf,
    )
    with pytest.raises(ValueError, match="every stratum"):
        ratio_interval([[]], np.random.default_rng(0))


def test_a_ratio_is_first_over_second():
    pair = [[1.0, 10.0, 4.0, 10.0]]
    assert ratio_interval([pair], np.random.default_rng(0)) == (0.25, 0.25)


@pytest.mark.parametrize(
    ("differences", "p_value"),
    [
        ([1.0], 1.0),
        ([1.0] * 5, 2 / 32),
        ([-1.0, -2.0, -3.0, -4.0], 2 / 16),
        ([3.0, 1.0, -1.0], 6 / 8),  # |sums| of all signs: 3, 5, 1, 3, twice
        ([0.0, 0.0], 1.0),
        ([0.1, 0.2, -0.3], 1.0),  # 0 on paper
        ([0.1, 0.2, 0.1, 0.7], 2 / 16),  # two sums of the same numbers that differ by rounding
    ],
)
def test_sign_flips_by_hand(differences, p_value):
    assert sign_flip_p_value(differences) == p_value


def test_many_pairs_are_flipped_at_random():
    """At random the p-value is that of all patterns up to chance; and it is never 0."""
    x = np.random.default_rng(1).normal(0.4, 1.0, MOST_EXACT)
    exact = sign_flip_p_value(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safe_offrl.stats.resampling.MOST_EXACT", 3)
        assert sign_flip_p_value(x) == pytest.approx(exact, abs=0.01)
    assert 0.0 < sign_flip_p_value(np.ones(40)) < 1e-3


def test_sign_flips_need_pairs():
    with pytest.raises(ValueError, match="differences"):
        sign_flip_p_value([])
