import json
import math

import numpy as np
import pytest
import yaml

from safe_offrl.errors import UserError
from safe_offrl.report import (
    Decision,
    compare,
    format_table,
    method_label,
    read_run,
    write_png,
)
from safe_offrl.run import RunDir, ledger_line
from safe_offrl.statistics import run_level_interval, run_level_upper
from safe_offrl.types import Episode

CONSTRAINED = {"kl": True, "accident_constraint": True, "shield": True}
RLPD = {"kl": False, "accident_constraint": False, "shield": False}


def _write_run(
    root,
    name,
    accidents,
    *,
    returns=None,
    flags=CONSTRAINED,
    seed=0,
    steps=50,
    iterations=(),
    evaluation=None,
    kind="finetune",
    status="finished",
    **settings,
):
    """A run folder with given accidents [episodes]; ``steps`` each."""
    settings = {
        "seed": seed,
        "budget": 50_000,
        "safety": {"epsilon": 0.1, "confidence": 0.95},
        **flags,
        **settings,
    }
    inputs = {"env_id": "PointHazard-v0", "pretrained_sha256": f"pi0-{seed}"}
    text = yaml.safe_dump({"inputs": inputs, kind: settings})
    with RunDir.create(root, kind=kind, config_text=text, name=name) as run:
        run.set_status(status)
        returns = np.ones(len(accidents)) if returns is None else returns
        lines = [
            Episode(
                index=i,
                seed=i,
                steps=steps,
                total_steps=(i + 1) * steps,
                episode_return=float(returns[i]),
                cost=float(accident),
                accident=bool(accident),
                accident_steps=int(accident),
                version=0,
                phase="online",
                shield_interventions=0,
            )
            for i, accident in enumerate(accidents)
        ]
        (run.path / "ledger.jsonl").write_bytes(b"".join(map(ledger_line, lines)))
        for decision in iterations:
            run.log_iteration(decision)
        if evaluation is not None:
            run.write_json("evaluation.json", evaluation)
    return root / name


def _iteration(index, **values):
    return {
        "index": index,
        "step": 1000 * (index + 1),
        "accepted": True,
        "constraints_satisfied": True,
        "kl_forward_mean": 0.01,
        "kl_reverse_mean": 0.02,
        "delta": 0.05,
        "v_candidate": 0.05,
        "v_previous": 0.06,
        "epsilon": 0.1,
        "reason": "both constraints hold",
        **values,
    }


def test_a_row_by_hand(tmp_path):
    # 200 episodes of 50 steps; accidents in episodes 0, 99, 100, 150. Episode 99 ends at step 5000.
    accidents = np.zeros(200, bool)
    accidents[[0, 99, 100, 150]] = True
    returns = np.r_[np.full(100, -7.0), np.tile([1.0, 3.0], 50)]
    evaluation = {"episodes": 500, "accidents": 10, "mean_return": 2.5}
    evaluation["return_standard_error"] = 0.25
    path = _write_run(tmp_path, "a", accidents, returns=returns, evaluation=evaluation)
    row = compare([path]).rows[0]
    assert (row.episodes, row.steps, row.accidents, row.early_accidents) == (200, 10_000, 4, 2)
    low, high = run_level_interval(4, 0.95)
    assert row.rate == pytest.approx((0.02, low / 200, high / 200))
    assert row.per_1000_steps == pytest.approx((0.4, low / 10, high / 10))
    assert row.certified_rate == pytest.approx(run_level_upper(4, 0.95) / 200)
    # Last 100: half 1, half 3: mean 2, sample standard deviation sqrt(100 / 99), over 10.
    assert row.final_return == pytest.approx((2.0, math.sqrt(100 / 99) / 10))
    assert row.evaluated_return == (2.5, 0.25)
    assert row.evaluated_rate == pytest.approx((0.02, 0.0096, 0.0365), abs=1e-4)
    assert math.isnan(row.accepted_share)


def test_decisions_are_counted(tmp_path):
    iterations = [
        _iteration(0),
        _iteration(1, accepted=False, constraints_satisfied=False),
        _iteration(2, v_previous=0.2, v_candidate=0.15, constraints_satisfied=False),  # recovering
        _iteration(3, v_previous=0.2, v_candidate=0.25, constraints_satisfied=False),  # worse
        _iteration(4, v_previous=0.2, v_candidate=0.15, kl_reverse_mean=0.06),  # KL too large
        _iteration(5, constraints_satisfied=False),  # say, a quantile of the KL
        _iteration(6, v_previous=math.nan),
    ]
    row = compare([_write_run(tmp_path, "a", [0] * 10, iterations=iterations)]).rows[0]
    assert (row.iterations, row.accepted) == (7, 6)
    assert row.accepted_share == pytest.approx(6 / 7)
    assert row.recovering == 1
    assert row.violations == 3  # numbers 3, 4 and 5
    assert row.above_epsilon == 4  # three at .2, and the one that is not a number


