"""BEAR: losses by hand, before tanh; the multiplier, its range, and what it holds."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from safe_offrl.agents.bear import BEAR
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.compute.state import seeded
from safe_offrl.policies.gaussian import Gaussian, Mixture
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.types import Batch
from tests.agents.small_problems import agent_of, bandit, drawn_from, trained

LINEAR = NetworkConfig((), (), 2)
GIVEN = bandit(torch.tensor([[0.2], [0.5]]), torch.zeros(2))


def made(**settings: Any) -> tuple[BEAR, Networks]:
    """Whose policy is tanh(.3 + .5 z) everywhere."""
    agent, networks = agent_of("bear", GIVEN, sizes=LINEAR, **settings)
    assert isinstance(agent, BEAR)
    with torch.no_grad():
        weight, bias = networks.actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor([0.3, math.atanh((math.log(0.5) + 5.0) / 3.5 - 1.0)]))
    return agent, networks


def kernel(x: float, y: float) -> float:
    return math.exp(-abs(x - y) / 4.0)  # sigma = 2


def by_hand(first: list[float], second: list[float]) -> float:
    def mean(a: list[float], b: list[float]) -> float:
        return sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))

    squared = mean(first, first) + mean(second, second) - 2.0 * mean(first, second)
    return math.sqrt(squared + 1e-6)


def test_the_actor_s_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples of each, far out, where tanh would make them alike; lambda 3, multiplier 2."""
    agent, networks = made(sigma=2.0)
    parts = Gaussian(torch.tensor([[[-2.0], [2.5]]] * 2), torch.zeros(2, 2, 1))
    mixture = Mixture(torch.tensor([[0.5, 0.5]] * 2).log(), parts)
    monkeypatch.setattr(agent.behaviour, "model", lambda observations: mixture)

    def q(observations: Tensor, actions: Tensor) -> Tensor:
        return torch.stack([4.0 * actions[:, 0] + 1.0, 4.0 * actions[:, 0]])

    monkeypatch.setattr(networks, "q", q)
    with torch.no_grad():
        agent.log_multiplier.fill_(math.log(2.0))
    noise = torch.tensor([[[1.0], [-4.0]], [[6.0], [2.0]]])
    logged_noise = torch.tensor([[[0.5], [0.0]], [[-1.0], [1.5]], [[0.0], [2.0]], [[0.2], [0.0]]])
    uniform = torch.tensor([[0.1, 0.9], [0.9, 0.2], [0.9, 0.8], [0.4, 0.1]])
    sampled = [[0.3 + 0.5 * z for z in at] for at in ((1.0, 6.0), (-4.0, 2.0))]
    logged = [[-2.0 + 0.5, 2.5 - 1.0], [2.5 + 0.0, -2.0 + 1.5]]
    again = [[2.5, -2.0 + 0.2], [2.5 + 2.0, -2.0]]
    sets = zip(sampled, logged, again, strict=True)
    distances = [by_hand(x, y) - by_hand(y, z) for x, y, z in sets]
    actions = [math.tanh(x[0]) for x in sampled]  # of the first sample
    size = 4.0 * sum(map(abs, actions)) / 2.0
    objective = sum(-4.0 * a / size + 3.0 * a**2 for a in actions) / 2.0
    penalty = Penalty(lambda o, t, a: a[:, 0].square(), torch.tensor(3.0))
    drawn = noise, logged_noise, uniform
    loss, distance = agent.actor_loss(GIVEN.transitions, *drawn, (penalty,))
    assert distance.item() == pytest.approx(sum(distances) / 2.0, rel=1e-4)
    assert loss.item() == pytest.approx(objective + 2.0 * sum(distances) / 2.0, rel=1e-4)


def test_the_target_by_hand() -> None:
    """Q'_1 = a, Q'_2 = 1 - 2 a: the best of three actions of .75 min + .25 max."""
    agent, networks = made()
    with torch.no_grad():
        weight, bias = networks.target_critics.parameters()
        weight.copy_(torch.tensor([[[0.0], [1.0]], [[0.0], [-2.0]]]))
        bias.copy_(torch.tensor([0.0, 1.0]).view(2, 1, 1))
    noise = torch.tensor([[[-3.0], [1.0]], [[0.0], [0.0]], [[4.0], [5.0]]])
    values = []
    for at in ((-3.0, 0.0, 4.0), (1.0, 0.0, 5.0)):
        actions = [math.tanh(0.3 + 0.5 * z) for z in at]
        pairs = [sorted((a, 1.0 - 2.0 * a)) for a in actions]
        values.append(max(0.75 * least + 0.25 * most for least, most in pairs))
    found = agent.next_value(GIVEN.transitions, noise)
    assert found.tolist() == pytest.approx(values, rel=1e-4)


