"""bc, awr, awac and crr: weights by hand, two ways past an obstacle, risk, and the way online."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from safe_offrl import commands
from safe_offrl.agents import AGENTS, AgentConfigs, kind_of, online_agent
from safe_offrl.agents.aversion import Aversion, risk_averse
from safe_offrl.agents.awac import AWAC, AWACConfig, OnlineAWAC
from safe_offrl.agents.awr import AWR, AWRConfig
from safe_offrl.agents.bc import BC, BCConfig
from safe_offrl.agents.crr import CRR, CRRConfig
from safe_offrl.agents.extraction import ExtractionConfig
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.agents.td_values import TDValues
from safe_offrl.errors import ConfigError
from safe_offrl.policies.categorical import CATEGORICAL
from safe_offrl.policies.gaussian import GAUSSIAN
from safe_offrl.policies.mixture import MIXTURE
from safe_offrl.policies.networks import Actor, Networks
from safe_offrl.policies.protocol import Quadrature
from safe_offrl.types import Batch
from tests.agents.setups import LIMIT, setup_of
from tests.agents.test_agents import (
    MEMBERS,
    TableNetworks,
    constant_,
    discrete_networks,
    one_hot,
    seeded,
)
from tests.agents.test_latent_steering import (
    BETWEEN,
    BOTH_WAYS,
    ONLINE,
    SIZE,
    SMALL,
    TINY,
    batch_of,
    silent,
)

NOTHING_ELSE = Steering()
POLICY = (0.5, 0.3, 0.2)
NO_NOISE = torch.zeros(4, 3)  # a categorical needs none


def logged(chosen: list[int], **fields: Tensor) -> Batch:
    """Steps of one state, from it to itself, in which these of three actions were chosen."""
    actions, zeros = one_hot(torch.tensor(chosen), 3), torch.zeros(len(chosen))
    return batch_of(actions, zeros + 1.0)._replace(**{"terminated": zeros, **fields})


def tables(*q: tuple[float, float, float]) -> TableNetworks:
    """The policy of the tests, and the Q of each critic; the targets' are other ones."""
    networks = discrete_networks(POLICY, q[0], [(99.0, 99.0, 99.0)])
    networks.table = torch.tensor(q)
    return networks


def every_action(networks: Networks, batch: Batch) -> Quadrature:
    with torch.no_grad():
        return networks.actor(batch.observations).quadrature(NO_NOISE)


def weights_of(agent: AWR | AWAC | CRR, batch: Batch) -> list[float]:
    networks = agent.imitation.actor
    with torch.no_grad():
        policy = networks(batch.observations).quadrature(NO_NOISE)
        return agent.imitation.weights(batch, policy).tolist()


# --- values of the policy ---


def values_of(networks: Networks, discount: float = 0.5) -> TDValues:
    return TDValues(networks, seeded(), learning_rate=1e-3, discount=discount, tau=0.1)


def test_td_targets_are_by_hand() -> None:
    """The least target of each action is 1, 2, 3: .5 + .6 + .6 = 1.7, and y = 1 + .5 (1.7)."""
    networks = discrete_networks(POLICY, (1.0, 2.0, 0.0), [(1.0, 5.0, 3.0), (4.0, 2.0, 9.0)])
    values = values_of(networks)
    (going_on,) = values.critic_loss(logged([0]), NO_NOISE)
    assert going_on.item() == pytest.approx(MEMBERS * (1.0 - 1.85) ** 2)
    (both,) = values.critic_loss(logged([0, 1], terminated=torch.tensor([0.0, 1.0])), NO_NOISE)
    assert both.item() == pytest.approx(MEMBERS * (0.85**2 + 1.0) / 2.0)


