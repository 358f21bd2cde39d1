"""Learning from a model: the dynamics by hand and recovered, what is imagined, and three agents."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safe_offrl import commands
from safe_offrl.agents import AGENTS, kind_of
from safe_offrl.agents.combo import COMBO, as_imagined
from safe_offrl.agents.dynamics import (
    MEMBERS,
    Dynamics,
    Prediction,
    disagreement,
    uncertainty,
)
from safe_offrl.agents.mopo import MOPO
from safe_offrl.agents.morel import MOReL
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.agents.world_model import ModelConfig, WorldModel
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.state import collect_state, restore_state
from safe_offrl.errors import ConfigError
from safe_offrl.policies.networks import NetworkConfig, Networks, StackedLinear
from safe_offrl.types import Batch, Layout
from tests.agents.setups import log_of, setup_of

NOTHING_ELSE = Steering()
SMALL = NetworkConfig((16,), (16,), 3)
TINY = ModelConfig(hidden=(8,), share=0.5)
NAMES = ("mopo", "morel", "combo")
every_agent = pytest.mark.parametrize("name", NAMES)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def steps_of(
    observations: Tensor,
    actions: Tensor,
    rewards: Tensor,
    following: Tensor,
    **others: Tensor,
) -> Batch:
    """Logged steps, which do not end and cost nothing if ``others`` does not say so."""
    zeros = torch.zeros(len(rewards))
    rest = ("accidents", "costs", "terminated", "return_to_go")
    fields = {**dict.fromkeys(rest, zeros), "time_to_go": zeros + 1.0, **others}
    return Batch(observations, actions, rewards, next_observations=following, **fields)


def random_steps(n: int = 64, seed: int = 0) -> Batch:
    g = seeded(seed)
    events = (torch.rand(n, generator=g) < 0.2).float()
    return steps_of(
        torch.randn(n, 2, generator=g),
        2.0 * torch.rand(n, 1, generator=g) - 1.0,
        torch.randn(n, generator=g),
        torch.randn(n, 2, generator=g),
        accidents=events,
        costs=events,
        terminated=events,
    )


def picked(batch: Batch, index: Tensor) -> Batch:
    return Batch(*(field[index] for field in batch.tensors))


def agent_of(name: str, log: Batch, seed: int = 0, *, horizon: int = 20, **settings: Any) -> Any:
    """With small networks; ``settings`` of the agent, and how many ``steps`` it will have."""
    generator, steps = seeded(seed), settings.pop("steps", 0)
    sizes = settings.pop("sizes", SMALL)
    layout = Layout(log.observations.shape[-1], log.actions.shape[-1])
    networks = Networks(*layout.sizes, sizes, generator)
    setup = setup_of(networks, generator, log_of(log, layout, horizon), steps=steps)
    agent = AGENTS[name]
    return agent(setup, agent.Config(**{"model": TINY, **settings}))


def dynamics_of(log: Batch, hidden: tuple[int, ...] = ()) -> Dynamics:
    layout = Layout(log.observations.shape[-1], log.actions.shape[-1])
    return Dynamics(log_of(log, layout), hidden, seeded())


def says_(dynamics: Dynamics, outputs: list[list[float]]) -> None:
    """Make member e answer outputs[e], or the only ones, to everything."""
    layer = dynamics.layers[-1]
    assert isinstance(layer, StackedLinear)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor(outputs).unsqueeze(1).expand(MEMBERS, 1, -1))


def prediction_of(means: list[float], variances: list[float]) -> Prediction:
    """Of one step and one number by each member."""
    shape = (len(means), 1, 1)
    mean, variance = torch.tensor(means).view(shape), torch.tensor(variances).view(shape)
    return Prediction(mean, variance.log(), torch.zeros(*shape[:2], 3))


# --- the dynamics by hand ---

# Changes 1 and 3 of the observation: their mean is 2, their deviation 1; rewards 5 and 9: 7 and 2.
TWO_STEPS = steps_of(
    torch.tensor([[0.0], [1.0]]),
    torch.zeros(2, 1),
    torch.tensor([5.0, 9.0]),
    torch.tensor([[1.0], [4.0]]),
    terminated=torch.tensor([0.0, 1.0]),
    costs=torch.tensor([1.0, 4.0]),
)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def bounded(raw: float) -> float:
    below = 0.5 - softplus(0.5 - raw)
    return -10.0 + softplus(below + 10.0)


def test_the_model_s_loss_is_by_hand() -> None:
    """Standardised, the changes are -1 and 1, and so are the rewards."""
    dynamics = dynamics_of(TWO_STEPS)
    assert dynamics.center.tolist() == [2.0, 7.0]
    assert dynamics.scale.tolist() == [1.0, 2.0]
    # Means .5 and 0, raw log variances 0 and -20, logits of termination, accident, cost.
    says_(dynamics, [[0.5, 0.0, 0.0, -20.0, 0.4, -1.0, 2.0]])
    v, w = bounded(0.0), bounded(-20.0)
    assert w == pytest.approx(-10.0, abs=1e-4)
    first = (1.5**2 * math.exp(-v) + v) / 2.0 + (1.0 * math.exp(-w) + w) / 2.0
    second = (0.5**2 * math.exp(-v) + v) / 2.0 + (1.0 * math.exp(-w) + w) / 2.0
    # Cross-entropies: of 0 and 1, of 0 and 0, and of the shares 1/4 and 1 of the largest cost.
    ended = (softplus(0.4) + softplus(-0.4)) / 2.0
    accident = softplus(-1.0)
    cost = (0.25 * softplus(-2.0) + 0.75 * softplus(2.0) + softplus(-2.0)) / 2.0
    by_hand = (first + second) / 2.0 + ended + accident + cost
    losses = dynamics.losses(TWO_STEPS)
    assert losses.tolist() == pytest.approx([by_hand] * MEMBERS, rel=1e-4)
    bounds = 2 * (0.5 + 10.0)
    (loss,) = dynamics.loss(TWO_STEPS)
    # The weights are the deviations e^(v/2): the errors of the change and the reward, and the rest.
    change = ((1.5**2 + 0.5**2) / 2.0 * math.exp(-v) + v) * math.exp(v / 2.0)
    reward = (math.exp(-w) + w) * math.exp(w / 2.0)
    weighed = (change + reward) / 2.0 + ended + accident + cost
    assert loss.item() == pytest.approx(MEMBERS * weighed + 0.01 * bounds, rel=1e-4)


def test_the_weights_of_errors_have_no_gradient() -> None:
    """Where the variance is the squared error, 1, nothing pulls at it; through weights it would."""
    dynamics = dynamics_of(TWO_STEPS)
    raw = 0.5 - math.log(math.expm1(0.5))
    assert bounded(raw) == pytest.approx(0.0, abs=1e-3)
    says_(dynamics, [[0.0, 0.0, raw, raw, 0.0, 0.0, 0.0]])
    layer = dynamics.layers[-1]
    assert isinstance(layer, StackedLinear)
    (gradient,) = torch.autograd.grad(dynamics.loss(TWO_STEPS)[0], layer.bias)
    assert gradient[:, 0, 2:4].abs().max().item() < 1e-3
    assert gradient[:, 0, 5].abs().max().item() > 0.1


def test_each_member_may_have_steps_of_its_own() -> None:
    dynamics, log = dynamics_of(random_steps(), (4,)), random_steps(MEMBERS * 6, seed=1)
    own = Batch(*(field.unflatten(0, (MEMBERS, 6)) for field in log.tensors))
    losses = dynamics.losses(own)
    for e in range(MEMBERS):
        alone = dynamics.losses(Batch(*(field[e] for field in own.tensors)))
        assert losses[e].item() == pytest.approx(alone[e].item(), rel=1e-5)


def test_a_drawn_step_is_by_hand() -> None:
    dynamics = dynamics_of(TWO_STEPS)
    means = [
        [0.1 * e, 0.0, 0.0, 0.0, math.log(0.6 / 0.4), math.log(0.3 / 0.7), 0.0] for e in range(7)
    ]
    says_(dynamics, means)
    start = TWO_STEPS._replace(rewards=torch.zeros(2), costs=torch.zeros(2))
    prediction = dynamics(start.observations, start.actions)
    noise = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    chance = torch.tensor([0.2, 0.5])  # of .6 and .3: both, and termination alone
    step = dynamics.step(start, prediction, torch.tensor([0, 5]), noise, chance)
    std = math.exp(0.5 * bounded(0.0))
    assert step.next_observations.flatten().tolist() == pytest.approx([2.0 + std, 1.0 + 2.5])
    assert step.rewards.tolist() == pytest.approx([7.0, 7.0 - 2.0 * 2.0 * std])
    assert step.terminated.tolist() == [1.0, 1.0]
    assert step.accidents.tolist() == [1.0, 0.0]
    assert step.costs.tolist() == [2.0, 2.0]  # half of the largest
    assert torch.equal(step.observations, start.observations)
    last = dynamics.step(start, prediction, torch.tensor([0, 5]), noise, torch.tensor([0.7, 0.2]))
    assert last.terminated.tolist() == [0.0, 1.0]
    assert last.accidents.tolist() == [0.0, 1.0]


def test_named_costs_are_predicted_too() -> None:
    layout = Layout(1, 1, ("gas", "heat"))
    signals = torch.tensor([[2.0, 0.0], [8.0, 10.0]])
    log = TWO_STEPS._replace(signals=signals)
    dynamics = Dynamics(log_of(log, layout), (), seeded())
    assert dynamics.largest_costs.tolist() == [4.0, 8.0, 10.0]
    says_(dynamics, [[0.0] * 4 + [0.0, 0.0, 0.0, math.log(3.0), -math.log(3.0)]])
    prediction = dynamics(log.observations, log.actions)
    one = torch.zeros(2, dtype=torch.int64)
    step = dynamics.step(log, prediction, one, torch.zeros(2, 2), torch.ones(2))
    assert step.signals is not None
    assert step.signals.flatten().tolist() == pytest.approx([6.0, 2.5] * 2)
    # The shares are 1/4 and 1 of gas, 0 and 1 of heat: their cross-entropies with 3/4 and 1/4.
    without = dynamics_of(TWO_STEPS)
    says_(without, [[0.0] * 7])
    gas = -(1.25 * math.log(0.75) + 0.75 * math.log(0.25)) / 2.0
    heat = -(math.log(0.25) + math.log(0.75)) / 2.0
    expected = without.losses(TWO_STEPS)[0].item() + gas + heat
    assert dynamics.losses(log)[0].item() == pytest.approx(expected, rel=1e-5)


def test_uncertainty_is_the_largest_deviation_of_a_member() -> None:
    """Around the means of all, 1 and 0: 1 + 4 + 4, 9 + .5 + 4 and 4 + 4 + 4 + 4."""
    log_variance = torch.tensor([[[1.0, 4.0]], [[9.0, 0.5]], [[4.0, 4.0]]]).log()
    mean = torch.tensor([[[3.0, 0.0]], [[1.0, -2.0]], [[-1.0, 2.0]]])
    prediction = Prediction(mean, log_variance, torch.zeros(3, 1, 3))
    assert uncertainty(prediction).tolist() == pytest.approx([math.sqrt(16.0 / 2.0)])
    agreed = prediction._replace(mean=torch.zeros(3, 1, 2))
    assert uncertainty(agreed).tolist() == pytest.approx([math.sqrt(9.5 / 2.0)])


def test_disagreement_is_the_largest_distance_of_two_members() -> None:
    mean = torch.tensor(
        [[[0.0, 0.0], [1.0, 1.0]], [[3.0, 0.0], [1.0, 1.0]], [[0.0, 4.0], [1.0, 1.5]]]
    )
    prediction = Prediction(mean, torch.zeros(3, 2, 2), torch.zeros(3, 2, 3))
    assert disagreement(prediction).tolist() == pytest.approx([5.0, 0.5])


# --- the dynamics recovered ---


@functools.cache
def linear_agent() -> MOReL:
    """Of ``s' = .8 s + .5 a + .1 z``, ``r = 2 a - s + .3 z``, which ends and costs by the action.

    Logged with actions in [-1, 0] alone.
    """
    g, n = seeded(1), 4000
    s, a = torch.randn(n, 1, generator=g), -torch.rand(n, 1, generator=g)
    z, w = torch.randn(n, 1, generator=g), torch.randn(n, generator=g)
    ends = (torch.rand(n, generator=g) < torch.where(a[:, 0] < -0.5, 0.6, 0.1)).float()
    hit = ends * (torch.rand(n, generator=g) < 0.5).float()
    log = steps_of(
        s,
        a,
        2.0 * a[:, 0] - s[:, 0] + 0.3 * w,
        0.8 * s + 0.5 * a + 0.1 * z,
        terminated=ends,
        accidents=hit,
        costs=-4.0 * a[:, 0],
    )
    config = ModelConfig(learning_rate=5e-3, hidden=(32, 32), share=1.0)
    agent: MOReL = agent_of("morel", log, steps=600, model=config)
    for _ in range(600):
        agent.update(picked(log, torch.arange(64)), NOTHING_ELSE)
    return agent


def at(s: list[float], a: list[float]) -> Prediction:
    dynamics = linear_agent().model.dynamics
    with torch.no_grad():
        return dynamics(torch.tensor(s).unsqueeze(-1), torch.tensor(a).unsqueeze(-1))


def test_a_linear_system_is_recovered_with_its_noise() -> None:
    s, a = [-1.0, 0.0, 0.5, 1.0], [-0.2, -0.8, -0.5, -0.9]
    prediction, model = at(s, a), linear_agent().model
    dynamics = model.dynamics
    found = dynamics.center + dynamics.scale * prediction.mean[model.elites].mean(0)
    change = [-0.2 * x + 0.5 * y for x, y in zip(s, a, strict=True)]
    reward = [2.0 * y - x for x, y in zip(s, a, strict=True)]
    assert found[:, 0].tolist() == pytest.approx(change, abs=0.05)
    assert found[:, 1].tolist() == pytest.approx(reward, abs=0.15)
    std = dynamics.scale * (0.5 * prediction.log_variance.mean(0)).exp()
    assert std[:, 0].tolist() == pytest.approx([0.1] * 4, rel=0.2)
    assert std[:, 1].tolist() == pytest.approx([0.3] * 4, rel=0.2)


def test_how_likely_a_step_ends_hits_and_what_it_costs_is_recovered() -> None:
    likely = torch.sigmoid(at([0.0, 0.0], [-0.8, -0.2]).logits.mean(0))
    assert likely[:, 0].tolist() == pytest.approx([0.6, 0.1], abs=0.08)
    assert likely[:, 1].tolist() == pytest.approx([0.3, 0.05], abs=0.08)
    assert (4.0 * likely[:, 2]).tolist() == pytest.approx([3.2, 0.8], abs=0.3)


def test_away_from_the_log_uncertainty_and_disagreement_grow() -> None:
    near, far = at([0.0, 0.0], [-0.7, -0.3]), at([0.0, 5.0], [1.0, -0.5])
    assert uncertainty(far).min().item() > 1.2 * uncertainty(near).max().item()
    assert disagreement(far).min().item() > 3.0 * disagreement(near).max().item()


def test_morel_halts_outside_of_the_log_and_not_in_it() -> None:
    agent = linear_agent()
    logged = agent.model.held_out
    prediction = agent.model.dynamics(logged.observations, logged.actions)
    assert disagreement(prediction).max().item() == pytest.approx(agent.threshold.item())
    assert torch.equal(agent.halted(prediction, logged).terminated, logged.terminated)
    here = steps_of(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 1))
    away = at([6.0, 0.0], [1.0, -0.5])
    assert agent.halted(away, here).terminated.tolist() == [1.0, 0.0]


# --- what is imagined ---


def test_the_elites_are_the_best_on_steps_that_nobody_learnt_from() -> None:
    log = random_steps()
    model: WorldModel = agent_of("mopo", log, model=ModelConfig(hidden=())).model
    ranks = [5, 0, 6, 1, 2, 4, 3]
    says_(model.dynamics, [[3.0 * rank] * 3 + [0.0] * 6 for rank in ranks])
    assert model.best_members().tolist() == [1, 3, 4, 6, 5]
    model.held_out = model.held_out._replace(rewards=model.held_out.rewards + 100.0)
    assert model.best_members().tolist() == [2, 0, 5, 6, 4]


def test_held_out_are_other_episodes_than_those_that_are_learnt_from() -> None:
    log = random_steps()._replace(return_to_go=torch.arange(64.0))
    model: WorldModel = agent_of("mopo", log).model
    learnt_from = model.train.transitions.return_to_go.tolist()
    held_out = model.held_out.return_to_go.tolist()
    assert len(held_out) == 6
    assert sorted(learnt_from + held_out) == log.return_to_go.tolist()


def certain_(dynamics: Dynamics, change: float, ends: float) -> None:
    """Make every member say, as good as without noise, a change and whether the step ends."""
    with torch.no_grad():
        dynamics.least.fill_(-30.0)
        dynamics.center.zero_()
        dynamics.scale.fill_(1.0)
    o = len(dynamics.center) - 1
    says_(dynamics, [[change] * o + [1.0] + [-40.0] * (o + 1) + [ends, ends, 0.0]])


def imagined(model: WorldModel, starts: Batch, steps: int) -> list[Batch]:
    together = model.imagine(starts, steps, as_imagined)
    parts = zip(*(field.chunk(steps) for field in together.tensors), strict=True)
    return [Batch(*fields) for fields in parts]


def test_an_imagined_episode_goes_on_by_the_actor_until_it_ends_or_its_time_is_over() -> None:
    """The second begins two steps before its horizon of ten, so its third step is a first one."""
    model: WorldModel = agent_of("mopo", random_steps(), horizon=10).model
    certain_(model.dynamics, 0.5, -40.0)
    starts = picked(random_steps(), torch.tensor([3, 4]))
    starts = starts._replace(time_to_go=torch.tensor([1.0, 0.2]))
    first, second, third = imagined(model, starts, 3)
    assert torch.equal(first.observations, starts.observations)
    assert not torch.equal(first.actions, starts.actions)
    for step in (first, second, third):
        torch.testing.assert_close(step.next_observations, step.observations + 0.5)
        assert step.rewards.tolist() == pytest.approx([1.0, 1.0])
        assert step.terminated.tolist() == [0.0, 0.0]
    assert torch.equal(second.observations, first.next_observations)
    assert torch.equal(third.observations[0], second.next_observations[0])
    assert torch.equal(third.observations[1], starts.observations[1])
    assert second.time_to_go.tolist() == pytest.approx([0.9, 0.1])
    assert third.time_to_go.tolist() == pytest.approx([0.8, 0.2])


def test_behind_a_termination_nothing_is_imagined() -> None:
    model: WorldModel = agent_of("mopo", random_steps(), horizon=10).model
    certain_(model.dynamics, 0.5, 40.0)
    starts = random_steps()._replace(time_to_go=torch.full((64,), 0.7))
    for step in imagined(model, starts, 3):
        assert torch.equal(step.observations, starts.observations)
        assert torch.equal(step.time_to_go, starts.time_to_go)
        assert step.terminated.min().item() == 1.0
        assert step.accidents.min().item() == 1.0
    halting = model.imagine(starts, 2, lambda _, step: step._replace(terminated=step.costs + 1.0))
    assert torch.equal(halting.observations, starts.observations.repeat(2, 1))


def test_the_present_actor_acts_and_elites_alone_say_what_follows() -> None:
    model: WorldModel = agent_of("mopo", random_steps()).model
    certain_(model.dynamics, 0.0, -40.0)
    says_(model.dynamics, [[float(e)] * 3 + [-40.0] * 3 + [0.0] * 3 for e in range(MEMBERS)])
    model.elites.copy_(torch.tensor([6, 1, 2, 4, 5]))
    with torch.no_grad():
        for parameter in model.actor.parameters():
            parameter.zero_()
        parameter.copy_(torch.tensor([0.7, -40.0]))  # mean, the least deviation
    step = model.imagine(random_steps(), 1, as_imagined)
    assert step.actions.mean().item() == pytest.approx(math.tanh(0.7), abs=0.01)
    assert set(step.rewards.round().tolist()) == {1.0, 2.0, 4.0, 5.0, 6.0}
    assert torch.equal(
        step.rewards.round(), (step.next_observations - step.observations)[:, 0].round()
    )


@pytest.mark.parametrize(
    ("steps", "share", "logged"),
    [(5, 0.05, 4), (1, 0.5, 32), (5, 0.5, 34), (1, 0.0, 1), (70, 0.0, 1)],
)
def test_a_mixed_batch_is_as_large_and_its_first_rows_are_logged(
    steps: int, share: float, logged: int
) -> None:
    batch = random_steps()
    model: WorldModel = agent_of("mopo", batch).model
    mixed, found = model.mixed(batch, steps, share, as_imagined)
    assert found == logged
    assert len(mixed.rewards) == (64 if steps < 64 else 71)
    for field, real in zip(mixed.tensors, batch.tensors, strict=True):
        assert torch.equal(field[:logged], real[:logged])
    begun = mixed.observations[logged]
    assert not torch.equal(mixed.actions[logged], batch.actions[logged])
    assert any(torch.equal(begun, observation) for observation in batch.observations[logged:])


# --- the agents by hand ---


def test_mopo_takes_the_penalty_in_deviations_of_the_reward() -> None:
    agent: MOPO = agent_of("mopo", TWO_STEPS, penalty=3.0)
    agent.model.dynamics.scale.copy_(torch.tensor([1.0, 2.0]))
    prediction = prediction_of([1.0] * 7, [0.25] * 6 + [4.0])
    step = agent.penalised(prediction, picked(TWO_STEPS, torch.tensor([0])))
    assert step.rewards.tolist() == pytest.approx([5.0 - 3.0 * 2.0 * 2.0])
    assert step.terminated.tolist() == [0.0]


def test_morel_ends_where_members_disagree_and_pays_the_worst_return() -> None:
    log = TWO_STEPS._replace(return_to_go=torch.tensor([3.0, -11.0]))
    agent: MOReL = agent_of("morel", log)
    one = picked(log, torch.tensor([0]))
    known = prediction_of([0.0] * 6 + [2.0], [1.0] * 7)
    assert agent.halted(known, one).terminated.tolist() == [0.0]  # nothing is before it learns
    agent.threshold.fill_(2.0)
    assert agent.halted(known, one).rewards.tolist() == [5.0]
    unknown = agent.halted(prediction_of([0.0] * 6 + [2.1], [1.0] * 7), one)
    assert unknown.rewards.tolist() == [-11.0]
    assert unknown.terminated.tolist() == [1.0]


def constant_(critics: nn.Module, values: list[float]) -> None:
    """Make member e answer values[e] everywhere."""
    with torch.no_grad():
        *_, bias = critics.parameters()
        for parameter in critics.parameters():
            parameter.zero_()
        bias.copy_(torch.tensor(values).view(bias.shape))


def test_combo_s_loss_is_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Q = 2 (+ 1) times the action; the least target is .5: y = r + .9 (1 - ended) .5."""
    agent: COMBO = agent_of("combo", random_steps(), beta=0.7, discount=0.9)
    critics = lambda o, a: torch.stack([2.0 * a[:, 0], 2.0 * a[:, 0] + 1.0])  # noqa: E731
    monkeypatch.setattr(agent.networks, "q", critics)
    constant_(agent.networks.target_critics, [0.8, 0.5, 3.0])
    two = torch.zeros(3, 2)
    actions, rewards = torch.tensor([[0.5], [-1.0], [0.0]]), torch.tensor([1.0, 2.0, 3.0])
    batch = steps_of(two, actions, rewards, two, terminated=torch.tensor([0.0, 0.0, 1.0]))
    targets, by_hand = (1.45, 2.45, 3.0), 0.0
    for q in ((1.0, -2.0, 0.0), (2.0, -1.0, 1.0)):
        by_hand += sum((x - y) ** 2 for x, y in zip(q, targets, strict=True)) / 3.0 / 2.0
        by_hand += 0.7 * ((q[1] + q[2]) / 2.0 - q[0])
    loss, gap = agent.critic_loss(batch, 1, torch.zeros(3, 1))
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert gap.item() == pytest.approx(-2.0)


