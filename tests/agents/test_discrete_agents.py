"""Agents of discrete actions that learn Q: their losses by hand, and what each is known to do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from safe_offrl import commands
from safe_offrl.agents import AGENTS, kind_of
from safe_offrl.agents.bcq_discrete import DiscreteBCQ, DiscreteBCQConfig
from safe_offrl.agents.dqn import DQN, REM, DQNConfig
from safe_offrl.agents.greedy import GreedyActor, Mask, of_every_action
from safe_offrl.agents.qrdqn import QRDQN, QRDQNConfig, quantile_huber_loss
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.commands import offline_plan
from safe_offrl.compute.descent import EAGER
from safe_offrl.errors import ConfigError
from safe_offrl.policies.categorical import CATEGORICAL, Categorical
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks
from safe_offrl.types import Batch
from tests.agents.setups import setup_of
from tests.agents.test_agents import (
    TableNetworks,
    discrete_batch,
    discrete_networks,
    one_hot,
    seeded,
    transitions,
)

NOTHING_ELSE = Steering()
THEIRS = ["dqn", "rem", "qrdqn", "bcq_discrete", "spibb", "soft_spibb"]
WITH_Q = THEIRS[:4]

# Online heads and target heads of one state with three actions.
HEADS = [[1.0, 2.0, 0.0], [5.0, -1.0, 1.0]]
TARGET_HEADS: list[tuple[float, ...]] = [(1.0, 5.0, 3.0), (4.0, 2.0, 9.0)]


def tables(heads: list[list[float]], targets: list[tuple[float, ...]]) -> TableNetworks:
    networks = discrete_networks((0.5, 0.3, 0.2), (0.0, 0.0, 0.0), targets)
    networks.table = torch.tensor(heads)
    return networks


def constant_(network: Any, outputs: list[float]) -> None:
    """Make a network of one linear layer answer this everywhere."""
    *_, bias = network.parameters()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        bias.copy_(torch.tensor(outputs))


def ended(batch: Batch) -> Batch:
    return batch._replace(terminated=torch.ones(1))


# --- who takes what ---


@pytest.mark.parametrize("name", THEIRS)
def test_continuous_actions_are_refused_before_any_work(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kind_of(name, discrete=True) is CATEGORICAL
    monkeypatch.setattr(offline_plan, "default_dataset", lambda *_, **__: pytest.fail("work"))
    config = commands.pretrain_config(env="PointHazard-v0", agent=name)
    words = rf'^The agent "{name}" trains .* are discrete, .* are numbers\. Take another agent\.$'
    with pytest.raises(ConfigError, match=words):
        commands.plan_pretrain(config, say=lambda _: None)


# --- the actor ---


def test_q_of_every_action_is_in_the_actions_order() -> None:
    networks = Networks(2, 3, NetworkConfig((4,), (4,), 2), seeded(), CATEGORICAL)
    observations = torch.randn(5, 2, generator=seeded(1))
    found = of_every_action(networks.q, observations, 3)
    assert found.shape == (2, 3, 5)
    for k in range(3):
        q = networks.q(observations, one_hot(torch.full((5,), k), 3))
        torch.testing.assert_close(found[:, k], q)


def greedy_of(
    probabilities: tuple[float, ...],
    q: tuple[float, ...],
    temperature: float,
    mask: Mask | None = None,
) -> GreedyActor:
    networks = discrete_networks(probabilities, q, [])
    return GreedyActor(networks.actor, networks.q, temperature, 1e-2, EAGER, mask)


def allowing(*actions: int) -> Mask:
    return lambda observations: one_hot(torch.tensor(actions), 3).sum(0).bool()[None]


RISKS = torch.tensor([0.1, 0.0, 0.9])
PENALTY = Penalty(lambda o, t, a: a @ RISKS, torch.tensor(2.0))


def test_the_actor_s_loss_by_hand() -> None:
    """E|Q| = .5 + .6 + .8 = 1.9, E Q = .5 - .6 + .8 = .7, E risk = .05 + .18 = .23."""
    greedy = greedy_of((0.5, 0.3, 0.2), (1.0, -2.0, 4.0), 0.4)
    loss, entropy = greedy.loss(discrete_batch(0), (PENALTY,))
    negative_entropy = sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    assert loss.item() == pytest.approx(-0.7 / 1.9 + 2.0 * 0.23 + 0.4 * negative_entropy)
    assert entropy.item() == pytest.approx(-negative_entropy)


def test_a_masked_actor_s_loss_by_hand() -> None:
    """Without action 1 it is (5/7, 0, 2/7), of a mass of .7: E Q = E|Q| = 13/7."""
    greedy = greedy_of((0.5, 0.3, 0.2), (1.0, -2.0, 4.0), 0.4, allowing(0, 2))
    loss, entropy = greedy.loss(discrete_batch(0), (PENALTY,))
    negative_entropy = sum(p * math.log(p) for p in (5.0 / 7.0, 2.0 / 7.0))
    expected = -1.0 + 2.0 * (0.5 + 1.8) / 7.0 + 0.4 * negative_entropy - math.log(0.7)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert entropy.item() == pytest.approx(-negative_entropy)


def gradient_at(probabilities: Tensor, mask: Mask | None = None) -> float:
    """Of the loss over the logits, for Q = (1, 1, -1), whose |Q| is 1 under any policy."""
    greedy = greedy_of(tuple(probabilities.tolist()), (1.0, 1.0, -1.0), 0.5, mask)
    loss, _ = greedy.loss(discrete_batch(0), (PENALTY,))
    *_, bias = greedy.actor.parameters()
    return torch.autograd.grad(loss, bias)[0].abs().max().item()


def test_its_optimum_is_softmax_of_q_less_what_limits_ask_over_temperature() -> None:
    best = ((torch.tensor([1.0, 1.0, -1.0]) - 2.0 * RISKS) / 0.5).exp()
    assert gradient_at(best / best.sum()) < 1e-6
    assert gradient_at(torch.tensor([0.3, 0.3, 0.4])) > 0.01
    # Masked, the same on what is allowed.
    inside = best * torch.tensor([1.0, 1e-12, 1.0])
    assert gradient_at(inside / inside.sum(), allowing(0, 2)) < 1e-6
    assert gradient_at(best / best.sum(), allowing(0, 2)) > 0.01


def learnt(greedy: GreedyActor, penalties: tuple[Penalty, ...] = (), steps: int = 400) -> Tensor:
    """Probabilities [A] after some steps."""
    for _ in range(steps):
        greedy.update(discrete_batch(0), Steering(penalties))
    return probabilities_of(greedy.actor, torch.zeros(1, 1))[0]


def probabilities_of(actor: Actor, observations: Tensor) -> Tensor:
    with torch.no_grad():
        policy = actor(observations)
    assert isinstance(policy, Categorical)
    return policy.log_probs.exp()


def test_the_colder_the_nearer_to_the_argmax() -> None:
    """Q/|Q| of (1.1, 1, .9) differ by about .1: e^1 at .1, e^5 at .02."""
    even = (1.0 / 3.0,) * 3
    warm, cold = (learnt(greedy_of(even, (1.1, 1.0, 0.9), t)) for t in (0.1, 0.02))
    assert warm.argmax() == cold.argmax() == 0
    torch.testing.assert_close(
        warm, torch.softmax(torch.tensor([1.0, 0.0, -1.0]), 0), atol=0.03, rtol=0.0
    )
    assert cold[0] > 0.95


def test_nothing_can_pay_for_an_action_outside_the_mask() -> None:
    """Action 2 has a hundred times the Q and none of the risk."""
    safe = Penalty(lambda o, t, a: a @ torch.tensor([1.0, 1.0, 0.0]), torch.tensor(50.0))
    greedy = greedy_of((0.1, 0.1, 0.8), (1.0, 0.9, 100.0), 0.02, allowing(0, 1))
    found = learnt(greedy, (safe,), 600)
    assert found[2] < 0.05
    assert found[0] > found[1]


# --- Ensemble-DQN and REM ---


def dqn_of(networks: Networks, *, mixed: bool = False, **settings: Any) -> DQN:
    return DQN(setup_of(networks, seeded()), DQNConfig(**settings), mixed=mixed)


def test_each_head_learns_from_its_own_target() -> None:
    """Targets 1 + .5 x 5 and 1 + .5 x 9; Q 1 and 5: Huber's 2.5 - .5 and .5 x .5^2."""
    dqn = dqn_of(tables(HEADS, TARGET_HEADS), discount=0.5)
    (loss,) = dqn.critic_loss(discrete_batch(0), torch.eye(2))
    assert loss.item() == pytest.approx(2.0 + 0.125)
    # Where it ends, both learn the reward, 1.
    (loss,) = dqn.critic_loss(ended(discrete_batch(0)), torch.eye(2))
    assert loss.item() == pytest.approx(0.0 + 3.5)


