import json
import math

import numpy as np
import pytest

from safe_offrl.commands.compare import compare_runs
from safe_offrl.errors import RunError
from safe_offrl.record.ledger import chain_start, read_ledger
from safe_offrl.report.comparison import compare
from safe_offrl.report.run_data import read_run
from safe_offrl.report.summaries import ALL_ENVIRONMENTS, outcome
from safe_offrl.stats.anytime import run_level_interval, run_level_upper
from tests.conftest import ledger_lines

EVALUATION = {"episodes": 500, "accidents": 10, "mean_return": 2.5, "mean_length": 50.0}
EVALUATION |= {"return_standard_error": 0.25, "mean_cost": 1.5, "cost_standard_error": 0.1}
RLPD = {"kl": False, "safety_constraint": False, "shield": False, "guard": False}


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


def test_the_final_estimate_is_of_the_policy_that_an_alarm_put_back(write_run):
    last = {"accepted": False, "rolled_back": True, "v_previous": 0.2, "v_candidate": 0.03}
    back = compare([write_run("a", [0] * 10, iterations=[{}, last])]).rows[0]
    assert back.estimate.value == 0.03
    stays = {**last, "rolled_back": False}
    assert compare([write_run("b", [0] * 10, iterations=[stays])]).rows[0].estimate.value == 0.2


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
    assert pairing.accident_ratio is not None
    assert pairing.accident_ratio.ratio == pytest.approx(safe.accidents / free.accidents)
    assert pairing.accident_ratio.low < pairing.accident_ratio.ratio < pairing.accident_ratio.high
    assert pairing.return_ratio.value == pytest.approx(
        safe.final_return.value / free.final_return.value
    )
    assert pairing.return_ratio.low < pairing.return_ratio.value < pairing.return_ratio.high
    assert pairing.return_ratio.high < 1.05
    assert result.notes == []


def test_pairing_needs_the_same_seed(write_run):
    safe = write_run("safe", [0] * 40, seed=0)
    free = write_run("free", [1] * 40, seed=1, flags=RLPD)
    result = compare([safe, free])
    assert result.pairings == []
    assert any("no run of seed: 1" in note for note in result.notes)


def test_a_run_is_paired_once_and_runs_of_one_seed_are_named(write_run):
    """Three copies of a run against one are one pair, not three times the evidence."""
    safe = [write_run(f"safe{k}", [1] * 12 + [0] * 88) for k in range(3)]
    free = write_run("free", [1] * 25 + [0] * 75, flags=RLPD)
    for order in ([*safe, free], [free, *safe]):
        result = compare(order)
        (pairing,) = result.pairings
        assert pairing.pairs == 1
        assert sorted(pairing.accidents or ()) == [12, 25]
        (note,) = result.notes
        assert note.startswith("constrained has 3 runs of seed 0 in PointHazard-v0")
    second = write_run("free2", [1] * 30 + [0] * 70, flags=RLPD)
    (pairing,) = compare([*safe, free, second]).pairings
    assert (pairing.pairs, pairing.accidents) == (2, (24, 55))


def test_a_run_in_which_no_step_was_taken_has_nothing_to_compare(tmp_path, write_run):
    """The environment failed at every reset: three episodes of 0 steps, counted as accidents."""
    nothing = write_run("nothing", [1] * 3, steps=0)
    free = write_run("free", [1] * 25 + [0] * 75, flags=RLPD)
    result = compare([nothing, free])
    assert result.pairings == []
    assert "nothing took no step online." in result.notes
    compare_runs([nothing, free], html=tmp_path / "page.html", png=tmp_path / "chart.png")
    evaluated = write_run("evaluated", [1] * 3, steps=0, evaluation=EVALUATION)
    assert outcome(read_run(evaluated)) == 2.5  # as harm() does, it speaks of the evaluation


def test_accident_ratio_is_per_step(write_run):
    safe = write_run("safe", [1] * 2 + [0] * 38, steps=50)
    free = write_run("free", [1] * 4 + [0] * 36, steps=25, flags=RLPD)
    (pairing,) = compare([safe, free]).pairings
    assert pairing.accident_ratio is not None
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


def test_a_folder_of_runs_is_a_method(tmp_path, write_group):
    write_group("ours", [[0, 1], [0, 0]])
    write_group("frozen", [[], []], kind="pretrain", evaluation=EVALUATION)
    result = compare(["ours", tmp_path / "frozen"], root=tmp_path)
    assert [(g.method, g.label, g.accidents) for g in result.groups] == [
        ("ours", "ALL 2 runs", 1),
        ("frozen", "ALL 2 runs", 0),
    ]
    assert [row.label for row in result.rows] == ["ours/0", "ours/1", "frozen/0", "frozen/1"]
    assert result.groups[1].evaluated_return_iqm == (2.5, 2.5, 2.5)
    assert result.notes == []