def test_td_targets_are_of_what_the_policy_does_next() -> None:
    """Where it is going the policy is .2, .3, .5: .2 + .6 + 1.5 = 2.3, and y = 1 + .5 (2.3)."""
    networks = discrete_networks(POLICY, (1.0, 2.0, 0.0), [(1.0, 2.0, 3.0)])
    weight, _ = networks.actor.parameters()
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.2 / 0.5], [0.3 / 0.3], [0.5 / 0.2]]).log())
    batch = logged([0], next_observations=torch.ones(1, 1))
    (loss,) = values_of(networks).critic_loss(batch, NO_NOISE)
    assert loss.item() == pytest.approx(MEMBERS * 1.15**2)


def test_advantages_are_by_hand() -> None:
    """The least Q of each action is 1, -2, 4: .5 - .6 + .8 = .7 under the policy."""
    networks = tables((1.0, 5.0, 4.0), (3.0, -2.0, 6.0))
    batch = logged([0, 1, 2])
    found = values_of(networks).advantages(batch, every_action(networks, batch))
    assert found.tolist() == pytest.approx([0.3, -2.7, 3.3])


# --- weights ---

ONE_CRITIC = (1.0, -2.0, 4.0)
ADVANTAGES = (0.3, -2.7, 3.3)


def test_awac_s_weights_are_a_softmax_over_the_batch() -> None:
    agent = AWAC(setup_of(tables(ONE_CRITIC), seeded()), AWACConfig(temperature=2.0))
    batch = logged([0, 1, 2, 2])
    exponentials = [math.exp(a / 2.0) for a in (*ADVANTAGES, ADVANTAGES[2])]
    by_hand = [4.0 * x / sum(exponentials) for x in exponentials]
    assert weights_of(agent, batch) == pytest.approx(by_hand)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_awac_s_weights_are_one_on_average_whatever_the_scale(scale: float) -> None:
    """A clipped exponential is between 0 and 100, and a softmax alone has a mean of 1 / B."""
    q = tuple(scale * x for x in ONE_CRITIC)
    agent = AWAC(setup_of(tables(q), seeded()), AWACConfig())  # type: ignore[arg-type]
    assert np.mean(weights_of(agent, logged([0, 1, 2, 2]))) == pytest.approx(1.0)


def test_crr_s_weights_are_by_hand() -> None:
    batch = logged([0, 1, 2])
    setup = setup_of(tables(ONE_CRITIC), seeded())
    exponential = CRR(setup, CRRConfig(temperature=2.0))
    assert weights_of(exponential, batch) == pytest.approx([math.exp(a / 2.0) for a in ADVANTAGES])
    assert weights_of(CRR(setup, CRRConfig()), batch)[2] == 20.0  # not exp(3.3) = 27
    assert weights_of(CRR(setup, CRRConfig(weighting="binary")), batch) == [1.0, 0.0, 1.0]


def test_crr_imitates_nothing_that_is_as_good_as_the_policy() -> None:
    """1[A > 0], not 1[A >= 0]; its exponential is 1 there."""
    batch, setup = logged([0, 1, 2]), setup_of(tables((0.0, 0.0, 0.0)), seeded())
    assert weights_of(CRR(setup, CRRConfig(weighting="binary")), batch) == [0.0] * 3
    assert weights_of(CRR(setup, CRRConfig()), batch) == pytest.approx([1.0] * 3)


def test_the_settings_refuse_a_weighting_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="weighting"):
        commands.pretrain_config(agent="crr", overrides=["agents.crr.weighting=max"])
    config = commands.pretrain_config(agent="crr", overrides=["agents.crr.weighting=binary"])
    assert config.agents.crr.weighting == "binary"


def awr_of(**settings: Any) -> AWR:
    agent = AWR(setup_of(tables(ONE_CRITIC), seeded()), AWRConfig(**settings))
    constant_(agent.value, [3.0])
    return agent


def returns(*values: float) -> Batch:
    return logged([0] * len(values), return_to_go=torch.tensor(values))


