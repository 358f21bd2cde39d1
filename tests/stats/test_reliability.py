"""The bins and intervals behind the calibration figure, by hand."""

import numpy as np
import pytest

from safe_offrl.stats.reliability import reliability_bins, wilson_interval


def test_wilson_by_hand() -> None:
    # m = 0: [0, z^2 / (n + z^2)]; m = 1 mirrors it.
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 3.8416 / 13.8416))
    assert wilson_interval(1.0, 10) == pytest.approx((10.0 / 13.8416, 1.0))
    # m = 1/2, n = 12, z = 2: centre 1/2, half width 2 sqrt(1/48 + 1/144) / (4/3) = 1/4.
    assert wilson_interval(0.5, 12, z=2.0) == pytest.approx((0.25, 0.75))
    # m = 1/4, n = 12, z = 2: (1/4 + 1/6 -+ 2 sqrt(1/64 + 1/144)) / (4/3)
    assert wilson_interval(0.25, 12, z=2.0) == pytest.approx((0.3125 - 0.225347, 0.3125 + 0.225347))


def test_wilson_covers() -> None:
    """Of 0/1 draws about 95 % of the intervals hold the truth, of draws in between more."""
    rng = np.random.default_rng(0)
    covered = {"bernoulli": 0, "beta": 0}
    for _ in range(2000):
        draws = {"bernoulli": rng.random(40) < 0.3, "beta": rng.beta(3.0, 7.0, 40)}
        for name, values in draws.items():
            low, high = wilson_interval(float(values.mean()), 40)
            covered[name] += low <= 0.3 <= high
    assert 0.93 < covered["bernoulli"] / 2000 < 0.98
    assert covered["beta"] == 2000


def test_bins_by_hand() -> None:
    predicted = np.array([0.0004, 0.03, 0.04, 0.03, 0.7])
    outcome = np.array([0.0, 1.0, 0.2, 0.0, 1.0])
    seen = np.array([0.0, 1.0, 0.0, 0.0, 1.0])
    lowest, middle, highest = reliability_bins(predicted, outcome, seen, np.array([0, 1, 1, 2, 3]))
    assert (lowest.transitions, lowest.episodes) == (1, 1)
    # .02 to .05: three steps of two episodes; the interval is that of two draws, not of three.
    assert (middle.transitions, middle.episodes) == (3, 2)
    assert middle.predicted == pytest.approx(0.1 / 3)
    assert middle.outcome == pytest.approx(0.4)
    assert middle.seen == pytest.approx(1 / 3)
    assert (middle.low, middle.high) == pytest.approx(wilson_interval(0.4, 2))
    assert (highest.predicted, highest.outcome) == (0.7, 1.0)


def test_a_risk_on_an_edge_belongs_to_the_bin_above() -> None:
    values = np.array([0.0, 0.001, 1.0])
    bins = reliability_bins(values, values, values, np.array([0, 0, 0]))
    assert [b.predicted for b in bins] == [0.0, 0.001, 1.0]
