"""IDQL: the loss of its choice by hand, two ways past an obstacle, and all of its commands."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from safe_offrl import commands
from safe_offrl.agents import AgentConfigs, kind_of, online_agent
from safe_offrl.agents.idql import IDQL, IDQLConfig
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.commands import offline_plan
from safe_offrl.errors import ConfigError
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks
from safe_offrl.policies.proposals import PROPOSALS, ProposalNetwork
from tests.agents.setups import setup_of
from tests.agents.test_latent_steering import (
    BETWEEN,
    BOTH_WAYS,
    NOTHING_ELSE,
    ONLINE,
    SIZE,
    SMALL,
    TINY,
    batch_of,
    bits,
    linear_,
    seeded,
    silent,
)

N = 16


def agent_of(sizes: NetworkConfig, **settings: Any) -> IDQL:
    """Of one number of an observation and one of an action."""
    generator = seeded()
    networks = Networks(1, 1, sizes, generator, PROPOSALS)
    return IDQL(setup_of(networks, generator), IDQLConfig(**settings))


def network_of(actor: Actor) -> ProposalNetwork:
    assert isinstance(actor.layers, ProposalNetwork)
    return actor.layers


# --- the loss by hand ---


def test_the_loss_of_the_choice_is_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Q = 4 a (the least of two), Q_C = a^2, lambda 3, l = 2 a and a generator tanh(w / 2).

    In two states: the mean magnitude that Q is divided by is that of both.
    """
    agent = agent_of(NetworkConfig((), (4,), 2), temperature=0.7)
    network = network_of(agent.choice.networks.actor)
    linear_(network.scorer, [0.0, 2.0], 0.0)
    linear_(network.generator, [0.0, 0.5], 0.0)
    monkeypatch.setattr(
        agent.choice.networks,
        "q",
        lambda o, a: torch.stack([4.0 * a[:, 0], 4.0 * a[:, 0] + 1.0]),
    )
    noise = torch.linspace(-2.5, 2.0, 2 * N).view(2, N, 1).expand(2, N, 2)
    actions = np.tanh(0.5 * noise[..., 0].numpy().astype(np.float64))
    shares = np.exp(2.0 * actions) / np.exp(2.0 * actions).sum(1, keepdims=True)
    size = (shares * np.abs(4.0 * actions)).sum(1).mean()
    kl = (shares * np.log(shares * N)).sum(1)
    each = -4.0 * actions / size + 3.0 * actions**2
    by_hand = ((shares * each).sum(1) + 0.7 * kl).mean()
    penalty = Penalty(lambda o, t, a: a[:, 0].square(), torch.tensor(3.0))
    loss, divergence = agent.choice.actor_loss(
        batch_of(torch.zeros(2, 1), torch.zeros(2)), noise, (penalty,)
    )
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert divergence.item() == pytest.approx(kl.mean(), rel=1e-5)


def test_the_best_choice_is_the_softmax_of_what_actions_are_worth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """l = -(what steers) / temperature + anything is where the gradient of the loss is 0."""
    agent = agent_of(NetworkConfig((), (4,), 2), temperature=0.5)
    networks = agent.choice.networks
    linear_(network_of(networks.actor).generator, [0.0, 0.5], 0.0)
    monkeypatch.setattr(networks, "q", lambda o, a: torch.zeros(2, len(a)))
    penalty = Penalty(lambda o, t, a: a[:, 0], torch.tensor(3.0))
    noise, gradients = networks.actor.noise((SIZE,), seeded(1)), []
    for slope in (-6.0, -5.0, -7.0):  # -3 a / .5
        linear_(network_of(networks.actor).scorer, [0.0, slope], 0.0)
        loss, _ = agent.choice.actor_loss(batch_of(BOTH_WAYS, BOTH_WAYS[:, 0]), noise, (penalty,))
        (gradient,) = torch.autograd.grad(loss, agent.choice.actor_optimizer.parameters)
        gradients.append(gradient[0, 1].item())
    assert gradients[0] == pytest.approx(0.0, abs=1e-6)
    assert gradients[1] > 1e-3
    assert gradients[2] < -1e-3


