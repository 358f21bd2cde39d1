"""Latent steering: its losses by hand, two ways past an obstacle, and all of its commands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safe_offrl import commands
from safe_offrl.agents import AGENTS, AgentConfigs, kind_of, online_agent
from safe_offrl.agents.bc import BC, BCConfig
from safe_offrl.agents.flow import integrate
from safe_offrl.agents.latent import LatentConfig, LatentSteering
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.commands import offline_plan
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.policies.gaussian import GAUSSIAN
from safe_offrl.policies.latent import LATENT, LatentNetwork
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks
from safe_offrl.record.run import RunDir
from safe_offrl.train.fallback import Fallback
from safe_offrl.types import Batch
from tests.agents.setups import setup_of

NOTHING_ELSE = Steering()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def agent_of(sizes: NetworkConfig, **settings: Any) -> LatentSteering:
    """Of one number of an observation and one of an action."""
    generator = seeded()
    networks = Networks(1, 1, sizes, generator, LATENT)
    return LatentSteering(setup_of(networks, generator), LatentConfig(**settings))


def network_of(actor: Actor) -> LatentNetwork:
    assert isinstance(actor.layers, LatentNetwork)
    return actor.layers


def linear_(module: nn.Module, weights: list[float], bias: float) -> None:
    """Make a network of one linear layer."""
    (layer,) = (x for x in module.modules() if isinstance(x, nn.Linear))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weights]))
        layer.bias.fill_(bias)


def batch_of(actions: Tensor, rewards: Tensor) -> Batch:
    """One step each, from the same state to the end."""
    zeros, column = torch.zeros(len(actions)), torch.zeros(len(actions), 1)
    return Batch(column, actions, rewards, zeros, zeros, column, zeros + 1, zeros + 1, zeros)


def bits(module: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in module.parameters()]


# --- losses by hand ---

LINEAR = NetworkConfig((), (4,), 2)


def test_the_flow_s_loss_is_by_hand() -> None:
    """At x_t = .75 (-1) + .25 (.6) = -.6 it flows by 2 (-.6) + 3 (.25) + .5 = .05, not by 1.6."""
    agent = agent_of(LINEAR)
    linear_(agent.behaviour.flow, [0.0, 2.0, 3.0], 0.5)
    batch = batch_of(torch.tensor([[0.6], [0.6]]), torch.zeros(2))
    # The second: at t = 1, x_t = a = .6, it flows by 1.2 + 3 + .5 = 4.7, not by .6 - 2.
    x0, t = torch.tensor([[-1.0], [2.0]]), torch.tensor([[0.25], [1.0]])
    (loss,) = agent.behaviour.flow_loss(batch, x0, t)
    assert loss.item() == pytest.approx((1.55**2 + 6.1**2) / 2.0)


def test_what_is_distilled_is_by_hand() -> None:
    """v = t - x + .5 in ten steps of .1 from w: x <- .9 x + .1 (t + .5), t = 0, .1, ... .9."""
    agent = agent_of(LINEAR)
    linear_(agent.behaviour.flow, [0.0, 9.0, 9.0], 9.0)  # the average counts, not this one
    linear_(agent.behaviour.target_flow, [0.0, -1.0, 1.0], 0.5)
    linear_(agent.distillation.action_generator, [0.0, 0.3], 0.1)
    ends = []
    for begin in (0.2, 3.5):
        x = begin
        for step in range(10):
            x = 0.9 * x + 0.1 * (step / 10.0 + 0.5)
        ends.append(x)
    assert ends[1] > 1.0  # an action is clipped
    w = torch.tensor([[0.2], [3.5]])
    found = integrate(agent.behaviour.target_flow, torch.zeros(2, 1), w)
    assert found.flatten().tolist() == pytest.approx([ends[0], 1.0])
    errors = math.tanh(0.3 * 0.2 + 0.1) - ends[0], math.tanh(0.3 * 3.0 + 0.1) - 1.0
    (loss,) = agent.distillation.distillation_loss(torch.zeros(2, 1), w)
    assert loss.item() == pytest.approx((errors[0] ** 2 + errors[1] ** 2) / 2.0)


def test_the_actor_s_loss_is_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Q = 4 a (the least of two), Q_C = a^2, lambda 3 and a generator tanh(w / 2)."""
    agent = agent_of(LINEAR, kl_weight=0.7)
    actor, risk = agent.actor, lambda o, t, a: a[:, 0].square()
    linear_(network_of(actor).generator, [0.0, 0.5], 0.0)
    policy = network_of(actor).policy[-1]
    assert isinstance(policy, nn.Linear)
    with torch.no_grad():
        policy.weight.zero_()
        policy.bias.copy_(torch.tensor([0.4, 0.2]))
    monkeypatch.setattr(
        agent.networks, "q", lambda o, a: torch.stack([4.0 * a[:, 0], 4.0 * a[:, 0] + 1.0])
    )
    mean, std = 1.5 * math.tanh(0.4), math.exp(-5.0 + 3.5 * (math.tanh(0.2) + 1.0))
    noise = torch.tensor([[1.0], [-3.0]])
    actions = [math.tanh(0.5 * (mean + std * z)) for z in (1.0, -3.0)]
    size = 4.0 * (abs(actions[0]) + abs(actions[1])) / 2.0
    kl = -math.log(std) + 0.5 * (std**2 + mean**2) - 0.5
    by_hand = sum(-4.0 * a / size + 3.0 * a**2 for a in actions) / 2.0 + 0.7 * kl
    batch = batch_of(torch.zeros(2, 1), torch.zeros(2))
    loss, divergence = agent.actor_loss(batch, noise, (Penalty(risk, torch.tensor(3.0)),))
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert divergence.item() == pytest.approx(kl, rel=1e-5)


