"""A kind of policy without a density, in one file and one entry: it acts, is judged by the safety
critic, accepted by its own divergence, kept and exported; who needs a density says so.

It goes one of two ways, ``tanh(m - s)`` or ``tanh(m + s)``, each with a probability of 1/2.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from safe_offrl.agents import AGENTS, AgentConfigs, online_agent
from safe_offrl.agents.protocol import Setup
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.assess.assessment import assess_policy
from safe_offrl.assess.fitted_features import FittedConfig
from safe_offrl.deploy.graph import PolicyGraph
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.errors import ConfigError
from safe_offrl.policies.acting import NumpyActor
from safe_offrl.policies.kinds import KINDS, kind_for
from safe_offrl.policies.mlp import NumpyMLP, linear_layers
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks
from safe_offrl.policies.protocol import Kind, Noise, Quadrature, Rows, Vector
from safe_offrl.report.charts.constraints import constraint_panels
from safe_offrl.report.charts.style import Group, Look
from safe_offrl.report.decisions import logged_decision
from safe_offrl.safety.acceptance import (
    AcceptanceConfig,
    Decision,
    Judge,
    decide,
    measure_divergence,
)
from safe_offrl.safety.constrained import Constrained
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.multiplier import LagrangianConfig, Multiplier
from safe_offrl.safety.outlook import AccidentAhead
from safe_offrl.safety.shield import Shield, ShieldConfig
from safe_offrl.train.iteration import Iteration
from safe_offrl.types import Batch, Normalizer, States, Visited
from tests.agents.setups import LIMIT, setup_of

# --- the file ---


class TwoWays(NamedTuple):
    mean: Tensor  # [B, A], before tanh
    spread: Tensor  # [B, A], above 0

    def quadrature(self, noise: Tensor) -> Quadrature:
        both = torch.cat([self.mean - self.spread, self.mean + self.spread])
        return Quadrature(torch.tanh(both), torch.full((2, len(self.mean)), 0.5))

    def act(self, noise: Tensor) -> Tensor:
        return torch.tanh(self.mean + self.spread * torch.sign(noise)[..., None])

    def divergence(self, other: "TwoWays") -> Tensor:
        """Squared Wasserstein distance before tanh: the lower point moves to the lower one."""
        return ((self.mean - other.mean).square() + (self.spread - other.spread).square()).sum(-1)


def _two_ways(outputs: Tensor) -> TwoWays:
    mean, raw = outputs.chunk(2, dim=-1)
    return TwoWays(mean, raw.exp())


def _in_numpy(network: torch.nn.Module) -> Callable[[Vector, Noise], Rows]:
    net = NumpyMLP(network)

    def act(observation: Vector, noise: Noise) -> Rows:
        mean, raw = np.split(net(observation), 2)
        return np.tanh(mean + np.exp(raw) * np.sign(noise)[:, None], dtype=np.float32)

    return act


TWO_WAYS = Kind(
    name="two_ways",
    one_hot=False,
    exact=True,
    divergence_name="W2^2",
    divergence_unit="squared actions",
    noise_in_words="standard normal draws",
    mean_in_words="in the middle of both ways",
    noise_shape=lambda a: (),
    network=lambda o, a, hidden, generator: linear_layers(o, (*hidden, 2 * a), generator),
    distribution=lambda network, observations: _two_ways(network(observations)),
    in_numpy=_in_numpy,
    draw_noise=lambda shape, rng: rng.standard_normal(shape, dtype=np.float32),
    uniform=lambda shape, rng: rng.uniform(-1.0, 1.0, shape).astype(np.float32),
)

# --- what becomes of it elsewhere ---


@pytest.fixture(autouse=True)
def entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, TWO_WAYS.name, TWO_WAYS)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def policy(mean: float, spread: float) -> Actor:
    """One action, the same at every observation."""
    actor = Actor(1, 1, (), seeded(), TWO_WAYS)
    with torch.no_grad():
        weight, bias = actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor([mean, math.log(spread)]))
    return actor


def critic_of(base: float, slope: float) -> SafetyCritic:
    """Q_C = sigmoid(base + slope * action), all members alike."""
    critic = SafetyCritic(1, 1, AccidentAhead(10), SafetyCriticConfig(hidden=()), seeded())
    with torch.no_grad():
        for parameter in critic.net.parameters():
            parameter.zero_()
        critic.net.output.weight[:, 2] = slope
        critic.net.output.bias.fill_(base)
    return critic


def risk(*logits: float) -> float:
    return sum(1.0 / (1.0 + math.exp(-x)) for x in logits) / len(logits)


def visited(states: int = 50) -> Visited:
    zeros, column = torch.zeros(states), torch.zeros(states, 1)
    batch = Batch(column, column, zeros, zeros, zeros, column, zeros, zeros + 0.5, zeros)
    return Visited(batch, zeros + 1.0, 1.0)


def judge(learner: Actor, delta: float = 0.05) -> Decision:
    decision, _ = decide(
        policy(0.0, 0.5),
        learner,
        [Judge(LIMIT, critic_of(-5.0, 0.0), visited(), States.at_start(torch.zeros(20, 1)))],
        AcceptanceConfig(tries=1),
        kl_limit=delta,
        constrain_safety=True,
        confidence=0.95,
        generator=seeded(),
    )
    return decision


def test_its_divergence_is_measured_and_decides() -> None:
    measured = measure_divergence(policy(0.3, 0.9), policy(0.1, 0.5), torch.zeros(7, 1), 0.95)
    assert measured.tolist() == pytest.approx([0.2**2 + 0.4**2] * 4)
    near, far = judge(policy(0.1, 0.5)), judge(policy(0.3, 0.5))  # .01 and .09
    assert near.accepted
    assert not far.accepted
    assert far.reason == "W2^2 0.09 is not below 0.05"


def test_name_and_unit_reach_the_record_and_the_charts() -> None:
    about: dict[str, Any] = {"index": 0, "step": 9, "version": 1}
    about |= {"kl_weight": 0.1, "metrics": {}, "rolled_back": False}
    multiplier = Multiplier(LagrangianConfig(), LIMIT.share)
    constraint = Constrained(LIMIT, critic_of(-5.0, 0.0), multiplier)
    line = Iteration.from_decision(
        judge(policy(0.1, 0.5)), [constraint], delta=0.05, tail_ratio=5.0, **about
    )._asdict()
    assert (line["divergence"], line["divergence_unit"]) == ("W2^2", "squared actions")
    old = {k: v for k, v in line.items() if not k.startswith("divergence")}
    assert logged_decision(line).divergence == ("W2^2", "squared actions")
    assert logged_decision(old).divergence == ("KL", "nats")

    look = Look(0, "black", "-", "o", crowded=False)

    def title(of: dict[str, Any]) -> str:
        run: Any = SimpleNamespace(decisions=[logged_decision(of)])
        return constraint_panels([Group("ours", look, [run])])[1].title

    assert title(old) == "KL between consecutive acting policies, over delta"
    ours = "W2^2 between consecutive acting policies, over delta in squared actions"
    assert title(line) == ours


def test_the_safety_critic_averages_over_both_ways() -> None:
    critic = critic_of(-1.0, 2.0)
    states = States.at_start(torch.zeros(20, 1))
    found = critic.estimate(policy(0.2, 0.6), states, seeded(), 0.95)
    by_hand = risk(-1.0 + 2.0 * math.tanh(-0.4), -1.0 + 2.0 * math.tanh(0.8))
    assert found.value == pytest.approx(by_hand, rel=1e-5)
    batch = visited().batch
    metrics = critic.update(batch, torch.ones(50), policy(0.2, 0.6), states, seeded())
    assert all(math.isfinite(float(value)) for value in metrics.values())


def test_it_acts_behind_the_shield_is_kept_and_exported() -> None:
    actor = policy(0.2, 0.6)
    lower, upper = math.tanh(-0.4), math.tanh(0.8)
    shield = Shield.from_critic(
        critic_of(0.0, 4.0), ShieldConfig(candidates=6, margin=0.0), 1.0, acts=True
    )
    normalizer = Normalizer(np.zeros(1, np.float32), np.ones(1, np.float32))
    deployed = DeployedPolicy.from_actor(actor, shield, normalizer, 3)
    kept = DeployedPolicy.restored(deployed.tensors(), deployed.words())
    assert kept.actor.kind is TWO_WAYS
    assert kept.sha256 == deployed.sha256
    observation, graph = np.zeros(1, np.float32), PolicyGraph(kept, spaces.Box(-1.0, 1.0, (1,)))
    drawn = NumpyActor(actor).draw(observation, 4000, np.random.default_rng(0))
    assert np.unique(drawn).tolist() == pytest.approx([lower, upper])
    assert drawn.mean() == pytest.approx((lower + upper) / 2, abs=0.03)
    alone = deployed._replace(shield=Shield.abstaining())
    middle, *_ = alone.act(observation, 1.0, np.random.default_rng(0), mean_action=True)
    assert middle == pytest.approx([math.tanh(0.2)])
    for seed in range(20):
        action, intervened, _ = kept.act(observation, 1.0, np.random.default_rng(seed))
        noise = NumpyActor(actor).noise(6, np.random.default_rng(seed))
        inputs = torch.zeros(1, 1), torch.ones(1), torch.from_numpy(noise)[None]
        by_graph, replaced = graph(*inputs)
        assert by_graph[0].tolist() == pytest.approx(action.tolist())
        assert bool(replaced) == intervened == (noise[0] > 0.0 and (noise < 0.0).any())


def without_density() -> Setup:
    networks = Networks(1, 1, NetworkConfig((8,), (8,), 2), seeded(), TWO_WAYS)
    return setup_of(networks, seeded())


@pytest.mark.parametrize("discrete", [False, True])
def test_a_checkpoint_from_before_kinds_had_names_is_read(discrete: bool) -> None:
    actor = Actor(3, 2, (4,), seeded(), kind_for(discrete=discrete))
    normalizer = Normalizer(np.zeros(3, np.float32), np.ones(3, np.float32))
    policy = DeployedPolicy.from_actor(actor, Shield.abstaining(), normalizer, 0)
    words = policy.words() | {"discrete": discrete}
    del words["kind"]
    assert set(policy.tensors()) >= {"deployed/layers.0.weight", "deployed/layers.2.bias"}
    restored = DeployedPolicy.restored(policy.tensors(), words)
    assert restored.actor.kind is actor.kind
    assert restored.sha256 == policy.sha256


REFUSED = r'{} needs the probability density .* the kind "two_ways" has none\. Take'


@pytest.mark.parametrize("name", [n for n, agent in AGENTS.items() if not hasattr(agent, "kinds")])
def test_an_agent_that_needs_a_density_says_so_before_it_learns(name: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED.format(f".*{name}.*")):
        AGENTS[name](without_density(), AgentConfigs().settings_for(AGENTS[name]))


@pytest.mark.parametrize("name", ["iql", "calql"])
def test_so_does_one_that_goes_on_online(name: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED.format(f".*{name}.*")):
        online_agent(name, without_density(), AgentConfigs())


def test_so_does_rlpd_which_needs_an_entropy_alone() -> None:
    with pytest.raises(ConfigError, match=r'rlpd .*how random .* kind "two_ways" does not say\.'):
        online_agent("rlpd", without_density(), AgentConfigs())


def test_so_does_an_assessment() -> None:
    setup = without_density()
    with pytest.raises(ConfigError, match=REFUSED.format("logged actions.*")):
        assess_policy(setup.dataset, setup.networks.actor, LIMIT, FittedConfig())


def test_values_are_learnt_without_a_density() -> None:
    """As in the alignment between both phases."""
    networks = without_density().networks
    batch = visited().batch._replace(rewards=torch.ones(50))
    metrics = RLPD(networks, RLPDConfig(), seeded()).update_critics(batch)
    assert math.isfinite(float(metrics["learner/critic_loss"]))