# --- the agents in problems whose answer is known ---

FAST: dict[str, Any] = {"learning_rate": 3e-3, "tau": 0.05}
PROBE = NetworkConfig((32,), (32,), 3)


def trained(
    name: str, log: Batch, *, model: int, policy: int, steering: Steering = NOTHING_ELSE, **own: Any
) -> Any:
    steps = model + policy
    settings = ModelConfig(learning_rate=5e-3, hidden=(32, 32), share=model / steps)
    agent = agent_of(name, log, steps=steps, sizes=PROBE, model=settings, **FAST, **own)
    g = seeded(3)
    for _ in range(steps):
        agent.update(picked(log, torch.randint(len(log.rewards), (64,), generator=g)), steering)
    assert not agent.model.learning
    return agent


MILD: dict[str, dict[str, Any]] = {
    "mopo": {"penalty": 0.0, "real_share": 0.2},
    "morel": {"real_share": 0.2},
    "combo": {"beta": 0.0},
}


@every_agent
def test_a_chain_discounts_once_and_a_termination_does_not_bootstrap(name: str) -> None:
    """s0 -> s1 -> end with reward 1; s2 pays 1 for ever: Q = .5, 1 and 1 / (1 - .5) = 2."""
    n = 600
    state = torch.arange(n) % 3
    states = torch.eye(3)
    ended = (state == 1).float()
    actions = 2.0 * torch.rand(n, 1, generator=seeded(2)) - 1.0
    following = states[torch.tensor([1, 1, 2])[state]]
    log = steps_of(states[state], actions, (state > 0).float(), following, terminated=ended)
    agent = trained(name, log, model=250, policy=300, discount=0.5, **MILD[name])
    with torch.no_grad():
        q = agent.learner.networks.q(states[state], actions).mean(0)
    found = [q[state == i].mean().item() for i in range(3)]
    assert found == pytest.approx([0.5, 1.0, 2.0], abs=0.15)


