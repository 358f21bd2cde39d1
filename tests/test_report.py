import json
import math

import numpy as np
import pytest

from safe_offrl.errors import RunError
from safe_offrl.report import compare
from safe_offrl.statistics import run_level_interval, run_level_upper

RLPD = {"kl": False, "safety_constraint": False, "shield": False}


def test_a_row_by_hand(write_run):
    # 200 episodes of 50 steps; accidents in episodes 0, 99, 100, 150. Episode 99 ends at step 5000.
    accidents = np.zeros(200, bool)
    accidents[[0, 99, 100, 150]] = True
    returns = np.r_[np.full(100, -7.0), np.tile([1.0, 3.0], 50)]
    evaluation = {"episodes": 500, "accidents": 10, "mean_return": 2.5}
    evaluation |= {"return_standard_error": 0.25, "mean_cost": 1.5, "cost_standard_error": 0.1}
    path = write_run("a", accidents, returns=returns, evaluation=evaluation)
    row = compare([path]).rows[0]
    assert (row.episodes, row.steps, row.accidents, row.early_accidents) == (200, 10_000, 4, 2)
    low, high = run_level_interval(4, 0.95)
    assert row.rate == pytest.approx((0.02, low / 200, high / 200))
    assert row.per_1000_steps == pytest.approx((0.4, low / 10, high / 10))
    assert row.certified_rate == pytest.approx(run_level_upper(4, 0.95) / 200)
    # Last fifth of the steps, 40 episodes, half 1, half 3: deviation sqrt(40 / 39), over sqrt 40.
    assert row.final_return == pytest.approx((2.0, math.sqrt(1 / 39)))
    assert row.cost == pytest.approx((0.02, math.sqrt(0.02 * 0.98 / 199)))
    assert row.final_cost == (0.0, 0.0)
    assert row.evaluated_cost == (1.5, 0.1)
    assert row.evaluated_return == (2.5, 0.25)
    assert row.evaluated_rate == pytest.approx((0.02, 0.0096, 0.0365), abs=1e-4)
    assert math.isnan(row.accepted_share)


def test_decisions_are_counted(write_run):
    iterations = [
        {},
        {"accepted": False, "constraints_satisfied": False},
        {"v_previous": 0.2, "v_candidate": 0.15, "constraints_satisfied": False},  # recovering
        {"v_previous": 0.2, "v_candidate": 0.25, "constraints_satisfied": False},  # worse
        {"v_previous": 0.2, "v_candidate": 0.15, "kl_reverse_mean": 0.06},  # KL too large
        {"constraints_satisfied": False},  # say, a quantile of the KL
        {"v_previous": math.nan},
    ]
    row = compare([write_run("a", [0] * 10, iterations=iterations)]).rows[0]
    assert (row.iterations, row.accepted) == (7, 6)
    assert row.accepted_share == pytest.approx(6 / 7)
    assert row.recovering == 1
    assert row.violations == 3  # numbers 3, 4 and 5
    assert row.above_limit == 4  # three at .2, and the one that is not a number


def test_estimates_never_measured_are_not_called_above_limit(write_run):
    unmeasured = [{"v_previous": math.nan, "v_candidate": math.nan} for _ in range(3)]
    result = compare([write_run("a", [0] * 10, flags=RLPD, iterations=unmeasured)])
    assert result.rows[0].above_limit is None
    assert result.rows[0].violations is None
    unmeasured_but_constrained = write_run("b", [0] * 10, iterations=unmeasured)
    assert compare([unmeasured_but_constrained]).rows[0].violations == 3


def test_groups_and_pairs(paired_runs):
    result = compare(paired_runs())
    assert [g.method for g in result.groups] == ["constrained", "rlpd (all off)"]
    safe, free = result.groups
    mine = [r for r in result.rows if r.method == "constrained"]
    assert safe.seeds == [0, 1, 2, 3, 4]
    assert safe.accidents == sum(r.accidents for r in mine)
    assert safe.early_accidents == sum(r.early_accidents for r in mine)
    assert safe.rate.value == pytest.approx(safe.accidents / 2000)
    means = [r.final_return.value for r in mine]
    assert safe.final_return == pytest.approx((np.mean(means), np.std(means, ddof=1) / 5**0.5))
    (pairing,) = result.pairings
    assert (pairing.first, pairing.second, pairing.pairs) == ("constrained", "rlpd (all off)", 5)
    assert pairing.accidents == (safe.accidents, free.accidents)
    assert pairing.accident_ratio.ratio == pytest.approx(safe.accidents / free.accidents)
    assert pairing.accident_ratio.low < pairing.accident_ratio.ratio < pairing.accident_ratio.high
    assert pairing.return_ratio.value == pytest.approx(
        safe.final_return.value / free.final_return.value
    )
    assert pairing.return_ratio.low < pairing.return_ratio.value < pairing.return_ratio.high
    assert pairing.return_ratio.high < 1.05
    assert result.notes == []


def test_pairing_needs_the_same_policy_and_seed(write_run):
    safe = write_run("safe", [0] * 40, seed=0)
    free = write_run("free", [1] * 40, seed=1, flags=RLPD)
    result = compare([safe, free])
    assert result.pairings == []
    assert any("no run for the pretrained policy and seed of: 1" in note for note in result.notes)


def test_accident_ratio_is_per_step(write_run):
    safe = write_run("safe", [1] * 2 + [0] * 38, steps=50)
    free = write_run("free", [1] * 4 + [0] * 36, steps=25, flags=RLPD)
    (pairing,) = compare([safe, free]).pairings
    assert pairing.accident_ratio.ratio == pytest.approx((2 / 2000) / (4 / 1000))


def test_one_pair_and_negative_returns_have_no_ratio_interval(write_run):
    safe = write_run("safe", [0] * 40, returns=np.full(40, -1.0))
    free = write_run("free", [1] * 40, flags=RLPD, returns=np.full(40, -3.0))
    (pairing,) = compare([safe, free]).pairings
    assert math.isnan(pairing.return_ratio.value)
    assert pairing.return_difference.value == 2.0
    assert math.isnan(pairing.return_difference.low)


def test_group_by_a_setting(write_run):
    paths = [write_run(f"u{u}", [0] * 5, utd=u) for u in (1, 4)]
    assert [r.method for r in compare(paths, group_by="utd").rows] == ["utd=1", "utd=4"]
    nested = compare(paths, group_by="safety.epsilon")
    assert [g.method for g in nested.groups] == ["safety.epsilon=0.1"]


def test_as_dict_is_strict_json(write_run):
    result = compare([write_run("a", []), write_run("b", [0] * 3)])
    values = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert values["runs"][0]["rate"]["value"] is None
    assert values["runs"][1]["rate"]["value"] == 0.0
    assert values["groups"][0]["accidents"] == 0


def test_notes_warn_of_unequal_runs(write_run):
    a = write_run("a", [0] * 5, status="interrupted")
    b = write_run("b", [0] * 5, budget=10_000)
    notes = " ".join(compare([a, b, b]).notes)
    assert "a is interrupted." in notes
    assert "budgets: 10,000, 50,000" in notes
    assert "b is named twice." in notes


def test_no_run_is_an_error():
    with pytest.raises(RunError, match="no run to compare"):
        compare([])