def test_who_learns_what() -> None:
    """No loss of an actor moves the generator, and nothing but distillation does."""
    agent = agent_of(NetworkConfig((8,), (8,), 2), learning_rate=1e-2)
    network, batch = network_of(agent.actor), batch_of(torch.rand(6, 1), torch.rand(6))
    noise, t = torch.randn(6, 1, generator=seeded()), torch.rand(6, 1, generator=seeded())
    modules = (network.policy, network.generator, agent.behaviour.flow)

    def moved(step: Any, *arguments: object) -> list[bool]:
        before = [bits(module) for module in modules]
        step(*arguments)
        return [bits(module) != old for module, old in zip(modules, before, strict=True)]

    assert moved(agent._descend_actor, batch, noise, ()) == [True, False, False]
    assert moved(agent.distillation.update, batch.observations, noise) == [False, True, False]
    assert moved(agent.behaviour.update, batch, noise, t) == [False, False, True]
    assert moved(agent.values.update, batch) == [False, False, False]
    assert moved(agent.update, batch, NOTHING_ELSE) == [True, True, True]
    assert not any(p.requires_grad for p in network.generator.parameters())


def test_online_the_generator_stays_bit_for_bit() -> None:
    agent = agent_of(NetworkConfig((8,), (8,), 2), learning_rate=1e-2)
    batch = batch_of(torch.rand(6, 1), torch.rand(6))
    for _ in range(5):
        agent.update(batch, NOTHING_ELSE)
    network, anchor = network_of(agent.actor), agent.networks.actor
    generator, policy = bits(network.generator), bits(network.policy)
    setup = setup_of(agent.networks, seeded(1), learner=RLPDConfig(learning_rate=1e-2))
    learner = online_agent("rlpd", setup, AgentConfigs())
    assert isinstance(learner, RLPD)
    assert len(learner.actor_optimizer.parameters) == 4  # two layers of the Gaussian
    risk = Penalty(lambda o, t, a: torch.sigmoid(a[:, 0]), torch.tensor(2.0))
    for _ in range(5):
        learner.update_critics(batch)
        metrics = learner.update_actor(batch, Steering((risk,), anchor, torch.tensor(0.1)))
        assert all(math.isfinite(float(value)) for value in metrics.values())
    assert bits(network.generator) == generator
    assert bits(network.policy) != policy


# --- two ways past an obstacle ---