def logged_half() -> Batch:
    """Rewards of 1 + a for actions in [-1, 0]: a model that goes on so finds most at a = 1."""
    n = 600
    actions = -torch.rand(n, 1, generator=seeded(2))
    here = torch.zeros(n, 1)
    noise = 0.05 * torch.randn(n, generator=seeded(3))
    rewards = 1.0 + actions[:, 0] + noise
    return steps_of(here, actions, rewards, here, terminated=torch.ones(n))


def mean_action(agent: Any) -> float:
    with torch.no_grad():
        return float(agent.learner.networks.actor(torch.zeros(1, 1)).act(torch.zeros(1, 1)))


@pytest.mark.parametrize(
    ("name", "own", "leaves"),
    [
        ("mopo", {"penalty": 0.0}, True),
        ("mopo", {"penalty": 10.0}, False),
        ("combo", {"beta": 0.0}, True),
        ("combo", {"beta": 1.0}, False),
        ("morel", {}, False),
    ],
)
def test_what_the_model_promises_beyond_the_log_does_not_lead_there(
    name: str, own: dict[str, Any], leaves: bool
) -> None:
    agent = trained(name, logged_half(), model=250, policy=400, rollout_steps=1, **own)
    action = mean_action(agent)
    assert action > 0.6 if leaves else action < 0.3, action