def test_awr_s_weights_are_by_hand() -> None:
    """A = 2, -4, 2, 0: on average 0, of variance 6."""
    found = weights_of(awr_of(temperature=0.5), returns(5.0, -1.0, 5.0, 3.0))
    by_hand = [math.exp(a / math.sqrt(6.0) / 0.5) for a in (2.0, -4.0, 2.0, 0.0)]
    assert found == pytest.approx(by_hand)
    # The mean is taken off, V or not: A = 1, 3 have -1 and 1.
    assert weights_of(awr_of(), returns(4.0, 6.0)) == pytest.approx([math.exp(-1.0), math.e])
    assert max(weights_of(awr_of(temperature=0.1), returns(4.0, 6.0))) == 20.0
    assert weights_of(awr_of(), returns(4.0, 4.0)) == [1.0, 1.0]


def test_awr_s_value_loss_is_by_hand() -> None:
    """Towards the returns: (5 - 3)^2 and (-1 - 3)^2."""
    (loss,) = awr_of().value_loss(returns(5.0, -1.0))
    assert loss.item() == pytest.approx(10.0)


def test_awr_s_value_sees_the_time_that_is_left() -> None:
    """Returns that fall with it are no fault of an action's: the weights become 1."""
    generator = seeded()
    networks = Networks(1, 1, SMALL, generator, MIXTURE)
    agent = AWR(setup_of(networks, generator), AWRConfig(learning_rate=1e-2))
    left = torch.linspace(0.0, 1.0, SIZE)
    better = torch.where(BOTH_WAYS[:, 0] > 0.0, 0.5, -0.5)
    batch = batch_of(BOTH_WAYS, left)._replace(time_to_go=left, return_to_go=5.0 * left + better)
    for _ in range(300):
        agent.update(batch, NOTHING_ELSE)
    torch.testing.assert_close(agent.advantages(batch), better, atol=0.2, rtol=0.0)


# --- the loss ---


def of_policy(networks: Networks, **settings: Any) -> CRR:
    """Weights are 1 where Q is what the policy has anyway."""
    return CRR(setup_of(networks, seeded(), **settings), CRRConfig())


def test_the_loss_is_by_hand() -> None:
    """Weights exp(.3) and exp(-2.7); log .5 and log .3; KL from an even policy, twice."""
    agent = CRR(setup_of(tables(ONE_CRITIC), seeded()), CRRConfig())
    anchor = discrete_networks((1 / 3, 1 / 3, 1 / 3), ONE_CRITIC, []).actor
    batch = logged([0, 1])
    likelihood = (math.exp(0.3) * math.log(0.5) + math.exp(-2.7) * math.log(0.3)) / 2.0
    (plain,) = agent.imitation.loss(batch, NO_NOISE, (), None, 5.0)
    assert plain.item() == pytest.approx(-likelihood)
    (anchored,) = agent.imitation.loss(batch, NO_NOISE, (), anchor, torch.tensor(2.0))
    kl = math.log(3.0) + sum(p * math.log(p) for p in POLICY)  # KL(pi || anchor)
    assert anchored.item() == pytest.approx(-likelihood + 2.0 * kl)


def test_the_kl_is_from_the_anchor_not_of_it() -> None:
    agent = of_policy(tables((2.0, 2.0, 2.0)))
    anchor = discrete_networks((0.8, 0.1, 0.1), ONE_CRITIC, []).actor
    (loss,) = agent.imitation.loss(logged([0]), NO_NOISE, (), anchor, 1.0)
    kl = 0.5 * math.log(5 / 8) + 0.3 * math.log(3.0) + 0.2 * math.log(2.0)
    assert loss.item() == pytest.approx(-math.log(0.5) + kl)


def test_bc_s_loss_is_by_hand() -> None:
    agent = BC(setup_of(tables(ONE_CRITIC), seeded()), BCConfig())
    (loss,) = agent.loss(logged([0, 2, 2]))
    assert loss.item() == pytest.approx(-(math.log(0.5) + 2.0 * math.log(0.2)) / 3.0)


