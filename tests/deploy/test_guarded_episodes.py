"""Episodes of a policy behind its guard: what is executed, stored and counted, step by step."""

from __future__ import annotations

import json
import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from safe_offrl.deploy.episodes import PlayedEpisode, play_episode
from safe_offrl.deploy.policy import Act, DeployedPolicy
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.errors import EnvError
from safe_offrl.policies.networks import Actor, StackedMLP
from safe_offrl.safety.guard import Guard, Watch
from safe_offrl.safety.shield import Shield
from safe_offrl.spec import SafetySpec
from safe_offrl.types import Layout, Normalizer
from tests.safety.test_guard import fallback as going
from tests.safety.test_guard import seeded

HORIZON = 6
LAYOUT = Layout(1, 1)
SPEC = SafetySpec(constraint="cost", cost_limit=2.5, horizon=HORIZON)
AS_IT_IS = Normalizer(np.zeros(1, np.float32), np.ones(1, np.float32))


class Toll(gymnasium.Env[Any, Any]):
    """A walk in which each step to the right costs 1; ``breaks`` is the step that fails."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, noise: float = 0.0, breaks: int = -1) -> None:
        self.noise, self.breaks = noise, breaks

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.position, self.clock = 0.0, 0
        return self.seen(), {}

    def step(self, action: Any) -> Any:
        if self.clock == self.breaks:
            raise ConnectionError("no answer")
        self.clock += 1
        self.position += float(action[0]) + self.noise * float(self.np_random.standard_normal())
        return self.seen(), self.position, False, False, {"cost": float(action[0] > 0.0)}

    def seen(self) -> Any:
        return np.array([self.position], np.float32)


def net_of(base: float, *, action: float = 0.0, observation: float = 0.0) -> StackedMLP:
    """sigmoid(base + action a + observation o)."""
    net = StackedMLP(1, 3, (), layer_norm=True, generator=seeded()).requires_grad_(False)
    net.output.weight[:] = torch.tensor([observation, 0.0, action])[:, None]
    net.output.bias[:] = base
    return net


def guard_of(*watches: Watch, until_end: bool = False) -> Guard:
    return Guard([going(-0.5), going(-0.25)], watches, until_end=until_end)


def toll(limit: float, *, ahead: float = 0.0) -> Watch:
    """Of the cost; ``ahead`` of a step to the right, nothing of another."""
    return Watch("cost", limit, net_of(0.0, action=80.0), ahead, spends=True)


def deployed(
    guard: Guard | None,
    *,
    actor: Actor | None = None,
    shield: Shield | None = None,
    normalizer: Normalizer = AS_IT_IS,
) -> DeployedPolicy:
    return DeployedPolicy.from_actor(
        actor or going(0.5), shield or Shield.abstaining(), normalizer, 7, guard
    )


def play(
    policy: DeployedPolicy, env: Toll | None = None, *, mean_action: bool = True
) -> PlayedEpisode:
    adapted = AccidentEnv(env or Toll(), SPEC, env_id="Toll")
    return play_episode(adapted, policy, 0, np.random.default_rng(5), mean_action=mean_action)


def guarded_steps(played: PlayedEpisode) -> int:
    about: dict[str, Any] = {"index": 0, "seed": 0, "steps_before": 0, "worst_cost": 9.0}
    return played.recorded(**about, version=7, phase="online").guarded_steps


def columns(played: PlayedEpisode) -> tuple[list[float], list[float]]:
    """Actions and costs, as they are stored."""
    batch = LAYOUT.unpack(played.rows)
    return [round(a, 5) for a in batch.actions[:, 0].tolist()], batch.costs.tolist()


def test_what_the_fallback_does_is_executed_and_stored() -> None:
    """At a limit of 2.5 a third step to the right is paid for, a fourth is not."""
    played = play(deployed(guard_of(toll(2.5))))
    assert columns(played) == ([0.5] * 3 + [-0.5] * 3, [1.0] * 3 + [0.0] * 3)
    assert played.handed_over == (False,) * 3 + (True,) * 3
    assert (played.cost, played.steps, guarded_steps(played)) == (3.0, 6, 3)
    positions = LAYOUT.unpack(played.rows).next_observations[:, 0].tolist()
    assert positions == pytest.approx([0.5, 1.0, 1.5, 1.0, 0.5, 0.0])
    assert played.episode_return == pytest.approx(sum(positions))


def test_what_an_action_leads_to_is_counted_before_it_is_taken() -> None:
    """With a cost of 1 ahead of a step to the right, the limit is never exceeded."""
    played = play(deployed(guard_of(toll(2.5, ahead=1.0))))
    assert columns(played) == ([0.5] * 2 + [-0.5] * 4, [1.0] * 2 + [0.0] * 4)
    assert (played.cost, guarded_steps(played)) == (2.0, 4)


def test_it_is_handed_back_where_going_on_is_affordable_again() -> None:
    """Right of .75 a step to the right is too much; what sees is standardised: (x - 1) / 2."""
    halved = Normalizer(np.ones(1, np.float32), np.full(1, 2.0, np.float32))
    net = net_of(12.5 - 40.0, observation=100.0, action=80.0)  # that of .5
    watch = Watch("accident", 0.5, net, 1.0, spends=False)
    played = play(deployed(guard_of(watch), normalizer=halved))
    assert columns(played)[0] == [0.5, 0.5, -0.5, 0.5, -0.5, 0.5]
    assert played.handed_over == (False, False, True, False, True, False)
    assert guarded_steps(played) == 2


def test_a_guard_until_the_end_is_not_handed_back() -> None:
    """Nor is it asked whether its fallback is safer where the episode is handed over."""
    alike = Watch("accident", 0.5, net_of(-30.0, observation=40.0), 1.0, spends=False)
    steep = alike._replace(net=net_of(-30.0 - 40.0, observation=40.0, action=80.0))
    for watch in (alike, steep):
        played = play(deployed(guard_of(watch, until_end=True)))
        assert columns(played)[0] == [0.5, 0.5, -0.5, -0.5, -0.5, -0.5]
        assert played.handed_over == (False, False, True, True, True, True)
    back = play(deployed(guard_of(steep)))
    assert back.handed_over == (False, False, True, False, True, False)
    assert play(deployed(guard_of(alike))).handed_over == (False,) * HORIZON


@pytest.mark.parametrize("mean_action", [False, True])
def test_a_guard_with_nothing_to_do_leaves_no_trace(mean_action: bool) -> None:
    noisy = going(0.1)
    rngs = [np.random.default_rng(5) for _ in range(2)]
    with_it, without = (
        play_episode(
            AccidentEnv(Toll(noise=0.1), SPEC, env_id="Toll"),
            deployed(guard, actor=noisy),
            3,
            rng,
            mean_action=mean_action,
        )
        for guard, rng in zip((guard_of(toll(1e9, ahead=1.0)), None), rngs, strict=True)
    )
    assert torch.equal(with_it.rows, without.rows)
    assert with_it.content == without.content
    assert with_it._replace(rows=without.rows) == without
    assert rngs[0].bit_generator.state == rngs[1].bit_generator.state
    assert guarded_steps(with_it) == 0
    assert without.handed_over == (False,) * HORIZON


def test_random_numbers_are_drawn_alike_where_the_fallback_acts() -> None:
    """What follows an episode does not depend on who acted in it."""
    rngs = [np.random.default_rng(5) for _ in range(2)]
    for guard, rng in zip((guard_of(toll(1e-6)), None), rngs, strict=True):
        policy = deployed(guard, actor=going(0.1))
        play_episode(AccidentEnv(Toll(), SPEC, env_id="Toll"), policy, 3, rng)
    assert rngs[0].bit_generator.state == rngs[1].bit_generator.state


def test_who_chose_an_action_is_one_of_three() -> None:
    shield = Shield(net_of(0.0, action=1.0), 4, 0.0, acts=True)
    noisy = going(0.1)
    observation = np.zeros(1, np.float32)

    def acts(guard: Guard | None) -> list[Act]:
        policy, rng = deployed(guard, actor=noisy, shield=shield), np.random.default_rng(0)
        return [policy.act(observation, 1.0, rng, {"cost": 1.0}) for _ in range(40)]

    shielded, passed, taken = (acts(g) for g in (None, guard_of(toll(9.0)), guard_of(toll(1.0))))
    assert 20 < sum(act.replaced for act in shielded) < 40
    assert not any(act.handed_over for act in [*shielded, *passed])
    assert [act.action.tolist() for act in passed] == [act.action.tolist() for act in shielded]
    assert [act.replaced for act in passed] == [act.replaced for act in shielded]
    assert {(round(float(a.action[0]), 5), a.replaced, a.handed_over) for a in taken} == {
        (-0.5, False, True)
    }


def test_the_guard_judges_what_the_shield_lets_pass() -> None:
    """The shield finds a step to the left in four draws; there is nothing to take over."""
    shield = Shield(net_of(0.0, action=1.0), 4, 0.0, acts=True)
    guard = guard_of(toll(0.5, ahead=1.0))
    observation, rng, same = np.zeros(1, np.float32), *(np.random.default_rng(1) for _ in range(2))
    noisy = going(0.001)
    shielded = [
        deployed(guard, actor=noisy, shield=shield).act(observation, 1.0, rng) for _ in range(60)
    ]
    alone = [deployed(guard, actor=noisy).act(observation, 1.0, same) for _ in range(60)]
    assert sum(act.handed_over for act in shielded) < 15  # all four of them to the right
    assert sum(act.handed_over for act in alone) > 20
    assert all(act.handed_over or act.action[0] <= 0.0 for act in shielded)


def test_an_environment_that_fails_while_the_fallback_acts() -> None:
    played = play(deployed(guard_of(toll(2.5))), Toll(breaks=4))
    assert "no answer" in played.fault
    assert played.handed_over == (False,) * 3 + (True,) * 2  # the step that failed included
    assert (played.steps, len(played.rows), guarded_steps(played)) == (5, 4, 2)


def test_a_fallback_that_is_none_is_not_sent() -> None:
    guard = Guard([going(-0.5)], [toll(1e-6)])
    with torch.no_grad():
        for parameter in guard.fallbacks[0].parameters():
            parameter.fill_(math.nan)
    with pytest.raises(EnvError, match="not finite"):
        play(deployed(guard))


# --- as one thing, and as a file ---


def test_at_random_it_is_guarded_all_the_same() -> None:
    policy = deployed(guard_of(toll(0.5, ahead=1.0))).at_random()
    played = play(policy, mean_action=False)
    actions = np.array(columns(played)[0])
    handed = np.array(played.handed_over)
    assert 0 < handed.sum() < HORIZON
    assert (actions[handed] == -0.5).all()
    assert (actions[~handed] <= 0.0).all()


def test_a_checkpoint_keeps_the_guard_with_the_policy() -> None:
    policy = deployed(guard_of(toll(2.5, ahead=1.0)))
    words = json.loads(json.dumps(policy.words()))
    again = DeployedPolicy.restored(policy.tensors(), words)
    assert again.guard is not None
    assert policy.guard is not None
    assert again.guard.sha256 == policy.guard.sha256
    assert play(again).content == play(policy).content
    assert play(again).handed_over == (False,) * 2 + (True,) * 4


def test_without_a_guard_a_checkpoint_says_nothing_of_one() -> None:
    policy, guarded = deployed(None), deployed(guard_of(toll(2.5)))
    assert "guard" not in policy.words()
    assert not any(name.startswith("guard") for name in policy.tensors())
    assert set(guarded.words()) - set(policy.words()) == {"guard"}
    assert DeployedPolicy.restored(policy.tensors(), policy.words()).guard is None
    assert guarded.sha256 == policy.sha256  # the guard has its own
