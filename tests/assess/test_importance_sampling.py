import math

import numpy as np
import pytest
from numpy.typing import NDArray

from safe_offrl.assess.importance_sampling import (
    by_episode,
    cumulative_ratios,
    doubly_robust,
    effective_episodes,
    weighted,
)

# Two episodes: outcomes 1, 2 and 4; ratios of the steps 2, 3 and 1, so rho = (2, 6) and (1, 1).
STARTS = np.array([0, 2, 3], dtype=np.int64)
OUTCOMES = np.array([1.0, 2.0, 4.0])
LOG_RATIOS = np.log([2.0, 3.0, 1.0])
ONE = np.ones((1, 2))


def floats(*rows: list[float]) -> NDArray[np.float64]:
    return np.array(rows)


def test_tables_end_in_zeros_and_ratios_hold_their_last_value() -> None:
    np.testing.assert_array_equal(by_episode(OUTCOMES, STARTS), [[1, 2], [4, 0]])
    # Each column by its largest: (2, 1) / 2 and (6, 1) / 6.
    ratios = cumulative_ratios(LOG_RATIOS, STARTS)
    np.testing.assert_allclose(ratios, floats([1.0, 1.0], [1 / 2, 1 / 6]))


def test_ratios_of_long_episodes_do_not_overflow() -> None:
    starts = np.array([0, 1000, 2000], dtype=np.int64)
    ratios = cumulative_ratios(np.concatenate([np.full(1000, 2.0), np.full(1000, 1.0)]), starts)
    assert np.isfinite(ratios).all()
    assert effective_episodes(ratios[:, -1]) == pytest.approx(1.0)


def test_weighted_importance_sampling_by_hand() -> None:
    """Step 0: (2 * 1 + 1 * 4) / 3 = 2; step 1: (6 * 2 + 1 * 0) / 7 = 12/7."""
    found = weighted(OUTCOMES, LOG_RATIOS, np.zeros(3), np.zeros(3), STARTS, np.ones((3, 2)))
    assert found.wis == pytest.approx(2 + 12 / 7)
    assert found.doubly_robust == pytest.approx(found.wis)
    assert found.wis_error == 0.0  # every "replicate" is the log itself
    assert found.episodes == pytest.approx(49 / 37)
    assert not found.usable


def test_doubly_robust_by_hand() -> None:
    """Q = (2, 1; 3), V = (4, 3; 2).

    Corrections: step 0 (2 (1 - 2) + 1 (4 - 3)) / 3 = -1/3, step 1 (6 (2 - 1) + 1 * 0) / 7 = 6/7.
    Values: step 0 with equal weights (4 + 2) / 2 = 3, step 1 with those of step 0, 2 * 3 / 3 = 2.
    """
    q, v = np.array([2.0, 1.0, 3.0]), np.array([4.0, 3.0, 2.0])
    found = weighted(OUTCOMES, LOG_RATIOS, q, v, STARTS, np.ones((2, 2)))
    assert found.doubly_robust == pytest.approx(-1 / 3 + 6 / 7 + 3 + 2)


def test_an_exact_q_leaves_nothing_to_the_ratios() -> None:
    """Deterministic steps under the policy: V(s0) whatever the weights are."""
    q, v = floats([5.0, 3.0], [5.0, 3.0]), floats([5.0, 3.0], [5.0, 3.0])
    outcomes = floats([2.0, 3.0], [2.0, 3.0])
    for ratios in (floats([1.0, 1.0], [0.1, 0.7]), floats([0.3, 1.0], [1.0, 1e-9])):
        assert doubly_robust(outcomes, ratios, q, v, ONE)[0] == pytest.approx(5.0)


def test_bootstrap_weights_weigh_episodes() -> None:
    """Only the first, only the second episode: its own sum."""
    ratios = cumulative_ratios(LOG_RATIOS, STARTS)
    table, nothing = by_episode(OUTCOMES, STARTS), np.zeros((2, 2))
    found = doubly_robust(table, ratios, nothing, nothing, floats([1.0, 0.0], [0.0, 1.0]))
    np.testing.assert_allclose(found, [3.0, 4.0])


def test_both_are_right_where_the_ratios_are() -> None:
    """One step, two actions: the log takes them 1:3, the policy 3:1; outcomes 0 and 1."""
    rng = np.random.default_rng(0)
    second = rng.random(20_000) < 0.75
    ratios = np.where(second, math.log(0.25 / 0.75), math.log(0.75 / 0.25))
    starts = np.arange(20_001)
    wrong_q = np.full(20_000, 0.7)
    found = weighted(second.astype(float), ratios, wrong_q, wrong_q, starts, np.ones((2, 20_000)))
    assert found.wis == pytest.approx(0.25, abs=0.01)
    assert found.doubly_robust == pytest.approx(0.25, abs=0.01)
    # Kish by hand: E[rho]^2 / E[rho^2] = 1 / (9 / 4 + 1 / 12)
    assert found.episodes == pytest.approx(20_000 / (9 / 4 + 1 / 12), rel=0.03)
    assert found.usable
