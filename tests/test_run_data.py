import math

import pytest

from safe_offrl.errors import RunError
from safe_offrl.run_data import Decision, method_label, read_run

CONSTRAINED = {"kl": True, "safety_constraint": True, "shield": True}
RLPD = {"kl": False, "safety_constraint": False, "shield": False}


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
        limit=0.1,
    )
    decision = good._replace(**change)
    assert (decision.violation, decision.recovering) == (violation, recovering)


@pytest.mark.parametrize(
    ("flags", "label"),
    [
        ({"kl": False}, "no-kl"),
        ({"safety_constraint": False}, "no-safety-constraint"),
        ({"shield": False, "kl": False}, "no-kl no-shield"),
        (RLPD, "rlpd (all off)"),
        ({}, "constrained"),
    ],
)
def test_method_labels(flags, label):
    assert method_label({**CONSTRAINED, **flags}) == label


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