def test_how_many_actions_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, _ = made(samples=5)
    seen: list[tuple[int, ...]] = []

    def watched(function: Any) -> Any:
        def call(batch: Batch, *given: Any) -> Any:
            seen.extend(tuple(x.shape) for x in given if isinstance(x, Tensor))
            return function(batch, *given)

        return call

    monkeypatch.setattr(agent.values, "_next_value", watched(agent.next_value))
    monkeypatch.setattr(agent, "_descend_actor", watched(agent._descend_actor))
    agent.update(GIVEN.transitions, Steering())
    assert seen == [(10, 2, 1), (5, 2, 1), (10, 2, 1), (10, 2)]


def test_the_dual_step_by_hand() -> None:
    """-multiplier (.08 - .05), and it rises where the policy is too far away, else falls."""
    agent, _ = made(threshold=0.05)
    for log_multiplier, multiplier in ((0.0, 1.0), (math.log(2.0), 2.0)):
        with torch.no_grad():
            agent.log_multiplier.fill_(log_multiplier)
        (loss,) = agent.multiplier_loss(torch.tensor(0.08))
        assert loss.item() == pytest.approx(-0.03 * multiplier)
    for threshold, sign in ((-1.0, 1.0), (5.0, -1.0)):
        agent, _ = made(threshold=threshold, multiplier_learning_rate=0.5)
        metrics = agent.update(GIVEN.transitions, Steering())
        # Adam's first step is its learning rate.
        assert agent.log_multiplier.item() == pytest.approx(0.5 * sign, rel=1e-3)
        assert metrics["actor/mmd_multiplier"].item() == pytest.approx(math.exp(0.5 * sign))


@pytest.mark.parametrize(("threshold", "bound"), [(-1.0, 10.0), (5.0, -5.0)])
def test_the_multiplier_s_logarithm_stays_in_its_range(threshold: float, bound: float) -> None:
    agent, _ = made(threshold=threshold, multiplier_learning_rate=50.0)
    for _ in range(2):
        agent.update(GIVEN.transitions, Steering())
        assert agent.log_multiplier.item() == bound


def test_the_log_s_behaviour_learns_by_likelihood_alone() -> None:
    agent, _ = made()
    before = [p.detach().clone() for p in agent.behaviour.model.network.parameters()]
    noise = torch.randn(3, 2, 1, generator=seeded(0))
    agent._descend_actor(GIVEN.transitions, noise, noise.repeat(2, 1, 1), torch.rand(6, 2), ())
    after = list(agent.behaviour.model.network.parameters())
    assert all(map(torch.equal, before, after))


def test_the_constraint_holds_the_policy_where_its_mmd_is_the_threshold() -> None:
    """The log does 0, the critics are for going right, and without the constraint it goes there.

    Of two points m apart before tanh the MMD is sqrt(2 - 2 exp(-m / 40)), .1 at m = .2005: there it
    stops, about tanh(.2) = .197, and the multiplier swings around where that is best.
    """
    given = bandit(0.02 * torch.randn(400, 1, generator=seeded(2)), torch.zeros(400))
    settings = {"samples": 4, "multiplier_learning_rate": 0.03}
    found = {}
    for threshold in (0.1, 5.0):
        networks, metrics = trained(
            "bear", given, 700, q=lambda a: 1.0 + 5.0 * a[:, 0], threshold=threshold, **settings
        )
        found[threshold] = drawn_from(networks).mean().item(), metrics["actor/mmd_to_log"]
    (held, mmd), (free, _) = found[0.1], found[5.0]
    assert mmd == pytest.approx(0.1, abs=0.02)
    assert held == pytest.approx(0.197, abs=0.13)
    assert free > 0.9


def test_the_behaviour_itself_is_no_distance_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that is the behaviour, however wide: the published threshold can be kept."""
    agent, _ = made(samples=10)
    batch = Batch(*(x[:1].expand(2000, *x.shape[1:]) for x in GIVEN.transitions.tensors))
    parts = Gaussian(torch.full((2000, 1, 1), 0.3), torch.full((2000, 1, 1), math.log(0.5)))
    same = Mixture(torch.zeros(2000, 1), parts)
    monkeypatch.setattr(agent.behaviour, "model", lambda observations: same)
    g = seeded(3)
    drawn = torch.randn(10, 2000, 1, generator=g), torch.randn(20, 2000, 1, generator=g)
    _, distance = agent.actor_loss(batch, *drawn, torch.rand(20, 2000, generator=g), ())
    assert distance.item() == pytest.approx(0.0, abs=2e-3)
