"""A run says why, once, where it does what people ask about."""

from __future__ import annotations

from typing import Any

from safe_offrl.limits import Limit
from safe_offrl.record.why import EPISODES, PATIENCE, Reasons
from safe_offrl.safety.multiplier import LagrangianConfig
from safe_offrl.types import Episode

LIMIT = Limit("cost", 0.025, 1000.0)


def decision(multiplier: float = 1.0, reason: str = "", **more: Any) -> dict[str, Any]:
    accepted = not reason
    found = {"accepted": accepted, "rolled_back": False, "reason": reason or "every constraint"}
    return found | {"multiplier": multiplier, "divergence": "KL"} | more


def reasons(*, steered: bool = True) -> Reasons:
    return Reasons([(LIMIT, LagrangianConfig(aim=0.6, maximum=20.0))] if steered else [])


def test_lambda_at_zero_and_at_its_cap_is_said_once() -> None:
    run = reasons()
    assert run.take(decision(1.0)) == []
    (text,) = run.take(decision(0.0))
    assert "lambda is 0" in text
    assert "below 15" in text  # .6 of 25
    assert run.take(decision(0.0)) == []  # said already
    assert run.take(decision(0.1)) == []
    assert run.take(decision(0.0)) == []  # however often it comes back
    (text,) = run.take(decision(20.0))
    assert "cap of 20" in text
    assert run.take(decision(19.9)) == []


def test_without_the_safety_constraint_lambda_means_nothing() -> None:
    assert reasons(steered=False).take(decision(0.0)) == []


def test_ten_refusals_in_a_row_name_what_most_of_them_were_for() -> None:
    run = reasons()
    for _ in range(4):
        assert run.take(decision(reason="KL 0.09 is not below 0.05")) == []
    assert run.take(decision()) == []  # accepted: they begin anew
    for _ in range(6):
        assert run.take(decision(reason="KL tail 0.3 is not below 0.25")) == []
    for _ in range(PATIENCE - 7):
        assert run.take(decision(reason="expected cost 31 is not below 25")) == []
    (text,) = run.take(decision(reason="KL 0.06 is not below 0.05"))
    assert "the last 10 proposals were refused, 6 of them for KL tail" in text
    assert "acceptance.tail_ratio" in text
    assert run.take(decision(reason="KL 0.06 is not below 0.05")) == []
    assert run.take(decision(reason="alarm: the pretrained policy already acts")) == []


def test_each_cause_has_its_advice() -> None:
    for reason, advice in (
        ("KL nan is not below 0.05", "safety.delta"),
        ("expected cost 31 is not below 25", "lagrangian.aim"),
        ("alarm: the policy to go back to is shown to exceed the limit", "lagrangian.aim"),
    ):
        run = reasons()
        said = [line for _ in range(PATIENCE) for line in run.take(decision(reason=reason))]
        assert len(said) == 1
        assert advice in said[0]


def test_a_roll_back_ends_a_row_of_refusals() -> None:
    run = reasons()
    for _ in range(PATIENCE - 1):
        run.take(decision(reason="KL 0.09 is not below 0.05"))
    assert run.take(decision(reason="alarm: rolled back", rolled_back=True)) == []
    assert run.take(decision(reason="KL 0.09 is not below 0.05")) == []


def episode(index: int, *, guarded: int) -> Episode:
    return Episode(
        index=index,
        seed=0,
        steps=10,
        total_steps=10 * (index + 1),
        episode_return=0.0,
        cost=0.0,
        accident=False,
        accident_steps=0,
        version=0,
        phase="online",
        shield_interventions=0,
        guarded_steps=guarded,
    )


def test_a_guard_that_hands_over_in_more_than_half_of_the_episodes_is_named() -> None:
    run = reasons()
    for i in range(EPISODES):
        run.see(episode(i, guarded=3 if i < EPISODES // 2 else 0))
    assert run.take(decision()) == []  # half of them
    run.see(episode(EPISODES, guarded=0))  # pushes the oldest one out
    for i in range(2):
        run.see(episode(EPISODES + 1 + i, guarded=1))
    assert run.take(decision()) == []
    run = reasons()
    for i in range(EPISODES):
        run.see(episode(i, guarded=3 if i <= EPISODES // 2 else 0))
    (text,) = run.take(decision())
    assert f"the guard handed over in {EPISODES // 2 + 1} of the last {EPISODES} episodes" in text
    assert run.take(decision()) == []


def test_what_was_said_before_a_resume_is_not_said_again() -> None:
    played = [episode(i, guarded=1) for i in range(EPISODES)]
    decisions = [decision() | {"step": 10 * i} for i in range(1, EPISODES + 1)]
    run = reasons()
    said = []
    for one, line in zip(played, decisions, strict=True):
        run.see(one)
        said += run.take(line)
    assert len(said) == 1
    # The line fell at the decision after the eleventh episode.
    for until, repeated in ((10, 1), (11, 0)):
        resumed = reasons()
        resumed.restore(played[:until], decisions[:until])
        again = []
        for one, line in zip(played[until:], decisions[until:], strict=True):
            resumed.see(one)
            again += resumed.take(line)
        assert len(again) == repeated