@pytest.mark.parametrize(
    ("change", "violation", "recovering"),
    [
        ({}, False, False),
        ({"verdict": False}, True, False),
        ({"kl": math.nan}, True, False),
        ({"v_candidate": 0.1}, True, False),  # strictly below epsilon is needed
        ({"v_candidate": math.nan}, True, False),
        ({"v_candidate": 0.15, "v_deployed": 0.2}, False, True),
        ({"v_candidate": 0.15, "v_deployed": 0.2, "kl": 0.05}, True, False),
        ({"v_candidate": 0.2, "v_deployed": 0.2}, True, False),
        ({"v_candidate": 0.05, "v_deployed": 0.2, "verdict": False}, True, False),
        ({"v_candidate": 0.5, "accepted": False}, False, False),
    ],
)
def test_verdict_and_numbers_must_agree(change, violation, recovering):
    good = Decision(
        step=0,
        accepted=True,
        verdict=True,
        kl=0.02,
        delta=0.05,
        v_candidate=0.05,
        v_deployed=0.06,
        epsilon=0.1,
    )
    decision = good._replace(**change)
    assert (decision.violation, decision.recovering) == (violation, recovering)


def test_estimates_never_measured_are_not_called_above_epsilon(tmp_path):
    unmeasured = [_iteration(i, v_previous=math.nan, v_candidate=math.nan) for i in range(3)]
    result = compare([_write_run(tmp_path, "a", [0] * 10, flags=RLPD, iterations=unmeasured)])
    assert result.rows[0].above_epsilon is None
    assert result.rows[0].violations is None
    unmeasured_but_constrained = _write_run(tmp_path, "b", [0] * 10, iterations=unmeasured)
    assert compare([unmeasured_but_constrained]).rows[0].violations == 3


@pytest.mark.parametrize(
    ("flags", "label"),
    [
        ({"kl": False}, "no-kl"),
        ({"accident_constraint": False}, "no-accident-constraint"),
        ({"shield": False, "kl": False}, "no-kl no-shield"),
        (RLPD, "rlpd (all off)"),
        ({}, "constrained"),
    ],
)
def test_method_labels(flags, label):
    assert method_label({**CONSTRAINED, **flags}) == label


def _paired_runs(tmp_path, seeds=5, episodes=400):
    rng = np.random.default_rng(0)
    paths = []
    for seed in range(seeds):
        for flags, name, p, level in (
            (CONSTRAINED, "safe", 0.03, 9.5),
            (RLPD, "free", 0.15, 10.0),
        ):
            progress = 1 - np.exp(-np.arange(episodes) / 120)
            estimate = [
                _iteration(
                    i,
                    v_previous=p * (1 + 0.5 * math.exp(-i / 4)) + 0.01,
                )
                for i in range(int(episodes * 50 / 1000))
            ]
            paths.append(
                _write_run(
                    tmp_path,
                    f"{name}-{seed}",
                    rng.random(episodes) < p * (1.5 - 0.5 * progress),
                    returns=level * progress + rng.normal(0, 1.5, episodes) + 0.2 * seed,
                    flags=flags,
                    seed=seed,
                    iterations=estimate,
                )
            )
    return paths


def test_groups_and_pairs(tmp_path):
    result = compare(_paired_runs(tmp_path))
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


def test_pairing_needs_the_same_policy_and_seed(tmp_path):
    safe = _write_run(tmp_path, "safe", [0] * 40, seed=0)
    free = _write_run(tmp_path, "free", [1] * 40, seed=1, flags=RLPD)
    result = compare([safe, free])
    assert result.pairings == []
    assert any("no run for the pretrained policy and seed of: 1" in note for note in result.notes)


def test_accident_ratio_is_per_step(tmp_path):
    safe = _write_run(tmp_path, "safe", [1] * 2 + [0] * 38, steps=50)
    free = _write_run(tmp_path, "free", [1] * 4 + [0] * 36, steps=25, flags=RLPD)
    (pairing,) = compare([safe, free]).pairings
    assert pairing.accident_ratio.ratio == pytest.approx((2 / 2000) / (4 / 1000))