# --- risk ---


def risk_of(*table: float) -> Penalty:
    """Of the three actions; how much the multiplier is does not matter."""
    return Penalty(lambda o, t, a: a @ torch.tensor(table), torch.tensor(77.0))


def test_risky_actions_weigh_less() -> None:
    """Twice the risk .1, and three times the other one's: exp(-.2), exp(-.3 - .0), exp(-1.8)."""
    weights, batch = torch.tensor([1.0, 2.0, 3.0]), logged([0, 1, 2])
    penalties = risk_of(0.1, 0.0, 0.9), risk_of(0.0, 0.1, 0.0)
    aversions = Aversion(2.0, relative=False), Aversion(3.0, relative=False)
    found = risk_averse(weights, batch, penalties, aversions, None)
    raw = [math.exp(-0.2), 2.0 * math.exp(-0.3), 3.0 * math.exp(-1.8)]
    assert found.tolist() == pytest.approx([3.0 * x / sum(raw) for x in raw])


def test_relative_risk_is_compared_with_the_policy_s() -> None:
    """.23 is the policy's own: a level that all share changes nothing, here 40 more or less."""
    networks, batch = tables(ONE_CRITIC), logged([0, 1, 2])
    weights, policy = torch.ones(3), every_action(networks, batch)
    relative = (Aversion(50.0, relative=True),)
    raw = [math.exp(-50.0 * x) for x in (0.1, 0.0, 0.9)]
    for level in (0.0, 40.0, -40.0):
        penalty = (risk_of(level + 0.1, level + 0.0, level + 0.9),)
        found = risk_averse(weights, batch, penalty, relative, policy)
        assert found.tolist() == pytest.approx([3.0 * x / sum(raw) for x in raw], rel=1e-3)


def test_what_relative_risk_is_relative_to() -> None:
    """Where two states differ: in the second the policy is what the action is, .9 - .23 apart."""
    networks, batch = tables(ONE_CRITIC), logged([2, 2])
    time_to_go = torch.tensor([0.0, 1.0])
    batch = batch._replace(time_to_go=time_to_go)
    of_time = Penalty(
        lambda o, t, a: t * (a @ torch.tensor([0.1, 0.0, 0.9])) + 3.0 * (1.0 - t),
        torch.tensor(1.0),
    )
    aversion = (Aversion(2.0, relative=True),)
    found = risk_averse(torch.ones(2), batch, (of_time,), aversion, every_action(networks, batch))
    raw = [1.0, math.exp(-2.0 * (0.9 - 0.23))]
    assert found.tolist() == pytest.approx([2.0 * x / sum(raw) for x in raw])


def test_a_far_safer_action_does_not_overflow() -> None:
    batch = logged([0, 1, 2])
    aversions = (Aversion(100.0, relative=False),)
    found = risk_averse(torch.ones(3), batch, (risk_of(-50.0, 0.0, -50.01),), aversions, None)
    raw = [math.exp(-1.0), 0.0, 1.0]
    # Of -5000 float32 knows three decimals.
    assert found.tolist() == pytest.approx([3.0 * x / sum(raw) for x in raw], rel=1e-2)


def test_without_penalties_weights_are_as_published() -> None:
    weights = torch.tensor([0.5, 7.0])
    assert risk_averse(weights, logged([0, 1]), (), (Aversion(9.0, True),), None) is weights


def loss_of(agent: CRR, *penalties: Penalty) -> float:
    (loss,) = agent.imitation.loss(logged([0, 1]), NO_NOISE, penalties, None, 0.0)
    return loss.item()


def by_hand(first: float, second: float) -> float:
    """The loss of weights in this proportion, of actions of probability .5 and .3."""
    return -2.0 * (first * math.log(0.5) + second * math.log(0.3)) / (first + second) / 2.0