def test_runs_of_a_folder_come_in_the_order_of_their_numbers(tmp_path, write_group):
    write_group("ours", [[0]] * 11)
    assert compare(["ours"], root=tmp_path).groups[0].seeds == list(range(11))


def test_folders_of_one_name_are_told_apart_in_one_environment_only(tmp_path, write_group):
    write_group("a/ours", [[0]])
    write_group("b/ours", [[1]])
    write_group("c/ours", [[1]], env="HazardLine-v0")
    same = compare([tmp_path / "a" / "ours", tmp_path / "b" / "ours"])
    assert [row.method for row in same.rows] == ["a/ours", "b/ours"]
    across = compare([tmp_path / "a" / "ours", tmp_path / "c" / "ours"])
    assert [row.method for row in across.rows] == ["ours", "ours"]


def test_of_many_methods_the_first_is_compared_with_each(tmp_path, write_group):
    names = ["frozen", "ours", "b", "c", "d"]
    write_group("frozen", [[]], kind="pretrain", evaluation=EVALUATION)
    for name in names[1:]:
        write_group(name, [[0, 1]], evaluation=EVALUATION)
    result = compare([*names], root=tmp_path)
    pairs = [(p.first, p.second) for p in result.pairings]
    assert pairs == [("ours", "b"), ("ours", "c"), ("ours", "d"), ("ours", "frozen")]
    assert result.pairings[-1].accidents is None  # it never learned
    assert result.pairings[-1].evaluated_accidents == (10, 10)
    few = compare(names[1:4], root=tmp_path)
    assert len(few.pairings) == 3


def test_iqm_over_seeds_by_hand(write_group):
    # Five seeds: floor(5 / 4) = 1 is dropped at each end, (2 + 3 + 4) / 3 = 3 stays.
    path = write_group("ours", [[1] * k + [0] * (9 - k) for k in (9, 2, 3, 4, 1)])
    (group,) = compare([path]).groups
    assert group.accidents_iqm.value == 3.0
    assert 1.0 <= group.accidents_iqm.low < 3.0 < group.accidents_iqm.high <= 9.0
    assert group.most_accidents == 9
    assert group.final_return_iqm == (1.0, 1.0, 1.0)  # every run the same


def test_an_iqm_of_one_run_has_no_bounds(write_group):
    path = write_group("ours", [[1]])
    (row,) = compare([path]).rows
    assert row.accidents_iqm.value == 1.0
    assert math.isnan(row.accidents_iqm.low)


def test_constraints_held_by_hand(write_run):
    iterations = [
        {},  # held
        {"accepted": False, "v_candidate": 0.5},  # refused, and what acts is below the limit: held
        {"accepted": False, "constraints_satisfied": False},  # what acts is not
        {"kl_reverse_mean": 0.06},  # the verdict is not borne out
        {"v_previous": 0.2, "v_candidate": 0.15, "constraints_satisfied": False},  # recovering
        {"accepted": False, "rolled_back": True, "kl_reverse_mean": 0.06},
        {"accepted": False, "rolled_back": True},  # to a policy that was measured: held
        {"v_candidate": math.nan},
    ]
    row = compare([write_run("a", [0], iterations=iterations)]).rows[0]
    assert (row.satisfied, row.iterations, row.satisfied_share) == (3, 8, 3 / 8)
    nothing = {"v_previous": math.nan, "v_candidate": math.nan, "kl_reverse_mean": math.nan}
    free = compare([write_run("b", [0], flags=RLPD, iterations=[nothing])])
    assert free.rows[0].satisfied is None
    assert free.as_dict()["runs"][0]["satisfied_share"] is None


def test_other_policies_are_paired_by_seed_alone_and_the_notes_say_so(write_group):
    ours = write_group("ours", [[0, 0], [0, 1]])
    other = write_group("other", [[1, 1], [1, 1]], origin="bc")
    result = compare([ours, other])
    (pairing,) = result.pairings
    assert (pairing.pairs, pairing.same_policy, pairing.accidents) == (2, False, (1, 4))
    assert any("paired by seed alone" in note for note in result.notes)


def test_the_return_is_of_episodes_that_were_seen_to_their_end(write_run):
    path = write_run("cut", [0] * 19 + [1], returns=[0.0] * 16 + [3.0, 4.0, 5.0, 9.0])
    start = chain_start((path / "config.yaml").read_bytes())
    *whole, last = read_ledger(path / "ledger.jsonl", start).episodes
    lines = ledger_lines([*whole, last._replace(outcome="lost")], start)
    (path / "ledger.jsonl").write_bytes(b"".join(lines))
    (row,) = compare([path]).rows
    assert (row.accidents, row.final_return.value) == (1, 4.0)  # of three in the last fifth