BETWEEN = 0.4  # |a| below which it hits the obstacle; the log passes it at -.8 and at .8
SMALL = NetworkConfig((32, 32), (32,), 2)
SIZE = 128
BOTH_WAYS = torch.tensor([[-0.8], [0.8]]).repeat(SIZE // 2, 1)


def drawn_from(actor: Actor, count: int = 20_000) -> Tensor:
    """Actions [count] in the one state there is."""
    with torch.no_grad():
        actions = actor(torch.zeros(1, 1)).act(actor.noise((count, 1), seeded(7)))
    return actions.flatten()


def trained(rewards: Tensor, *, kl_weight: float) -> Actor:
    agent = agent_of(SMALL, learning_rate=2e-3, tau=1e-2, kl_weight=kl_weight)
    for _ in range(1200):
        agent.update(batch_of(BOTH_WAYS, rewards), NOTHING_ELSE)
    return agent.actor


def test_a_gaussian_of_maximum_likelihood_drives_into_the_obstacle() -> None:
    """Its mean is 0, its deviation before tanh atanh(.8): 30.02 % of it lie within atanh(.4)."""
    generator = seeded()
    networks = Networks(1, 1, SMALL, generator, GAUSSIAN)
    imitator = BC(setup_of(networks, generator), BCConfig(learning_rate=3e-3))
    for _ in range(400):
        imitator._descend(batch_of(BOTH_WAYS, torch.zeros(SIZE)))
    share = math.erf(math.atanh(BETWEEN) / math.atanh(0.8) / math.sqrt(2.0))
    assert share > 0.3
    between = (drawn_from(networks.actor).abs() < BETWEEN).float().mean().item()
    assert between == pytest.approx(share, abs=0.02)


def test_a_latent_policy_near_the_log_goes_both_ways_and_not_between() -> None:
    actions = drawn_from(trained(BOTH_WAYS[:, 0], kl_weight=100.0))
    assert (actions.abs() < BETWEEN).float().mean().item() < 0.03
    assert (actions < -BETWEEN).float().mean().item() > 0.25
    assert (actions > BETWEEN).float().mean().item() > 0.25


@pytest.mark.parametrize("way", [-1.0, 1.0])
def test_steered_by_reward_it_takes_the_better_way(way: float) -> None:
    """The reward is the action, or its opposite; the other way is hardly taken any more."""
    actions = drawn_from(trained(way * BOTH_WAYS[:, 0], kl_weight=0.1))
    assert (actions.abs() < BETWEEN).float().mean().item() < 0.03
    assert (way * actions > BETWEEN).float().mean().item() > 0.9
    assert actions.median().item() == pytest.approx(0.8 * way, abs=0.1)


# --- what it is refused, and what it is refused for ---


def test_an_agent_says_which_kind_of_policy_it_trains() -> None:
    assert kind_of("latent", discrete=False) is LATENT
    for name in ("bc_safe", "iql", "cql", "calql"):
        assert kind_of(name, discrete=False) is GAUSSIAN
        assert kind_of(name, discrete=True).one_hot


def test_discrete_actions_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline_plan, "default_dataset", lambda *_, **__: pytest.fail("work"))
    config = commands.pretrain_config(env="HazardGrid-v0", agent="latent")
    with pytest.raises(
        ConfigError, match=r'"latent" trains .* are numbers, .* are discrete\. Take'
    ):
        commands.plan_pretrain(config, say=lambda _: None)


@pytest.mark.parametrize("name", [n for n, agent in AGENTS.items() if not hasattr(agent, "kinds")])
def test_whoever_needs_the_density_of_an_action_refuses_it(name: str) -> None:
    setup = setup_of(Networks(1, 1, SMALL, seeded(), LATENT), seeded())
    words = rf'{name}.* needs the probability density of .* kind "latent" has none\.'
    with pytest.raises(ConfigError, match=words):
        AGENTS[name](setup, AgentConfigs().settings_for(AGENTS[name]))


@pytest.mark.parametrize("name", ["iql", "calql"])
def test_so_does_whoever_would_go_on_with_it_online(name: str) -> None:
    setup = setup_of(Networks(1, 1, SMALL, seeded(), LATENT), seeded())
    with pytest.raises(ConfigError, match="needs the probability density"):
        online_agent(name, setup, AgentConfigs())