def test_one_pair_and_negative_returns_have_no_ratio_interval(tmp_path):
    safe = _write_run(tmp_path, "safe", [0] * 40, returns=np.full(40, -1.0))
    free = _write_run(tmp_path, "free", [1] * 40, flags=RLPD, returns=np.full(40, -3.0))
    (pairing,) = compare([safe, free]).pairings
    assert math.isnan(pairing.return_ratio.value)
    assert pairing.return_difference.value == 2.0
    assert "+2.000 (one pair, no interval)" in format_table(compare([safe, free]))


def test_group_by_a_setting(tmp_path):
    paths = [_write_run(tmp_path, f"u{u}", [0] * 5, utd=u) for u in (1, 4)]
    assert [r.method for r in compare(paths, group_by="utd").rows] == ["utd=1", "utd=4"]
    nested = compare(paths, group_by="safety.epsilon")
    assert [g.method for g in nested.groups] == ["safety.epsilon=0.1"]
    with pytest.raises(UserError, match='no setting "nonsense"'):
        compare(paths, group_by="nonsense")


def test_table_holds_the_figures(tmp_path):
    accidents = np.zeros(200, bool)
    accidents[[0, 99, 100, 150]] = True
    text = format_table(compare([_write_run(tmp_path, "a", accidents, iterations=[_iteration(0)])]))
    row = next(line for line in text.splitlines() if line.startswith("a ") and "10,000" in line)
    assert row.split()[:8] == ["a", "constrained,", "seed", "0", "200", "10,000", "4", "2"]
    assert "2.0% [" in row
    assert "0.40 [" in row
    assert "1/1 (100%)" in text
    assert max(map(len, text.splitlines())) <= 130


def test_table_of_groups_and_the_frozen_policy(tmp_path):
    frozen = _write_run(
        tmp_path,
        "pi0",
        [],
        kind="pretrain",
        evaluation={"episodes": 500, "accidents": 40, "mean_return": 5.0},
    )
    text = format_table(compare([frozen, *_paired_runs(tmp_path, seeds=2, episodes=150)]))
    assert "pretrained (frozen), seed 0" in text
    assert "8.0% [" in text
    assert text.count("ALL 2 runs") == 4
    assert "constrained vs rlpd (all off), 2 pairs:" in text


def test_as_dict_is_strict_json(tmp_path):
    result = compare([_write_run(tmp_path, "a", []), _write_run(tmp_path, "b", [0] * 3)])
    values = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert values["runs"][0]["rate"]["value"] is None
    assert values["runs"][1]["rate"]["value"] == 0.0
    assert values["groups"][0]["accidents"] == 0


def test_notes_warn_of_unequal_runs(tmp_path):
    a = _write_run(tmp_path, "a", [0] * 5, status="interrupted")
    b = _write_run(tmp_path, "b", [0] * 5, budget=10_000)
    notes = " ".join(compare([a, b, b]).notes)
    assert "a is interrupted." in notes
    assert "budgets: 10,000, 50,000" in notes
    assert "b is named twice." in notes


def test_png_is_written(tmp_path):
    target = tmp_path / "compare.png"
    write_png(compare(_paired_runs(tmp_path, seeds=2, episodes=120)), target)
    assert target.read_bytes().startswith(b"\x89PNG")
    assert target.stat().st_size > 20_000


def test_png_of_one_short_run(tmp_path):
    target = tmp_path / "compare.png"
    write_png(compare([_write_run(tmp_path, "a", [1, 0, 0])]), target)
    assert target.stat().st_size > 10_000


def test_errors(tmp_path):
    with pytest.raises(UserError, match="no run to compare"):
        compare([])
    with pytest.raises(UserError, match="not a run folder"):
        compare([tmp_path])
    empty = _write_run(tmp_path, "empty", [])
    with pytest.raises(UserError, match="online episode"):
        write_png(compare([empty]), tmp_path / "x.png")
    (empty / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        compare([empty])
    broken = _write_run(tmp_path, "broken", [0], evaluation={"episodes": 3})
    with pytest.raises(UserError, match="cannot be read"):
        compare([broken])


def test_read_run(tmp_path):
    run = read_run(_write_run(tmp_path, "a", [0, 1], seed=3))
    assert [e.accident for e in run.episodes] == [False, True]
    assert (run.kind, run.seed, run.pretrained) == ("finetune", 3, "pi0-3")
    assert (run.env_id, run.budget, run.epsilon) == ("PointHazard-v0", 50_000, 0.1)
