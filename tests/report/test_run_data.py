import math

import pytest

from safe_offrl.errors import RunError
from safe_offrl.record.find_run import find_runs
from safe_offrl.report.decisions import Estimated, LoggedDecision
from safe_offrl.report.run_data import evaluation_notes, method_label, read_run

CONSTRAINED = {"kl": True, "safety_constraint": True, "shield": True, "guard": True}
RLPD = {"kl": False, "safety_constraint": False, "shield": False, "guard": False}


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
    good = LoggedDecision(
        step=0,
        accepted=True,
        verdict=True,
        kl=0.02,
        delta=0.05,
        v_candidate=0.05,
        v_deployed=0.06,
        limit=0.1,
    )
    decision = good._replace(**change)
    assert (decision.violation, decision.recovering) == (violation, recovering)


@pytest.mark.parametrize(
    ("further", "violation", "recovering"),
    [
        ((20.0, 22.0), False, False),
        ((25.0, 22.0), True, False),  # strictly below the limit is needed
        ((30.0, 40.0), False, True),
        ((40.0, 30.0), True, False),
        ((math.nan, 30.0), True, False),
    ],
)
def test_every_limit_counts_in_a_violation(further, violation, recovering):
    """The first limit is kept; the second one, of 25, has (v_candidate, v_deployed)."""
    decision = LoggedDecision(
        step=0,
        accepted=True,
        verdict=not recovering,
        kl=0.02,
        delta=0.05,
        v_candidate=0.05,
        v_deployed=0.06,
        limit=0.1,
        further=(Estimated(further[0], further[1], 25.0),),
    )
    assert (decision.violation, decision.recovering) == (violation, recovering)
    assert decision.satisfied == (not violation and not recovering)
    assert decision.deployed_below == (further[1] < 25.0)


def test_further_limits_are_read(write_run):
    line = {"further": [{"v_candidate": 3.0, "v_previous": None, "limit": 25.0}]}
    (decision,) = read_run(write_run("two", [0], iterations=[line])).decisions
    ((candidate, deployed, limit),) = decision.further
    assert (candidate, limit) == (3.0, 25.0)
    assert math.isnan(deployed)


@pytest.mark.parametrize(
    ("flags", "label"),
    [
        ({"kl": False}, "no-kl"),
        ({"safety_constraint": False}, "no-safety-constraint"),
        ({"shield": False, "kl": False}, "no-kl no-shield"),
        ({"guard": False}, "no-guard"),
        (RLPD, "rlpd (all off)"),
        ({}, "constrained"),
    ],
)
def test_method_labels(flags, label):
    assert method_label({**CONSTRAINED, **flags}) == label


def test_a_run_from_before_there_was_a_guard_had_none():
    earlier = {key: value for key, value in CONSTRAINED.items() if key != "guard"}
    assert method_label(earlier) == "no-guard"
    assert method_label({**earlier, "kl": False, "safety_constraint": False, "shield": False}) == (
        "rlpd (all off)"
    )


def test_read_run(write_run):
    run = read_run(write_run("a", [0, 1], seed=3))
    assert [e.accident for e in run.episodes] == [False, True]
    assert (run.kind, run.seed, run.pretrained) == ("finetune", 3, "pi0-3")
    assert (run.env_id, run.budget, run.limit) == ("PointHazard-v0", 50_000, 0.1)


def test_errors(tmp_path, write_run):
    with pytest.raises(RunError, match="not a run folder"):
        read_run(tmp_path)
    with pytest.raises(RunError, match='no setting "nonsense"'):
        read_run(write_run("whole", [0]), "nonsense")
    unreadable = write_run("unreadable", [0])
    (unreadable / "config.yaml").write_text("a: [")
    with pytest.raises(RunError, match=r"config\.yaml"):
        read_run(unreadable)
    broken = write_run("broken", [0], evaluation={"episodes": 3})
    with pytest.raises(RunError, match="cannot be read"):
        read_run(broken)