def test_who_learns_what() -> None:
    """No loss of the choice moves the generator, and nothing but distillation does."""
    agent = agent_of(NetworkConfig((8,), (8,), 2), learning_rate=1e-2)
    network, batch = (
        network_of(agent.choice.networks.actor),
        batch_of(torch.rand(6, 1), torch.rand(6)),
    )
    noise, t = torch.randn(6, 1, generator=seeded()), torch.rand(6, 1, generator=seeded())
    modules = (network.scorer, network.generator, agent.behaviour.flow)

    def moved(step: Any, *arguments: object) -> list[bool]:
        before = [bits(module) for module in modules]
        step(*arguments)
        return [bits(module) != old for module, old in zip(modules, before, strict=True)]

    assert moved(agent.choice.update, batch, NOTHING_ELSE, seeded()) == [True, False, False]
    assert moved(agent.distillation.update, batch.observations, noise) == [False, True, False]
    assert moved(agent.behaviour.update, batch, noise, t) == [False, False, True]
    assert moved(agent.values.update, batch) == [False, False, False]
    assert moved(agent.update, batch, NOTHING_ELSE) == [True, True, True]


def test_online_the_scorer_moves_alone() -> None:
    agent = agent_of(NetworkConfig((8,), (8,), 2), learning_rate=1e-2)
    networks, batch = agent.choice.networks, batch_of(torch.rand(6, 1), torch.rand(6))
    for _ in range(5):
        agent.update(batch, NOTHING_ELSE)
    network, anchor = network_of(networks.actor), copy.deepcopy(networks.actor)
    generator, scorer = bits(network.generator), bits(network.scorer)
    setup = setup_of(networks, seeded(1), learner=RLPDConfig(learning_rate=1e-2))
    learner = online_agent("rlpd", setup, AgentConfigs())
    assert isinstance(learner, RLPD)
    assert len(learner.actor_optimizer.parameters) == 3  # two layers, less the last one's bias
    risk = Penalty(lambda o, t, a: torch.sigmoid(a[:, 0]), torch.tensor(2.0))
    for _ in range(5):
        learner.update_critics(batch)
        metrics = learner.update_actor(batch, Steering((risk,), anchor, torch.tensor(0.1)))
        assert all(math.isfinite(float(value)) for value in metrics.values())
        assert 0.0 <= float(metrics["learner/entropy"]) <= math.log(N) + 1e-5
    assert bits(network.generator) == generator
    assert bits(network.scorer) != scorer


# --- two ways past an obstacle ---


@pytest.fixture(scope="module")
def imitator() -> IDQL:
    """What passes the obstacle as the log does: at -.8 and at .8, as often."""
    agent = agent_of(SMALL, learning_rate=2e-3, tau=1e-2, temperature=100.0)
    batch, generator = batch_of(BOTH_WAYS, BOTH_WAYS[:, 0]), seeded(1)
    for _ in range(1200):
        x0, w = (torch.randn(SIZE, 1, generator=generator) for _ in range(2))
        agent.behaviour.update(batch, x0, torch.rand(SIZE, 1, generator=generator))
        agent.distillation.update(batch.observations, w)
    agent.choice.update(batch, NOTHING_ELSE, generator)
    return agent


def steered(imitator: IDQL, rewards: Tensor, steering: Steering = NOTHING_ELSE) -> Actor:
    agent = agent_of(SMALL, learning_rate=5e-3, tau=1e-2)
    networks, generator = agent.choice.networks, seeded(2)
    networks.actor.load_state_dict(imitator.choice.networks.actor.state_dict())
    for _ in range(150):
        agent.values.update(batch_of(BOTH_WAYS, rewards))
        agent.choice.update(batch_of(BOTH_WAYS, rewards), steering, generator)
    return networks.actor


def drawn_from(actor: Actor) -> Tensor:
    """Actions in the one state there is."""
    noise = PROPOSALS.draw_noise((20_000, 1, N, 2), np.random.default_rng(0))
    with torch.no_grad():
        actions: Tensor = actor(torch.zeros(1, 1)).act(torch.from_numpy(noise))
    return actions.flatten()


