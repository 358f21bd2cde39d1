"""BCQ with continuous actions: its losses by hand, and two ways past an obstacle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safe_offrl.agents.bcq import BCQ, BCQConfig
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.policies.proposals import PROPOSALS
from safe_offrl.types import Batch
from tests.agents.setups import setup_of
from tests.agents.test_idql import drawn_from, network_of, share, without_noise
from tests.agents.test_latent_steering import (
    BETWEEN,
    BOTH_WAYS,
    NOTHING_ELSE,
    SMALL,
    batch_of,
    bits,
    linear_,
    seeded,
)

LINEAR = NetworkConfig((), (4,), 2)


def agent_of(sizes: NetworkConfig, **settings: Any) -> BCQ:
    """Of one number of an observation and one of an action."""
    generator = seeded()
    networks = Networks(1, 1, sizes, generator, PROPOSALS)
    return BCQ(setup_of(networks, generator), BCQConfig(**settings))


# --- losses by hand ---


def set_encoder(encoder: nn.Module, mean: float, log_std: float) -> None:
    """The code of action a: mean a and this log std."""
    (layer,) = (x for x in encoder.modules() if isinstance(x, nn.Linear))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, mean], [0.0, 0.0]]))
        layer.bias.copy_(torch.tensor([0.0, log_std]))


@pytest.mark.parametrize(("said", "log_std"), [(-0.3, -0.3), (-9.0, -4.0)])
def test_the_autoencoder_s_loss_is_by_hand(said: float, log_std: float) -> None:
    """Of a = .6 the code is N(.9, std), its draw at noise -.5 is decoded to tanh(2 z)."""
    agent = agent_of(LINEAR)
    set_encoder(agent.values.encoder, 1.5, said)
    linear_(agent.values.decoder, [0.0, 2.0], 0.0)
    std = math.exp(log_std)
    error = math.tanh(2.0 * (0.9 - 0.5 * std)) - 0.6
    divergence = -log_std + 0.5 * (std**2 + 0.9**2) - 0.5
    batch = batch_of(torch.tensor([[0.6]]), torch.zeros(1))
    (loss,) = agent.values.autoencoder_loss(batch, torch.tensor([[-0.5]]))
    assert loss.item() == pytest.approx(error**2 + 0.25 * divergence, rel=1e-5)


def test_what_a_dimension_of_a_code_costs_does_not_depend_on_their_number() -> None:
    """Mean over A, of errors and of divergences."""
    generator = seeded()
    agent = BCQ(setup_of(Networks(1, 2, LINEAR, generator, PROPOSALS), generator), BCQConfig())
    for net in (agent.values.encoder, agent.values.decoder):
        for parameter in net.parameters():
            nn.init.zeros_(parameter)
    with torch.no_grad():
        list(agent.values.encoder.parameters())[1].copy_(torch.tensor([1.0, 0.5, 0.0, 0.0]))
    batch = batch_of(torch.tensor([[0.6, -0.2]]), torch.zeros(1))
    (loss,) = agent.values.autoencoder_loss(batch, torch.zeros(1, 2))
    expected = (0.36 + 0.04) / 2.0 + 0.25 * (0.5 + 0.125) / 2.0
    assert loss.item() == pytest.approx(expected)


def proposing_by_hand(agent: BCQ, moves: float) -> None:
    """tanh(2 z + .4 s) of a code z within .5, moved by .05 tanh(``moves``)."""
    linear_(agent.values.decoder, [0.4, 2.0], 0.0)
    linear_(agent.values.perturbation, [0.0, 0.0], moves)
    linear_(agent.values.target_perturbation, [0.0, 0.0], moves)


def proposed(z: float, moves: float, observation: float = 0.0) -> float:
    decoded = math.tanh(2.0 * max(-0.5, min(0.5, z)) + 0.4 * observation)
    return max(-1.0, min(1.0, decoded + 0.05 * math.tanh(moves)))


def test_a_target_takes_the_best_of_a_mixture_of_least_and_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Q' is 4 a, a + 1 or -9 a at three actions; a state that ends does not bootstrap."""
    agent = agent_of(LINEAR, discount=0.9)
    proposing_by_hand(agent, -1.5)
    linear_(agent.values.perturbation, [0.0, 0.0], 9.0)  # the average counts, not this one
    networks = agent.values.networks
    monkeypatch.setattr(
        networks.target_critics,
        "over_actions",
        lambda states, a: torch.stack([4.0 * a[..., 0], a[..., 0] + 1.0, -9.0 * a[..., 0]]),
    )
    monkeypatch.setattr(networks, "q", lambda o, a: torch.zeros(3, len(a), requires_grad=True))
    codes, mixed = (0.1, -2.0, 0.4), []
    for code in codes:
        a = proposed(code, -1.5, observation=0.25)
        q = (4.0 * a, a + 1.0, -9.0 * a)
        mixed.append(0.75 * min(q) + 0.25 * max(q))
    assert mixed.index(max(mixed)) == 1  # of the code that is clipped
    batch = batch_of(torch.zeros(2, 1), torch.tensor([0.5, -1.0]))
    batch = batch._replace(
        terminated=torch.tensor([0.0, 1.0]), next_observations=torch.full((2, 1), 0.25)
    )
    (loss,) = agent.values.critic_loss(batch, torch.tensor(codes).view(3, 1, 1).expand(3, 2, 1))
    wanted = 3.0 * ((0.5 + 0.9 * max(mixed)) ** 2 + 1.0) / 2.0
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_a_target_has_ten_actions_to_choose_from(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, codes = agent_of(LINEAR), []
    descend = agent.values._descend_critics

    def watched(batch: Batch, z: Tensor) -> tuple[Tensor, ...]:
        codes.append(z.shape)
        return descend(batch, z)

    monkeypatch.setattr(agent.values, "_descend_critics", watched)
    agent.update(batch_of(torch.rand(6, 1), torch.rand(6)), NOTHING_ELSE)
    assert codes == [(10, 6, 1)]


def test_the_perturbation_s_loss_is_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Q = 4 a (the least of two), Q_C = a^2 and lambda 3."""
    agent = agent_of(LINEAR)
    proposing_by_hand(agent, 0.7)
    monkeypatch.setattr(
        agent.values.networks, "q", lambda o, a: torch.stack([4.0 * a[:, 0], 4.0 * a[:, 0] + 1.0])
    )
    actions = [proposed(z, 0.7) for z in (0.2, -3.0)]
    size = 2.0 * (abs(actions[0]) + abs(actions[1]))
    by_hand = sum(-4.0 * a / size + 3.0 * a**2 for a in actions) / 2.0
    penalty = Penalty(lambda o, t, a: a[:, 0].square(), torch.tensor(3.0))
    batch, z = batch_of(torch.zeros(2, 1), torch.zeros(2)), torch.tensor([[0.2], [-3.0]])
    (loss,) = agent.values.perturbation_loss(batch, z, (penalty,))
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_no_action_is_moved_by_more_than_phi_or_out_of_the_box() -> None:
    agent = agent_of(LINEAR)
    for bias in (-100.0, 0.0, 100.0):
        proposing_by_hand(agent, bias)
        linear_(agent.values.decoder, [0.0, 8.0], 0.0)
        moved = agent.values.actions(torch.zeros(3, 1), torch.tensor([[-0.4], [0.1], [0.4]]))
        expected = [
            max(-1.0, min(1.0, math.tanh(8.0 * z) + 0.05 * math.tanh(bias)))
            for z in (-0.4, 0.1, 0.4)
        ]
        assert moved.flatten().tolist() == pytest.approx(expected)


def test_who_learns_what() -> None:
    """Of the policy the generator is only taught, the scorer only chooses."""
    agent = agent_of(NetworkConfig((8,), (8,), 2), learning_rate=1e-2)
    values, batch = agent.values, batch_of(torch.rand(6, 1), torch.rand(6))
    network, noise = network_of(values.networks.actor), torch.randn(6, 1, generator=seeded())
    modules = (
        nn.ModuleList([values.encoder, values.decoder]),
        values.perturbation,
        values.networks.critics,
        network.generator,
        network.scorer,
    )

    def moved(step: Any, *arguments: object) -> list[int]:
        before = [bits(module) for module in modules]
        step(*arguments)
        return [i for i, module in enumerate(modules) if bits(module) != before[i]]

    assert moved(values._descend_autoencoder, batch, noise) == [0]
    assert moved(values._descend_perturbation, batch, noise, ()) == [1]
    assert moved(values._descend_critics, batch, noise.expand(10, 6, 1)) == [2]
    assert moved(agent.distillation.update, batch.observations, noise) == [3]
    assert moved(agent.choice.update, batch, NOTHING_ELSE, seeded()) == [4]
    average = bits(values.target_perturbation)
    assert moved(agent.update, batch, NOTHING_ELSE) == [0, 1, 2, 3, 4]
    assert bits(values.target_perturbation) != average


# --- two ways past an obstacle ---


def trained(way: float, steering: Steering = NOTHING_ELSE, **settings: Any) -> BCQ:
    agent = agent_of(SMALL, learning_rate=3e-3, tau=1e-2, **settings)
    for _ in range(500):
        agent.update(batch_of(BOTH_WAYS, way * BOTH_WAYS[:, 0]), steering)
    return agent


def test_near_the_log_it_goes_both_ways_and_less_between_than_a_gaussian() -> None:
    """A Gaussian has 30 % of its actions there, a flow less than 3 %, a decoder a tenth."""
    actions = drawn_from(trained(1.0, temperature=100.0).values.networks.actor)
    assert share(actions.abs() < BETWEEN) < 0.15
    assert share(actions < -BETWEEN) > 0.35
    assert share(actions > BETWEEN) > 0.35


@pytest.mark.parametrize("way", [-1.0, 1.0])
def test_steered_by_reward_it_takes_the_better_way(way: float) -> None:
    actor = trained(way).values.networks.actor
    actions = drawn_from(actor)
    assert share(actions.abs() < BETWEEN) < 0.03
    assert share(way * actions > BETWEEN) > 0.95
    assert actions.median().item() == pytest.approx(0.8 * way, abs=0.1)
    assert without_noise(actor) == pytest.approx(0.8 * way, abs=0.1)


def test_with_a_penalty_on_the_better_way_it_takes_the_other() -> None:
    """There, and where the obstacle is, an accident is nearly sure."""
    risk = Penalty(lambda o, t, a: torch.sigmoid(30.0 * (a[:, 0] + 0.5)), torch.tensor(4.0))
    actions = drawn_from(trained(1.0, Steering((risk,))).values.networks.actor)
    assert share(actions.abs() < BETWEEN) < 0.03
    assert share(actions < -BETWEEN) > 0.95