def test_a_reference_is_a_run_or_a_folder_of_runs(tmp_path, write_group, write_run):
    write_group("ours", [[0], [1]])
    (tmp_path / "ours" / "chart.png").write_bytes(b"")
    assert [s.path.name for s in find_runs("ours", tmp_path)] == ["0", "1"]
    assert {s.group for s in find_runs(tmp_path / "ours", tmp_path / "x")} == {tmp_path / "ours"}
    (alone,) = find_runs(tmp_path / "ours" / "1", tmp_path)
    assert alone == (tmp_path / "ours" / "1", None)
    for nothing in ("x", tmp_path / "ours" / "chart.png", tmp_path / "ours" / "1" / "checkpoints"):
        with pytest.raises(RunError, match="is not a run folder, and holds none"):
            find_runs(nothing, tmp_path)


def test_a_group_names_the_method_unless_a_setting_does(write_run):
    path = write_run("7", [0], utd=4)
    run = read_run(path, group="ours")
    assert (run.method, run.name) == ("ours", "ours/7")
    assert read_run(path, "utd", "ours").method == "utd=4"


def test_an_old_evaluation_has_no_length(write_run):
    values = {"episodes": 3, "accidents": 0, "mean_return": 1.0}
    values |= {"mean_cost": 0.0, "cost_standard_error": 0.0}
    run = read_run(write_run("a", [0], evaluation=values))
    assert run.evaluation is not None
    assert math.isnan(run.evaluation.mean_length)
    assert (run.evaluation.seed, run.evaluation.mean_action) == (None, None)


PLAYED = {"episodes": 3, "accidents": 0, "mean_return": 1.0}
PLAYED |= {"mean_cost": 0.0, "cost_standard_error": 0.0}


def test_an_evaluation_without_a_complete_episode_has_no_return(write_run):
    values = PLAYED | {"mean_return": None, "return_standard_error": None}
    run = read_run(write_run("a", [0], evaluation=values))
    assert run.evaluation is not None
    assert math.isnan(run.evaluation.mean_return)
    assert math.isnan(run.evaluation.return_standard_error)
    del values["mean_return"]
    damaged = write_run("b", [0], evaluation=values)
    with pytest.raises(RunError, match="mean_return"):
        read_run(damaged)


def evaluated(write_run, *seeds, method, **changes):
    """The runs of a method, evaluated from these seeds."""
    return [
        read_run(
            write_run(
                f"{method}-{changes.get('env', '')}{i}",
                [0],
                seed=i,
                evaluation=PLAYED | {"seed": seed, "mean_action": changes.get("mean", False)},
                env=changes.get("env", "PointHazard-v0"),
            ),
            group=method,
        )
        for i, seed in enumerate(seeds)
    ]


def test_evaluations_on_the_same_episodes_are_no_independent_ones(write_run):
    methods = {
        "own": evaluated(write_run, 0, 1, 2, method="own"),
        "same": evaluated(write_run, 0, 0, 0, method="same"),
        "too": evaluated(write_run, 5, 5, 5, method="too"),
        "some": evaluated(write_run, 0, 0, 0, 3, 4, method="some"),
        "unknown": evaluated(write_run, None, None, method="unknown"),
        "elsewhere": [
            *evaluated(write_run, 0, method="elsewhere"),
            *evaluated(write_run, 0, method="elsewhere", env="HazardLine-v0"),
        ],
        "never": [read_run(write_run("never", [0]))],
    }
    assert evaluation_notes(methods) == [
        "same, too: 3 of 3 evaluations each played the same episodes as another, so their pooled "
        "interval is too narrow.",
        "some: 3 of 5 evaluations each played the same episodes as another, so their pooled "
        "interval is too narrow.",
    ]


def test_evaluations_with_mean_and_with_sampled_actions_are_told_apart(write_run):
    methods = {
        "a": evaluated(write_run, 0, 1, method="a"),
        "b": evaluated(write_run, 0, 1, method="b", mean=True),
    }
    assert evaluation_notes(methods) == [
        "The evaluations of b/b-0, b/b-1 took mean actions, the others sampled them."
    ]
    assert evaluation_notes({"b": methods["b"]}) == []