def test_rem_mixes_heads_and_target_heads_alike() -> None:
    """Mixed by (1/4, 3/4), Q' is (3.25, 2.75, 7.5), whose best is below the mixture of the best, 8.

    The target is 1 + .5 x 7.5 = 4.75, Q is 4.
    """
    rem = dqn_of(tables(HEADS, TARGET_HEADS), mixed=True, discount=0.5)
    alpha = torch.tensor([[0.25, 0.75]])
    (loss,) = rem.critic_loss(discrete_batch(0), alpha)
    assert loss.item() == pytest.approx(0.5 * 0.75**2)
    (loss,) = rem.critic_loss(ended(discrete_batch(0)), alpha)
    assert loss.item() == pytest.approx(3.0 - 0.5)


def mixtures_of(agent: DQN, batches: int, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was learnt with, batch by batch."""
    seen: list[Tensor] = []
    loss_of = agent._descend_critics

    def spy(batch: Batch, mixtures: Tensor) -> Any:
        seen.append(mixtures)
        return loss_of(batch, mixtures)

    monkeypatch.setattr(agent, "_descend_critics", spy)
    for _ in range(batches):
        agent.update(discrete_batch(0), NOTHING_ELSE)
    return seen


def small_networks(members: int = 4) -> Networks:
    return Networks(1, 3, NetworkConfig((8,), (8,), members), seeded(), CATEGORICAL)


def test_rem_draws_weights_of_a_mixture_anew_for_each_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rem = REM(setup_of(small_networks(), seeded()), DQNConfig())
    seen = mixtures_of(rem.dqn, 20, monkeypatch)
    assert all(alpha.shape == (1, 4) for alpha in seen)
    assert all(bool((alpha >= 0.0).all()) for alpha in seen)
    torch.testing.assert_close(torch.cat(seen).sum(1), torch.ones(20))
    assert len({tuple(alpha.flatten().tolist()) for alpha in seen}) == 20


def test_rem_s_weights_are_uniform_draws_over_their_sum() -> None:
    """u / (u + v) < 1/4 where u < v / 3: in a sixth of draws, not in a fourth."""
    rem = dqn_of(small_networks(2), mixed=True)
    shares = torch.cat([rem.mixtures() for _ in range(4000)])[:, 0]
    assert (shares < 0.25).float().mean().item() == pytest.approx(1.0 / 6.0, abs=0.02)


def test_dqn_s_heads_learn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dqn = dqn_of(small_networks())
    assert all(torch.equal(x, torch.eye(4)) for x in mixtures_of(dqn, 2, monkeypatch))


@pytest.mark.parametrize("agent", [DQN, DiscreteBCQ])
def test_the_mean_of_the_heads_acts(agent: Any) -> None:
    """The mean of HEADS is (3, .5, .5): neither the least nor the first, which prefer others."""
    networks = tables([[1.0, 2.0, 0.0], [5.0, -1.0, 1.0]], [])
    found = agent(setup_of(networks, seeded()), agent.Config()).mean_q(
        torch.zeros(3, 1), torch.eye(3)
    )
    assert found.tolist() == [[3.0, 0.5, 0.5]]


# --- QR-DQN ---


def test_quantile_huber_loss_by_hand() -> None:
    """tau = 1/4 and 3/4, quantiles 2 and 2.5, targets 1 and 3.

    2: u = -1 and 1 cost .75 x .5 and .25 x .5; 2.5: u = -1.5 and .5 cost .25 x 1 and .75 x .125.
    """
    loss = quantile_huber_loss(torch.tensor([[2.0, 2.5]]), torch.tensor([[1.0, 3.0]]))
    assert loss.tolist() == pytest.approx([(0.375 + 0.125) / 2.0 + (0.25 + 0.09375) / 2.0])


def test_a_high_quantile_pays_for_being_low_and_a_low_one_for_being_high() -> None:
    """At tau = 7/8 a target above costs seven times what one below does, at 1/8 a seventh."""
    targets = torch.zeros(2, 1)
    alone = torch.tensor([[0.0, 0.0, 0.0, -0.5], [0.0, 0.0, 0.0, 0.5]])
    low, high = quantile_huber_loss(alone, targets).tolist()
    assert low / high == pytest.approx(7.0)
    low, high = quantile_huber_loss(alone.flip(1), targets).tolist()
    assert low / high == pytest.approx(1.0 / 7.0)


def qrdqn_of(**settings: Any) -> QRDQN:
    """One state, two actions, networks of one layer."""
    networks = Networks(1, 2, NetworkConfig((), (), 2), seeded(), CATEGORICAL)
    agent = QRDQN(setup_of(networks, seeded()), QRDQNConfig(quantiles=2, **settings))
    constant_(agent.quantiles, [0.0, 9.0, 2.0, 2.5])
    # The best by its mean is the first; the second has the best low quantile.
    constant_(agent.target_quantiles, [0.0, 4.0, 1.0, 2.0])
    return agent


def test_the_target_is_the_distribution_of_the_best_mean() -> None:
    """Targets 1 + .5 (0, 4) = (1, 3) for the logged action's (2, 2.5): as by hand above."""
    agent = qrdqn_of(discount=0.5)
    (loss,) = agent.quantile_loss(discrete_batch(1, 2))
    assert loss.item() == pytest.approx(0.25 + 0.171875)
    # Where it ends both targets are 1: u = -1 and -1.5 cost .75 x .5 and .25 x 1.
    (loss,) = agent.quantile_loss(ended(discrete_batch(1, 2)))
    assert loss.item() == pytest.approx(0.375 + 0.25)


def test_critics_learn_the_mean_of_the_quantiles_at_every_action() -> None:
    """Means 4.5 and 2.25, critics 4 and 3 everywhere: each action's squared error, averaged."""
    agent = qrdqn_of()
    constant_(agent.networks.critics, [[[4.0]], [[3.0]]])  # type: ignore[list-item]
    (loss,) = agent.critic_loss(discrete_batch(0, 2))
    assert loss.item() == pytest.approx((0.5**2 + 1.75**2 + 1.5**2 + 0.75**2) / 2.0)
    assert agent.mean_q(torch.zeros(2, 1), torch.eye(2)).tolist() == [[4.5, 2.25]]


def test_target_quantiles_follow_by_tau() -> None:
    agent = qrdqn_of(tau=0.25)
    *_, before = (x.clone() for x in agent.target_quantiles.parameters())
    agent.update_critics(discrete_batch(1, 2))
    *_, now = agent.target_quantiles.parameters()
    *_, learnt = (x.detach() for x in agent.quantiles.parameters())
    torch.testing.assert_close(now, before + 0.25 * (learnt - before))


def test_quantiles_are_those_of_a_known_distribution() -> None:
    """Rewards of -4 or 4, as often: half of the quantiles near each, their mean 0.

    Huber's loss draws them to the middle by (2 tau - 1) / 2 and less, where a spread is 8.
    """
    networks = Networks(1, 2, NetworkConfig((8,), (16,), 2), seeded(), CATEGORICAL)
    config = QRDQNConfig(learning_rate=4e-2, quantiles=8)
    agent = QRDQN(setup_of(networks, seeded()), config)
    rewards = torch.tensor([-4.0, 4.0]).repeat(16)
    zeros = torch.zeros(32, 1)
    actions = one_hot(torch.zeros(32, dtype=torch.long), 2)
    batch = transitions(zeros, actions, rewards, zeros, torch.ones(32))
    for _ in range(500):
        agent.update_critics(batch)
    with torch.no_grad():
        found = agent.by_action(agent.quantiles(zeros[:1]))[0, 0]
    assert found[:4].tolist() == pytest.approx([-4.0] * 4, abs=1.0)
    assert found[4:].tolist() == pytest.approx([4.0] * 4, abs=1.0)
    assert found[0] < found[7] - 7.0


# --- discrete BCQ ---


def bcq_of(networks: Networks, behaviour: list[float], **settings: Any) -> DiscreteBCQ:
    agent = DiscreteBCQ(setup_of(networks, seeded()), DiscreteBCQConfig(**settings))
    constant_(agent.behaviour, [math.log(p) for p in behaviour])
    return agent


def test_an_action_is_likely_by_its_share_of_the_likeliest() -> None:
    """(.5, .155, .145) are shares of 1, .31 and .29, though .155 itself is below .3."""
    networks = tables(HEADS, TARGET_HEADS)
    for threshold, expected in ((0.3, [True, True, False]), (0.28, [True] * 3)):
        agent = bcq_of(networks, [0.5, 0.155, 0.145], threshold=threshold)
        assert agent.likely(torch.zeros(1, 1)).tolist() == [expected]


def test_bcq_s_target_is_double_and_among_likely_actions() -> None:
    """The critics' mean is (.5, 2.5, 9), and action 2 is unlikely: Q' of action 1, 5 and 2.

    The target critics would choose action 0. Targets 3.5 and 2, Q 1 and 0: 2.5 - .5 and 2 - .5.
    """
    targets: list[tuple[float, ...]] = [(8.0, 5.0, 7.0), (9.0, 2.0, 7.0)]
    networks = tables([[1.0, 2.0, 9.0], [0.0, 3.0, 9.0]], targets)
    agent = bcq_of(networks, [0.5, 0.4, 0.1], discount=0.5)
    (loss,) = agent.critic_loss(discrete_batch(0))
    assert loss.item() == pytest.approx(2.0 + 1.5)
    (loss,) = agent.critic_loss(ended(discrete_batch(0)))
    assert loss.item() == pytest.approx(0.0 + 0.5)
    # With every action likely it is action 2's: targets 4.5 and 4.5.
    (loss,) = bcq_of(networks, [0.5, 0.4, 0.1], discount=0.5, threshold=0.0).critic_loss(
        discrete_batch(0)
    )
    assert loss.item() == pytest.approx(3.0 + 4.0)


def test_the_behaviour_model_s_loss_by_hand() -> None:
    agent = bcq_of(tables(HEADS, TARGET_HEADS), [0.5, 0.4, 0.1])
    assert agent.behaviour_loss(discrete_batch(1))[0].item() == pytest.approx(-math.log(0.4))


def trained(
    name: str, batch: Batch, penalties: tuple[Penalty, ...] = (), steps: int = 250
) -> Tensor:
    """Probabilities [3] in the first state after some steps, each on all of a batch."""
    sizes = NetworkConfig((16,), (16,), 3)
    networks = Networks(batch.observations.shape[1], 3, sizes, seeded(), CATEGORICAL)
    agent: Any = AGENTS[name]
    config = agent.Config(learning_rate=1e-2, tau=0.05)
    learner = agent(setup_of(networks, seeded()), config)
    for _ in range(steps):
        learner.update(batch, Steering(penalties))
    return probabilities_of(networks.actor, batch.observations[:1])[0]


def bandit(counts: tuple[int, int, int], rewards: tuple[float, float, float]) -> Batch:
    """One step, each action logged so often, its reward the same each time."""
    chosen = torch.arange(3).repeat_interleave(torch.tensor(counts))
    here = torch.zeros(len(chosen), 1)
    paid = torch.tensor(rewards)[chosen]
    return transitions(here, one_hot(chosen, 3), paid, here, torch.ones(len(chosen)))


def test_bcq_leaves_the_unlikely_best_action_and_dqn_takes_it() -> None:
    batch = bandit((40, 40, 4), (0.0, 0.5, 1.0))
    assert trained("bcq_discrete", batch)[1] > 0.9
    assert trained("dqn", batch)[2] > 0.9


@pytest.mark.parametrize("name", WITH_Q)
def test_with_a_risk_on_the_better_way_it_takes_the_other(name: str) -> None:
    batch = bandit((20, 20, 20), (1.0, 0.8, 0.0))
    assert trained(name, batch)[0] > 0.9
    risky = Penalty(lambda o, t, a: a[:, 0], torch.tensor(2.0))
    assert trained(name, batch, (risky,))[1] > 0.9