def test_pairs_over_seeds_by_hand(write_group):
    """Per step 1 : 4 in every pair: the ratio is 1/4 however the pairs are drawn."""
    ours = write_group("ours", [[1] * k + [0] * (40 - k) for k in (1, 2, 3)])
    other = write_group("other", [[1] * 4 * k + [0] * (40 - 4 * k) for k in (1, 2, 3)])
    (pairing,) = compare([ours, other]).pairings
    assert pairing.accidents == (6, 24)
    assert pairing.accident_ratio_over_seeds == pytest.approx((0.25, 0.25, 0.25))
    assert pairing.p_value_over_seeds == 2 / 2**3
    assert pairing.accident_ratio is not None
    assert pairing.accident_ratio.low < 0.25 < pairing.accident_ratio.high


def test_differences_that_cancel_over_seeds_are_no_difference(write_group):
    ours = write_group("ours", [[1] * k + [0] * (9 - k) for k in (3, 1, 2)])
    other = write_group("other", [[1] * k + [0] * (9 - k) for k in (1, 3, 2)])
    assert compare([ours, other]).pairings[0].p_value_over_seeds == 1.0


def test_a_frozen_policy_is_paired_with_what_started_from_it(tmp_path, write_group):
    write_group("ours", [[0], [0]], evaluation=EVALUATION | {"accidents": 5})
    # The name of its policy is the hash of the checkpoint that was evaluated.
    for seed in (0, 1):
        evaluation = EVALUATION | {"checkpoint_sha256": f"pi0-{seed}"}
        write_group("frozen", [[]], kind="pretrain", first=seed, evaluation=evaluation)
    (pairing,) = compare(["ours", "frozen"], root=tmp_path).pairings
    assert (pairing.pairs, pairing.same_policy) == (2, True)
    assert pairing.evaluated_accidents == (10, 20)
    assert pairing.evaluated_ratio is not None
    assert pairing.evaluated_ratio.ratio == pytest.approx(0.5)


def test_several_environments_are_pooled_as_scores(write_group):
    """In Line returns are a hundred times as large; in both the second method gets half."""
    a = write_group("x/ours", [[0], [0]], returns=[2.0])
    b = write_group("y/ours", [[0], [1]], returns=[200.0], env="HazardLine-v0")
    c = write_group("x/half", [[1], [1]], returns=[1.0])
    d = write_group("y/half", [[1], [1]], returns=[100.0], env="HazardLine-v0")
    result = compare([a, b, c, d])
    found = {(g.method, g.environment): g for g in result.groups}
    assert len(found) == 6
    assert found["half", "HazardLine-v0"].final_return_iqm.value == 100.0
    assert found["half", ALL_ENVIRONMENTS].final_return_iqm == (0.5, 0.5, 0.5)
    assert found["ours", ALL_ENVIRONMENTS].final_return_iqm.value == 1.0
    assert found["half", ALL_ENVIRONMENTS].accidents == 4
    (pairing,) = result.pairings
    assert (pairing.pairs, pairing.accidents) == (4, (1, 4))
    assert pairing.return_ratio == pytest.approx((2.0, 2.0, 2.0))
    assert pairing.return_difference == pytest.approx((0.5, 0.5, 0.5))
    assert any("divided by the mean of ours" in note for note in result.notes)


def test_seeds_are_drawn_within_environments(write_group):
    """Half and one and a half times the first method: 1 on average, whichever seeds are drawn."""
    paths = []
    for env, ours, other in (("PointHazard-v0", 2.0, 1.0), ("HazardLine-v0", 2.0, 3.0)):
        paths.append(write_group(f"{env}/ours", [[0], [0]], returns=[ours], env=env))
        paths.append(write_group(f"{env}/other", [[0], [0]], returns=[other], env=env))
    overall = compare(paths).groups[-1]
    assert (overall.method, overall.environment) == ("other", ALL_ENVIRONMENTS)
    assert overall.final_return_iqm == (1.0, 1.0, 1.0)


def test_a_mean_that_is_not_positive_is_no_unit(write_group):
    a = write_group("x/ours", [[0]], returns=[-2.0])
    b = write_group("y/ours", [[0]], returns=[2.0], env="HazardLine-v0")
    overall = compare([a, b]).groups[-1]
    assert overall.environment == ALL_ENVIRONMENTS
    assert math.isnan(overall.final_return_iqm.value)
