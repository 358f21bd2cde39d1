"""The fallback in a log of which the answer is known: going right pays and costs, left does not."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from safe_offrl.agents.aversion import Aversion
from safe_offrl.agents.extraction import Extraction, ExtractionConfig
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.data.dataset import Dataset
from safe_offrl.errors import ConfigError
from safe_offrl.policies.acting import NumpyActor
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks
from safe_offrl.safety.calibration import NO_FALLBACK
from safe_offrl.safety.critic import SafetyCriticConfig
from safe_offrl.safety.guard import Guard
from safe_offrl.spec import SafetySpec
from safe_offrl.train.fallback import Fallback
from safe_offrl.train.pretrain import Pretraining
from safe_offrl.train.pretrain_config import FallbackConfig, PretrainConfig
from safe_offrl.types import Batch, Layout

HORIZON = 20
STEPS = 300
DISCOUNT = 0.8  # of the fallback's cost critic
COST_STEPS = 5
ACCIDENTS = 0.7  # probability of one in a step to the right
STATES = (-1.0, 0.0, 1.0)


def log(*, episodes: int = 100, discrete: bool = False, rewards: float = 1.0) -> Dataset:
    """Half of the episodes go left and half go right, by about .6, whatever they see.

    A step to the right costs 1, and is an accident more often than not; the reward is the action.
    """
    rng = np.random.default_rng(0)
    n = episodes * HORIZON
    side = np.repeat(np.where(np.arange(episodes) % 2, 1.0, -1.0), HORIZON)
    taken = np.clip(0.6 * side + 0.2 * rng.standard_normal(n), -1.0, 1.0)
    right = taken > 0.0
    seen = torch.from_numpy(rng.standard_normal((n, 1), dtype=np.float32))
    accidents = right & (rng.random(n) < ACCIDENTS)
    actions = np.stack([~right, right], axis=1) if discrete else taken[:, None]
    left = 1.0 - np.arange(HORIZON) / HORIZON
    batch = Batch(
        observations=seen,
        actions=torch.tensor(actions, dtype=torch.float32),
        rewards=torch.tensor(rewards * taken, dtype=torch.float32),
        accidents=torch.tensor(accidents, dtype=torch.float32),
        costs=torch.tensor(right, dtype=torch.float32),
        next_observations=seen.roll(-1, 0),
        terminated=torch.zeros(n),
        time_to_go=torch.tensor(np.tile(left, episodes), dtype=torch.float32),
        return_to_go=torch.zeros(n),
    )
    layout = Layout(1, 2 if discrete else 1)
    return Dataset(
        layout.pack(batch),
        layout,
        np.arange(episodes + 1) * HORIZON,
        np.arange(n) % HORIZON == HORIZON - 1,
        HORIZON,
        "left and right",
        {"action_count": 2} if discrete else {},
    )


def config_of(constraint: str = "cost", steps: int = STEPS, **settings: Any) -> PretrainConfig:
    spec = SafetySpec(constraint=constraint, cost_limit=5.0, epsilon=0.3, horizon=HORIZON)
    critic = SafetyCriticConfig(
        members=3,
        reference=1,
        hidden=(16,),
        learning_rate=3e-3,
        tau=0.05,
        cost_discount=0.5,
        cost_steps=COST_STEPS,
    )
    defaults: dict[str, Any] = {
        "steps": steps,
        "alignment_steps": 0,
        "batch_size": 64,
        "held_out": 0.3,
        "networks": NetworkConfig((16,), (16,), 2),
        "critic": critic,
        "safety": spec,
        "extraction": ExtractionConfig(learning_rate=3e-3),
        "fallback": FallbackConfig(cost_discount=DISCOUNT),
    }
    return PretrainConfig(**(defaults | settings))


@functools.cache
def pretrained(constraint: str, actions: str) -> Pretraining:
    loop = Pretraining(config_of(constraint), log(discrete=actions == "discrete"))
    list(loop.run())
    return loop


def fallback_of(loop: Pretraining) -> Fallback:
    assert loop._fallback is not None
    return loop._fallback


def to_the_right(actor: Actor) -> list[float]:
    """Where it goes, on average or with its most probable action, in each of the STATES."""
    found = [NumpyActor(actor).mean_action(np.array([x], np.float32)) for x in STATES]
    return [float(action[-1]) for action in found]


def risk_of(fallback: Fallback, action: tuple[float, ...]) -> Tensor:
    """What its critic says of an action halfway through, in each of the STATES."""
    critic = fallback.constraints[0].critic
    seen = torch.tensor(STATES).unsqueeze(1)
    actions = torch.tensor([action]).expand(len(STATES), -1)
    with torch.no_grad():
        return critic.plain_risk(seen, torch.full((len(STATES),), 0.5), actions)


CONSTRAINTS = pytest.mark.parametrize("constraint", ["cost", "accident"])


# --- what it learns ---


@CONSTRAINTS
def test_it_goes_where_nothing_happens_although_the_other_way_pays(constraint: str) -> None:
    loop = pretrained(constraint, "box")
    careful = to_the_right(fallback_of(loop).actor)
    assert max(careful) < -0.4
    assert min(to_the_right(loop.networks.actor)) > max(careful) + 0.3  # drawn to what pays


@CONSTRAINTS
def test_discrete_actions_too(constraint: str) -> None:
    assert to_the_right(fallback_of(pretrained(constraint, "discrete")).actor) == [0.0] * 3


@pytest.mark.parametrize("actions", ["box", "discrete"])
@pytest.mark.parametrize(
    ("constraint", "ahead"), [("cost", 1.0 - DISCOUNT**COST_STEPS), ("accident", ACCIDENTS)]
)
def test_its_critic_knows_what_each_way_leads_to(
    constraint: str, ahead: float, actions: str
) -> None:
    """To the right are five costs in a row, as logged, or the accident of this step.

    From there on its own policy acts, which goes left.
    """
    fallback = fallback_of(pretrained(constraint, actions))
    left, right = ((-0.6,), (0.6,)) if actions == "box" else ((1.0, 0.0), (0.0, 1.0))
    assert risk_of(fallback, right).tolist() == pytest.approx([ahead] * 3, abs=0.12)
    assert risk_of(fallback, left).tolist() == pytest.approx([0.0] * 3, abs=0.12)


def test_reward_has_no_part_in_it() -> None:
    one, other = (
        Pretraining(config_of(steps=20), log(episodes=20, rewards=sign)) for sign in (1.0, -1.0)
    )
    for loop in (one, other):
        list(loop.run())
    tensors, others = one.state_dict(), other.state_dict()
    own = {name for name in tensors if name.startswith("fallback.")}
    assert own
    assert [name for name in own if not torch.equal(tensors[name], others[name])] == []
    actor = {name for name in tensors if name.startswith("deployed/")}
    assert any(not torch.equal(tensors[name], others[name]) for name in actor)


def test_it_is_as_careful_as_it_is_told() -> None:
    """With hardly any caution it does what the log did, on both sides."""

    def mean(caution: float) -> float:
        config = config_of(fallback=FallbackConfig(caution=caution, cost_discount=DISCOUNT))
        data = log()
        train = data.normalised(data.normalizer())
        fallback = Fallback(config, data, train, train, False, "cpu")
        for _ in range(150):
            fallback.update()
        return float(np.mean(to_the_right(fallback.actor)))

    assert mean(100.0) < -0.4
    assert mean(1e-3) > -0.3


@pytest.mark.parametrize("limits", [1, 2])
def test_a_log_that_knows_a_way_out_teaches_it_however_bad_it_is(limits: int) -> None:
    """Its own action is fatal, the logged ones are not: e^100 of each of two limits."""
    networks = Networks(1, 1, NetworkConfig((), (4,), 2), torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight, bias = networks.actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor([3.0, -9.0]))  # 1, and next to no noise
    extraction = Extraction(
        networks,
        ExtractionConfig(),
        torch.Generator().manual_seed(0),
        aversions=[Aversion(100.0, relative=True)] * limits,
    )

    def risk(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
        return torch.sigmoid(20.0 * actions[:, 0])

    steering = Steering((Penalty(risk, torch.tensor(100.0)),) * limits)
    data = log(episodes=2)  # one to the left, one to the right
    for _ in range(3):
        metrics = extraction.update(data.transitions, None, steering)
        assert all(math.isfinite(float(value)) for value in metrics.values())


# --- its settings ---


def test_it_has_settings_of_its_own_and_all_else_from_the_agent() -> None:
    settings = FallbackConfig(weight=0.07, caution=30.0, cost_discount=0.9)
    extraction = ExtractionConfig(weight=0.3, components=4)
    config = config_of(fallback=settings, extraction=extraction)
    loop = Pretraining(config, log(episodes=20))
    own = fallback_of(loop)
    assert own.extraction.config == replace(extraction, weight=0.07)
    assert [tuple(aversion) for aversion in own.extraction._aversions] == [(30.0, True)]
    assert [float(multiplier) for _, multiplier in own._steering.penalties] == [30.0]
    mine, its = (x.constraints[0].critic for x in (loop, own))
    assert (mine.outlook.discount, its.outlook.discount) == (0.5, 0.9)
    assert its.config == replace(mine.config, cost_discount=0.9)


def test_it_is_learnt_no_longer_than_the_agent() -> None:
    def total(steps: int, of_fallback: int) -> int:
        config = config_of(
            steps=steps, alignment_steps=7, fallback=FallbackConfig(steps=of_fallback)
        )
        return Pretraining(config, log(episodes=20)).total_steps

    assert total(30, 20) == 30 + 7 + 20
    assert total(30, 40) == 30 + 7 + 30
    assert total(30, 0) == 30 + 7


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": -1},
        {"caution": 0.0},
        {"caution": -1.0},
        {"caution": math.nan},
        {"weight": -0.1},
        {"weight": math.nan},
        {"cost_discount": 0.0},
        {"cost_discount": 1.0},
        {"cost_discount": math.nan},
    ],
    ids=str,
)
def test_settings_that_are_no_caution_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"fallback\."):
        FallbackConfig(**settings)


# --- the guard that is made of it ---


@CONSTRAINTS
def test_a_guard_is_made_where_the_log_shows_that_it_helps(constraint: str) -> None:
    loop = pretrained(constraint, "box")
    assert loop.reports[0].guard_refusals == ()
    assert "\nguard       allowed" in str(loop.reports[0])
    guard = Guard.restored(
        loop.state_dict(), loop.info()["guard"], (1, 1), loop.networks.actor.kind
    )
    (watch,) = guard.watches
    limit = {"cost": (5.0, 1.0 / (1.0 - DISCOUNT), True), "accident": (0.3, 1.0, False)}
    assert watch.constraint == constraint
    assert (watch.limit, watch.ahead_at_one, watch.spends) == pytest.approx(limit[constraint])
    careful, other = guard.fallbacks  # the careful one comes first
    assert to_the_right(careful) == to_the_right(fallback_of(loop).actor)
    assert to_the_right(other) == to_the_right(loop.networks.actor)
    # Everything to the right is too much, and the way back is to the left.
    at, right, left = (np.array([x], np.float32) for x in (0.0, 0.6, -0.6))
    instead = guard.take_over(at, 0.5, right, {"cost": 4.0})
    assert instead is not None
    assert instead[0] < -0.4
    assert guard.take_over(at, 0.5, left, {"cost": 4.0}) is None


def test_a_guard_of_discrete_actions_is_restored() -> None:
    loop = pretrained("cost", "discrete")
    guard = Guard.restored(loop.state_dict(), loop.info()["guard"], (1, 2), kind_for(discrete=True))
    left, right = np.eye(2, dtype=np.float32)
    at = np.zeros(1, np.float32)
    instead = guard.take_over(at, 0.5, right, {"cost": 4.0})
    assert instead is not None
    assert instead.tolist() == left.tolist()
    assert guard.take_over(at, 0.5, left, {"cost": 4.0}) is None


def test_what_the_guard_is_made_of_changes_with_nothing_else() -> None:
    loop = Pretraining(config_of(steps=20), log(episodes=20))
    guard = fallback_of(loop).guard(loop.networks.actor, [True])
    known = guard.sha256
    list(loop.run())
    assert guard.sha256 == known


def test_there_is_none_where_the_log_does_not_show_it() -> None:
    loop = Pretraining(config_of(), log(episodes=20))  # of which six are held out
    list(loop.run())
    assert loop.info()["guard"] is None
    assert not any(name.startswith("guard/") for name in loop.state_dict())
    (report,) = loop.reports
    assert "held-out accident episodes, 10 needed" in report.guard_refusals[0]
    assert f"\nguard       abstains: {report.guard_refusals[0]}" in str(report)


def test_there_is_none_without_a_fallback() -> None:
    loop = Pretraining(config_of(steps=20, fallback=FallbackConfig(steps=0)), log())
    list(loop.run())
    assert loop.info()["guard"] is None
    assert loop.reports[0].guard_refusals == (NO_FALLBACK,)


def test_of_two_limits_it_watches_the_one_that_is_shown() -> None:
    """Below a cost of a millionth nothing is estimated."""
    spec = SafetySpec(limits={"cost": 1e-6, "accident": 0.3}, horizon=HORIZON)
    loop = Pretraining(config_of(safety=spec), log())
    list(loop.run())
    assert [bool(report.guard_refusals) for report in loop.reports] == [True, False]
    (watched,) = loop.info()["guard"]["watches"]
    assert (watched["constraint"], watched["limit"]) == ("accident", 0.3)
    critic = fallback_of(loop).constraints[1].critic
    tensors = loop.state_dict()
    plain = critic.net.select(critic.plain).state_dict()
    assert all(torch.equal(tensors[f"guard/watch_0/{name}"], x) for name, x in plain.items())