def test_aversion_is_the_setup_s_or_else_the_settings() -> None:
    """Of each limit its own, where they are given; of several without any, the settings' of all."""
    even, penalty = (2.0, 2.0, 2.0), risk_of(0.3, 0.0, 0.0)
    own = of_policy(tables(even), aversions=(Aversion(4.0, relative=False),))
    assert loss_of(own, penalty) == pytest.approx(by_hand(math.exp(-1.2), 1.0))
    settings = ExtractionConfig(risk_aversion=2.0)
    agent = of_policy(tables(even), extraction=settings)
    assert loss_of(agent, penalty) == pytest.approx(by_hand(math.exp(-0.6), 1.0))
    setup = setup_of(tables(even), seeded(), extraction=settings)._replace(limits=(LIMIT, LIMIT))
    agent = CRR(setup, CRRConfig())
    found = loss_of(agent, penalty, risk_of(0.0, 0.2, 0.0))
    assert found == pytest.approx(by_hand(math.exp(-0.6), math.exp(-0.4)))
    settings = ExtractionConfig(risk_aversion=2.0, relative_risk=True)
    agent = of_policy(tables(even), extraction=settings)
    assert loss_of(agent, penalty) == pytest.approx(by_hand(math.exp(-0.6), 1.0))


# --- two ways past an obstacle ---

CONFIGS: dict[str, Any] = {
    "bc": BCConfig(learning_rate=3e-3),
    "awr": AWRConfig(learning_rate=3e-3, temperature=0.2),
    "awac": AWACConfig(learning_rate=3e-3, tau=0.02, temperature=0.2),
    "crr": CRRConfig(learning_rate=3e-3, tau=0.02, temperature=0.2),
    "crr binary": CRRConfig(learning_rate=3e-3, tau=0.02, weighting="binary"),
}
LEARN_REWARD = [name for name in CONFIGS if name != "bc"]
# V of a policy that goes both ways is as good as either: the sign of what is left is noise.
GO_BOTH_WAYS = [name for name in CONFIGS if name != "crr binary"]


def drawn_from(actor: Actor) -> Tensor:
    """20,000 actions in the one state there is."""
    noise = actor.kind.draw_noise((20_000, 1, *actor.noise_shape), np.random.default_rng(7))
    with torch.no_grad():
        actions: Tensor = actor(torch.zeros(1, 1)).act(torch.from_numpy(noise))
    return actions.flatten()


def trained(name: str, rewards: Tensor, steering: Steering = NOTHING_ELSE) -> Tensor:
    """What an agent does on a log of one step, both ways as often; a return is its reward."""
    generator, own = seeded(), name.split()[0]
    networks = Networks(1, 1, SMALL, generator, kind_of(own, discrete=False))
    agent = AGENTS[own](setup_of(networks, generator), CONFIGS[name])
    batch = batch_of(BOTH_WAYS, rewards)._replace(return_to_go=rewards)
    for _ in range(400):
        agent.update(batch, steering)
    return drawn_from(networks.actor)


def shares(actions: Tensor) -> tuple[float, float, float]:
    """Left, into the obstacle, right."""
    left, right = (actions < -BETWEEN).float(), (actions > BETWEEN).float()
    return left.mean().item(), (1.0 - left - right).mean().item(), right.mean().item()


@pytest.mark.parametrize("name", GO_BOTH_WAYS)
def test_a_mixture_goes_both_ways_and_not_between(name: str) -> None:
    left, between, right = shares(trained(name, torch.ones(SIZE)))
    assert between < 0.03
    assert min(left, right) > 0.3


@pytest.mark.parametrize("way", [-1.0, 1.0])
@pytest.mark.parametrize("name", LEARN_REWARD)
def test_it_takes_the_better_way(name: str, way: float) -> None:
    actions = way * trained(name, way * BOTH_WAYS[:, 0])
    left, between, right = shares(actions)
    assert between < 0.03
    assert right > 0.9
    assert left < 0.1
    assert actions.median().item() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("name", GO_BOTH_WAYS)