def share(of: Tensor) -> float:
    return of.float().mean().item()


def test_near_the_log_it_goes_both_ways_and_not_between(imitator: IDQL) -> None:
    actions = drawn_from(imitator.choice.networks.actor)
    assert share(actions.abs() < BETWEEN) < 0.03
    assert share(actions < -BETWEEN) > 0.4
    assert share(actions > BETWEEN) > 0.4


def without_noise(actor: Actor) -> float:
    with torch.no_grad():
        return float(actor(torch.zeros(1, 1)).act(torch.zeros(1, 1, N, 2)))


@pytest.mark.parametrize("way", [-1.0, 1.0])
def test_steered_by_reward_it_takes_the_better_way(imitator: IDQL, way: float) -> None:
    """The reward is the action, or its opposite; also without noise."""
    actor = steered(imitator, way * BOTH_WAYS[:, 0])
    actions = drawn_from(actor)
    assert share(actions.abs() < BETWEEN) < 0.03
    assert share(way * actions > BETWEEN) > 0.95
    assert actions.median().item() == pytest.approx(0.8 * way, abs=0.1)
    assert without_noise(actor) == pytest.approx(0.8 * way, abs=0.1)


@pytest.mark.parametrize("way", [-1.0, 1.0])
def test_with_a_penalty_on_the_better_way_it_takes_the_other(imitator: IDQL, way: float) -> None:
    """There, and where the obstacle is, an accident is nearly sure."""
    risk = Penalty(lambda o, t, a: torch.sigmoid(30.0 * (way * a[:, 0] + 0.5)), torch.tensor(4.0))
    actions = drawn_from(steered(imitator, way * BOTH_WAYS[:, 0], Steering((risk,))))
    assert share(actions.abs() < BETWEEN) < 0.03
    assert share(-way * actions > BETWEEN) > 0.95


# --- the commands ---


def test_discrete_actions_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_of("idql", discrete=False) is PROPOSALS
    monkeypatch.setattr(offline_plan, "default_dataset", lambda *_, **__: pytest.fail("work"))
    config = commands.pretrain_config(env="HazardGrid-v0", agent="idql")
    with pytest.raises(ConfigError, match=r'"idql" trains .* are numbers, .* are discrete\. Take'):
        commands.plan_pretrain(config, say=silent)


def test_it_goes_online_on_probation_is_evaluated_and_exported(
    tmp_path: Path, tiny_dataset: Path
) -> None:
    learning = commands.pretrain_config(
        agent="idql", dataset=str(tiny_dataset), steps=30, overrides=TINY
    )
    pretraining = commands.plan_pretrain(learning, say=silent)
    offline = commands.pretrain_run(pretraining, name="offline", runs=tmp_path, say=silent)
    config = commands.finetune_config(offline, budget=600, overrides=ONLINE)
    plan = commands.plan_finetune(offline, config)
    assert plan.config.probation
    assert plan.inputs.risk == 'not assessed: a policy of the kind "proposals" has no density'
    run = commands.finetune_run(plan, name="online", runs=tmp_path, say=silent)
    assert run.state["status"] == "finished"
    before, after = (x.load_checkpoint() for x in (offline, run))
    assert before.info["policy"]["kind"] == "proposals"
    generator = [k for k in before.tensors if k.startswith("deployed/layers.generator.")]
    assert len(generator) == 4
    for key in generator:
        learner = key.replace("deployed/", "learner.actor/")
        assert torch.equal(before.tensors[key], after.tensors[key])
        assert torch.equal(before.tensors[key], after.tensors[learner])
    moved = "learner.actor/layers.scorer.0.weight"
    assert not torch.equal(before.tensors[moved], after.tensors[moved])
    lines = [json.loads(x) for x in (run.path / "iterations.jsonl").read_text().splitlines()]
    assert {line["divergence"] for line in lines} == {"KL bound (over the choice)"}
    assert commands.evaluate_run(run.path, episodes=2, say=silent)["episodes"] == 2
    for file_format in ("onnx", "torchscript"):
        manifest = commands.export_run(run.path, file_format=file_format, say=silent)
        assert manifest["compared"]["same"]