# --- the commands ---

TINY = ["alignment_steps=10", "log_every=10", "batch_size=32", "networks.critics=3"]
TINY += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]
TINY += ["safety.constraint=cost", "safety.cost_limit=5"]
ONLINE = ["warmup_steps=200", "iteration_steps=100", "batch_size=32"]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> RunDir:
    """With a guard, whatever the log shows of its fallback."""
    config = commands.pretrain_config(
        agent="latent", dataset=str(tiny_dataset), steps=30, overrides=TINY
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fallback, "refusals", lambda self, *_: [() for _ in self.constraints])
        plan = commands.plan_pretrain(config, say=silent)
        root = tmp_path_factory.mktemp("latent")
        return commands.pretrain_run(plan, name="offline", runs=root, say=silent)


def silent(text: str) -> None:
    pass


def test_its_guard_falls_back_to_a_gaussian(offline: RunDir) -> None:
    info = offline.load_checkpoint().info
    assert info["policy"]["kind"] == "latent"
    assert info["guard"]["kinds"] == ["gaussian", "latent"]


def test_an_assessment_refuses_it(offline: RunDir) -> None:
    with pytest.raises(ConfigError, match=r'logged actions .* kind "latent" has none\.'):
        commands.assess_runs([offline.path], say=silent)


def test_it_goes_online_on_probation_is_evaluated_and_exported(offline: RunDir) -> None:
    config = commands.finetune_config(offline, budget=600, overrides=ONLINE)
    plan = commands.plan_finetune(offline, config)
    assert plan.config.probation
    assert plan.inputs.risk == 'not assessed: a policy of the kind "latent" has no density'
    run = commands.finetune_run(plan, name="online", runs=offline.path.parent, say=silent)
    assert run.state["status"] == "finished"
    before, after = (x.load_checkpoint() for x in (offline, run))
    generator = [k for k in before.tensors if k.startswith("deployed/layers.generator.")]
    assert len(generator) == 4
    for key in generator:
        assert torch.equal(before.tensors[key], after.tensors[key])
        learner = key.replace("deployed/", "learner.actor/")
        assert torch.equal(before.tensors[key], after.tensors[learner])
    moved = "learner.actor/layers.policy.0.weight"
    assert not torch.equal(before.tensors[moved], after.tensors[moved])
    lines = [json.loads(x) for x in (run.path / "iterations.jsonl").read_text().splitlines()]
    assert {line["divergence"] for line in lines} == {"KL bound (over the noise)"}
    assert commands.evaluate_run(run.path, episodes=2, say=silent)["episodes"] == 2
    for file_format in ("onnx", "torchscript"):
        manifest = commands.export_run(run.path, file_format=file_format, say=silent)
        assert manifest["compared"]["same"]


def test_in_reality_it_takes_an_accident_budget(offline: RunDir) -> None:
    overrides = [*ONLINE, "env.kind=real"]
    config = commands.finetune_config(offline, budget=600, overrides=overrides)
    with pytest.raises(RunError, match=r"no density\. Give an --accident-budget"):
        commands.plan_finetune(offline, config)
    config = commands.finetune_config(offline, budget=600, accident_budget=3, overrides=overrides)
    plan = commands.plan_finetune(offline, config)
    plan.env.close()
    assert plan.config.probation


def test_from_scratch_its_policy_is_forgotten_with_its_kind(offline: RunDir) -> None:
    """A generator that has learnt nothing would stay so."""
    off = {"kl": False, "safety_constraint": False, "shield": False, "guard": False}
    overrides = [*ONLINE, "baseline.from_scratch=true"]
    config = commands.finetune_config(offline, budget=300, overrides=overrides, **off)  # type: ignore[arg-type]
    plan = commands.plan_finetune(offline, config)
    run = commands.finetune_run(plan, name="scratch", runs=offline.path.parent, say=silent)
    assert run.load_checkpoint().info["policy"]["kind"] == "gaussian"