def test_where_one_way_is_risky_it_takes_the_other(name: str) -> None:
    """Both pay the same, now more and now less; bc is not steered, and goes on in both."""
    risky = Steering((Penalty(lambda o, t, a: (a[:, 0] > 0.0).float(), torch.tensor(1.0)),))
    left, between, right = shares(trained(name, torch.linspace(-1.0, 1.0, SIZE), risky))
    assert between < 0.03
    assert left > (0.4 if name == "bc" else 0.9)
    assert (right > 0.4) == (name == "bc")


# --- which policies they have, and the way online ---


def test_they_train_mixtures_and_categoricals() -> None:
    for name in ("bc", "awr", "awac", "crr"):
        assert kind_of(name, discrete=False) is MIXTURE
        assert kind_of(name, discrete=True) is CATEGORICAL
    assert kind_of("bc_safe", discrete=False) is GAUSSIAN


def online_of(networks: Networks) -> OnlineAWAC:
    configs = AgentConfigs(awac=AWACConfig(learning_rate=1e-2))
    learner = online_agent("awac", setup_of(networks, seeded()), configs)
    assert isinstance(learner, OnlineAWAC)
    return learner


def test_online_awac_is_kept_near_the_policy_that_acts() -> None:
    """Two ways in the batch; the policy that acts does something else."""
    found = []
    for weight in (0.0, 30.0):
        networks = Networks(1, 1, SMALL, seeded(), MIXTURE)
        learner, anchor = online_of(networks), Actor(1, 1, (), seeded(1), MIXTURE)
        batch = batch_of(BOTH_WAYS, torch.ones(SIZE))
        for _ in range(200):
            assert set(learner.update_critics(batch)) == {"agent/critic_loss"}
            learner.update_actor(batch, Steering((), anchor, torch.tensor(weight)))
        with torch.no_grad():
            divergence = networks.actor(torch.zeros(1, 1)).divergence(anchor(torch.zeros(1, 1)))
        found.append(divergence.item())
    assert found[1] < 0.2
    assert found[0] > 2.0


def test_online_awac_goes_on_from_a_gaussian_too() -> None:
    networks = Networks(1, 1, SMALL, seeded(), GAUSSIAN)
    learner, batch = online_of(networks), batch_of(BOTH_WAYS, torch.ones(SIZE))
    *_, bias = networks.actor.parameters()
    before = bias.detach().clone()
    learner.update_actor(batch, NOTHING_ELSE)
    assert not torch.equal(bias, before)


@pytest.mark.slow
@pytest.mark.parametrize(("agent", "learner"), [("awac", "awac"), ("awr", "rlpd")])
def test_the_commands_know_them(
    tmp_path: Path, tiny_dataset: Path, agent: str, learner: str
) -> None:
    config = commands.pretrain_config(
        agent=agent, dataset=str(tiny_dataset), steps=30, overrides=TINY
    )
    plan = commands.plan_pretrain(config, say=silent)
    offline = commands.pretrain_run(plan, name=agent, runs=tmp_path, say=silent)
    overrides = [*ONLINE, f"baseline.learner={learner}"]
    going_on = commands.finetune_config(offline, budget=600, overrides=overrides)
    online = commands.finetune_run(
        commands.plan_finetune(offline, going_on), name=f"on-{agent}", runs=tmp_path, say=silent
    )
    assert online.state["status"] == "finished"
    assert online.load_checkpoint().info["policy"]["kind"] == "mixture"
    before, after = (x.load_checkpoint().tensors for x in (offline, online))
    assert not torch.equal(*(x["learner.actor/layers.0.weight"] for x in (before, after)))
    lines = (online.path / "iterations.jsonl").read_text()
    assert '"KL bound (over components)"' in lines
    manifest = commands.export_run(online.path, file_format="torchscript", say=silent)
    assert manifest["compared"]["same"]