@every_agent
def test_with_a_penalty_on_one_way_it_takes_the_other(name: str) -> None:
    """Rewards are |a|, and more to the right, where it is dearer than that."""
    n = 600
    actions = 2.0 * torch.rand(n, 1, generator=seeded(2)) - 1.0
    here = torch.zeros(n, 1)
    rewards = torch.where(actions > 0.0, 1.3, -1.0)[:, 0] * actions[:, 0]
    log = steps_of(here, actions, rewards, here, terminated=torch.ones(n))
    steering = Steering((Penalty(risk_of_going_right, torch.tensor(5.0)),))
    agent = trained(name, log, model=100, policy=300, steering=steering, **MILD[name])
    assert mean_action(agent) < -0.5


def risk_of_going_right(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
    return torch.sigmoid(4.0 * actions[:, 0])


# --- what learns when ---


def state_of(agent: Any) -> dict[str, Tensor]:
    return collect_state({**agent.parts(), "generator": agent.model.generator})


def moved(agent: Any, batch: Batch) -> set[str]:
    before = state_of(agent)
    agent.update(batch, NOTHING_ELSE)
    after = state_of(agent)
    return {k.partition("/")[0] for k, v in after.items() if not torch.equal(v, before[k])}


@every_agent
def test_first_the_model_learns_and_then_the_policy(name: str) -> None:
    agent, batch = agent_of(name, random_steps(), steps=6), random_steps(seed=1)
    model = {"dynamics", "dynamics_optimizer", "model_updates", "actor", "imitation_optimizer"}
    values = {"critics", "target_critics", "critic_optimizer", "actor", "actor_optimizer"}
    values |= {"log_temperature", "temperature_optimizer"}
    for i in range(6):
        assert agent.model.learning == (i < 3)
        found = moved(agent, batch) - {"generator", "elites", "threshold"}
        assert found == (model if i < 3 else values)
    assert torch.equal(agent.model.elites, agent.model.best_members())


@every_agent
def test_every_trained_tensor_is_in_one_optimiser_beside_the_imitation_s(name: str) -> None:
    parts = agent_of(name, random_steps()).parts()
    del parts["imitation_optimizer"]
    held = [id(p) for x in parts.values() if isinstance(x, Adam) for p in x.parameters]
    modules = [x for x in parts.values() if isinstance(x, nn.Module)]
    trained = [id(p) for module in modules for p in module.parameters() if p.requires_grad]
    assert sorted(held) == sorted([*trained, id(parts["log_temperature"])])


@every_agent
def test_state_round_trip_continues_bitwise_across_the_phases(name: str) -> None:
    """Stored after one update of four of the model, and after one of four of the policy."""
    for stored in (1, 5):
        agent = agent_of(name, random_steps(), steps=8)
        for i in range(stored):
            agent.update(random_steps(seed=i), NOTHING_ELSE)
        torch.manual_seed(stored)  # which nobody may draw from
        other = agent_of(name, random_steps(), seed=1, steps=8)
        other.update(random_steps(seed=9), NOTHING_ELSE)
        parts = {**other.parts(), "generator": other.model.generator}
        restore_state(parts, state_of(agent))
        for i in range(stored, 8):
            one = agent.update(random_steps(seed=i), NOTHING_ELSE)
            two = other.update(random_steps(seed=i), NOTHING_ELSE)
            assert one.keys() == two.keys()
        after, same = state_of(agent), state_of(other)
        assert all(torch.equal(after[key], same[key]) for key in after)


@every_agent
def test_losses_change_nothing(name: str) -> None:
    agent, batch = agent_of(name, random_steps()), random_steps(seed=1)
    before, copy = state_of(agent), Batch(*(field.clone() for field in batch.tensors))
    agent.model.dynamics.loss(batch)
    agent.model.imitation_loss(batch)
    if name == "combo":
        agent.critic_loss(batch, 8, torch.zeros(64, 1))
    after = state_of(agent)
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert all(torch.equal(a, b) for a, b in zip(batch.tensors, copy.tensors, strict=True))


@every_agent
def test_discrete_actions_are_refused(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf'"{name}" trains .* are numbers, .* are discrete\. Take'
    ):
        kind_of(name, discrete=True)


@every_agent
def test_its_commands_run(name: str, tiny_dataset: Path, tmp_path: Path) -> None:
    small = ["alignment_steps=5", "log_every=10", "batch_size=32", "networks.critics=3"]
    small += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]
    small += ["fallback.steps=0", f"agents.{name}.model.hidden=[16,16]"]
    config = commands.pretrain_config(
        agent=name, dataset=str(tiny_dataset), steps=20, overrides=small
    )
    plan = commands.plan_pretrain(config, say=lambda _: None)
    run = commands.pretrain_run(plan, name="offline", runs=tmp_path, say=lambda _: None)
    tensors = run.load_checkpoint().tensors
    assert int(tensors["agent.model_updates/value"]) == 4  # a fifth
    assert commands.evaluate_run(run.path, episodes=2, say=lambda _: None)["episodes"] == 2
