"""FQL: its losses by hand, two ways past an obstacle, and all of its commands, also online."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safe_offrl import commands
from safe_offrl.agents import AGENTS, AgentConfigs, kind_of, learner_after, online_agent
from safe_offrl.agents.fql import FQL, FQLConfig
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.commands import offline_plan
from safe_offrl.errors import ConfigError
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.policies.one_step import ONE_STEP
from safe_offrl.record.run import RunDir
from safe_offrl.train.fallback import Fallback
from tests.agents.setups import setup_of
from tests.agents.test_latent_steering import (
    BETWEEN,
    BOTH_WAYS,
    LINEAR,
    NOTHING_ELSE,
    ONLINE,
    SMALL,
    TINY,
    batch_of,
    bits,
    drawn_from,
    linear_,
    seeded,
    silent,
)
from tests.agents.test_toy_agent import Killed, kill_at, result

HERE = torch.zeros(2, 1)
TWO = batch_of(torch.zeros(2, 1), torch.zeros(2))


def networks_of(sizes: NetworkConfig) -> Networks:
    """Of one number of an observation and one of an action."""
    return Networks(1, 1, sizes, seeded(), ONE_STEP)


def agent_of(sizes: NetworkConfig, **settings: Any) -> FQL:
    return FQL(setup_of(networks_of(sizes), seeded(1)), FQLConfig(**settings))


def q_is(agent: FQL, monkeypatch: pytest.MonkeyPatch, **slopes: tuple[float, ...]) -> None:
    """Let the members of ``q`` or ``target_q`` be lines through 0: ``slope * action`` each."""
    for name, each in slopes.items():
        monkeypatch.setattr(
            agent.networks, name, lambda o, a, each=each: torch.stack([k * a[:, 0] for k in each])
        )


# --- losses by hand ---


@pytest.mark.parametrize(("aggregate", "slope"), [("mean", 3.0), ("min", 2.0)])
def test_the_critics_loss_is_by_hand(
    aggregate: str, slope: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """m = .5 z + .3 at s' = 1: the next action of z = 1, eps = 2 is tanh(1), of 0 and 0 tanh(.3).

    Q' is 2 a' and 4 a', Q is a and 5 a at the logged actions .5 and -.2; the second step ends.
    """
    agent = agent_of(LINEAR, aggregate=aggregate, discount=0.9)
    linear_(agent.networks.actor, [0.7, 0.5], -0.4)
    q_is(agent, monkeypatch, q=(1.0, 5.0), target_q=(2.0, 4.0))
    batch = batch_of(torch.tensor([[0.5], [-0.2]]), torch.tensor([0.1, 0.6]))
    batch = batch._replace(terminated=torch.tensor([0.0, 1.0]), next_observations=HERE + 1.0)
    (loss,) = agent.critic_loss(batch, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    targets = 0.1 + 0.9 * slope * math.tanh(1.0), 0.6
    errors = [[k * a - y for a, y in zip((0.5, -0.2), targets, strict=True)] for k in (1.0, 5.0)]
    expected = sum((x**2 + y**2) / 2.0 for x, y in errors)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def actor_loss_of(agent: FQL, *steering: Any) -> tuple[float, float]:
    """At z = 1, eps = -2 and z = -1, eps = 0; the flow's average stands still at .4 z."""
    linear_(agent.behaviour.flow, [0.0, 9.0, 9.0], 9.0)  # the average counts, not this one
    linear_(agent.behaviour.target_flow, [0.0, 0.0, 0.0], -0.6)
    linear_(agent.networks.actor, [0.7, 0.5], 0.3)
    noise = torch.tensor([[1.0, -2.0], [-1.0, 0.0]])
    loss, distance = agent.actor_loss(TWO, noise, *steering)
    return loss.item(), distance.item()


ACTIONS = (math.tanh(0.5 + 0.3 - 0.2), math.tanh(-0.5 + 0.3))
# The flow goes -.6 from z = 1, and, clipped, to -1 from z = -1.
DISTANCE = ((ACTIONS[0] - 0.4) ** 2 + (ACTIONS[1] + 1.0) ** 2) / 2.0


def test_the_actor_s_loss_is_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Q = 2 a and 4 a, which count as 3 a, Q_C = a^2 and lambda 3."""
    agent = agent_of(LINEAR, weight=0.7)
    q_is(agent, monkeypatch, q=(2.0, 4.0))
    size = 3.0 * (abs(ACTIONS[0]) + abs(ACTIONS[1])) / 2.0
    steered = sum(-3.0 * a / size + 3.0 * a**2 for a in ACTIONS) / 2.0
    penalty = Penalty(lambda o, t, a: a[:, 0].square(), torch.tensor(3.0))
    loss, distance = actor_loss_of(agent, (penalty,), None, 0.0)
    assert distance == pytest.approx(DISTANCE, rel=1e-5)
    assert loss == pytest.approx(steered + 0.7 * DISTANCE, rel=1e-5)


def test_the_distance_is_a_mean_over_the_numbers_of_an_action() -> None:
    """Of a flow that stands still at z and an action of tanh(0): (.6^2 + .8^2) / 2."""
    networks = Networks(1, 2, LINEAR, seeded(), ONE_STEP)
    agent = FQL(setup_of(networks, seeded(1)), FQLConfig())
    with torch.no_grad():
        for module in (agent.behaviour.target_flow, networks.actor):
            for parameter in module.parameters():
                parameter.zero_()
    batch = batch_of(torch.zeros(1, 2), torch.zeros(1))
    _, distance = agent.actor_loss(batch, torch.tensor([[0.6, 0.8, 0.0, 0.0]]), (), None, 0.0)
    assert distance.item() == pytest.approx(0.5)


def test_an_anchor_costs_the_kl_given_z(monkeypatch: pytest.MonkeyPatch) -> None:
    """m is .5 z + .3, the anchor's .6 z + .25: .05 apart at z = 1 and .15 at z = -1."""
    agent = agent_of(LINEAR, weight=0.7)
    q_is(agent, monkeypatch, q=(2.0, 4.0))
    anchor = networks_of(LINEAR).actor
    linear_(anchor, [0.7, 0.6], 0.25)
    free, _ = actor_loss_of(agent, (), None, 0.0)
    held, _ = actor_loss_of(agent, (), anchor, torch.tensor(0.8))
    kl = (0.05**2 + 0.15**2) / 2.0 / (2.0 * 0.1**2)
    assert held - free == pytest.approx(0.8 * kl, rel=1e-4)


def test_who_learns_what() -> None:
    agent = agent_of(NetworkConfig((8,), (8,), 2), learning_rate=1e-2)
    batch, noise = batch_of(torch.rand(6, 1), torch.rand(6)), torch.randn(6, 2)
    networks, behaviour = agent.networks, agent.behaviour
    modules = (
        *(networks.critics, networks.target_critics, networks.actor),
        *(behaviour.flow, behaviour.target_flow),
    )

    def moved(step: Any, *arguments: object) -> list[bool]:
        before = [bits(module) for module in modules]
        step(*arguments)
        return [bits(module) != old for module, old in zip(modules, before, strict=True)]

    assert moved(agent._descend_critics, batch, noise) == [True, False, False, False, False]
    assert moved(agent.update_critics, batch) == [True, True, False, False, False]
    descend = agent._descend_actor, batch, noise, (), networks_of(agent.networks.sizes).actor, 0.1
    assert moved(*descend) == [False, False, True, False, False]
    assert moved(agent.update_actor, batch, NOTHING_ELSE) == [False, False, True, True, True]
    assert moved(agent.update, batch, NOTHING_ELSE) == [True] * 5
    assert not any(p.requires_grad for p in behaviour.target_flow.parameters())


def test_online_it_is_the_same_with_an_anchor() -> None:
    networks = networks_of(NetworkConfig((8,), (8,), 2))
    learner = online_agent("fql", setup_of(networks, seeded()), AgentConfigs())
    assert isinstance(learner, FQL)
    anchor = networks_of(networks.sizes).actor
    risk = Penalty(lambda o, t, a: torch.sigmoid(a[:, 0]), torch.tensor(2.0))
    batch = batch_of(torch.rand(6, 1), torch.rand(6))
    for _ in range(3):
        metrics = learner.update_critics(batch)
        metrics |= learner.update_actor(batch, Steering((risk,), anchor, torch.tensor(0.1)))
        assert all(math.isfinite(float(value)) for value in metrics.values())


def test_a_heavy_anchor_holds_it() -> None:
    """Reward is the action; with an anchor it stays, without one it goes."""
    distances = {}
    for weight in (0.0, 100.0):
        agent = agent_of(SMALL, learning_rate=2e-3, weight=0.0)
        anchor = networks_of(SMALL).actor  # of the same seed: as the actor begins
        steering = Steering((), anchor, torch.tensor(weight))
        for _ in range(100):
            agent.update(batch_of(BOTH_WAYS, BOTH_WAYS[:, 0]), steering)
        here = torch.zeros(1, 1)
        distances[weight] = agent.networks.actor(here).divergence(anchor(here)).item()
    assert distances[100.0] < 0.05 < 10.0 < distances[0.0]


# --- two ways past an obstacle ---


def trained(rewards: Tensor, *, weight: float, steering: Steering = NOTHING_ELSE) -> Tensor:
    """Actions of a policy that has learnt from both ways."""
    agent = agent_of(SMALL, learning_rate=2e-3, tau=1e-2, weight=weight)
    for _ in range(1000):
        agent.update(batch_of(BOTH_WAYS, rewards), steering)
    return drawn_from(agent.networks.actor)


def share(found: Tensor) -> float:
    return found.float().mean().item()


def test_near_the_flow_it_goes_both_ways_and_not_between() -> None:
    actions = trained(BOTH_WAYS[:, 0], weight=100.0)
    assert share(actions.abs() < BETWEEN) < 0.03
    assert share(actions < -BETWEEN) > 0.25
    assert share(actions > BETWEEN) > 0.25


@pytest.mark.parametrize("way", [-1.0, 1.0])
def test_steered_by_reward_it_takes_the_better_way(way: float) -> None:
    """The reward is the action, or its opposite."""
    actions = trained(way * BOTH_WAYS[:, 0], weight=0.3)
    assert share(actions.abs() < BETWEEN) < 0.03
    assert share(way * actions > BETWEEN) > 0.9


@pytest.mark.parametrize("way", [-1.0, 1.0])
def test_with_a_penalty_on_one_way_it_takes_the_other(way: float) -> None:
    """The penalised one is the better one by a little."""
    risk = Penalty(lambda o, t, a: torch.sigmoid(4.0 * way * a[:, 0]), torch.tensor(3.0))
    rewards = 1.0 + 0.2 * way * BOTH_WAYS[:, 0]
    actions = trained(rewards, weight=0.3, steering=Steering((risk,)))
    assert share(actions.abs() < BETWEEN) < 0.03
    assert share(-way * actions > BETWEEN) > 0.9


# --- what it is refused, and what it is refused for ---


def test_discrete_actions_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_of("fql", discrete=False) is ONE_STEP
    monkeypatch.setattr(offline_plan, "default_dataset", lambda *_, **__: pytest.fail("work"))
    config = commands.pretrain_config(env="HazardGrid-v0", agent="fql")
    with pytest.raises(ConfigError, match=r'"fql" trains .* are numbers, .* are discrete\. Take'):
        commands.plan_pretrain(config, say=silent)


@pytest.mark.parametrize("name", ["bc_safe", "iql", "cql", "calql"])
def test_whoever_needs_the_density_of_an_action_refuses_it(name: str) -> None:
    setup = setup_of(networks_of(SMALL), seeded())
    words = rf'{name}.* needs the probability density of .* kind "one_step" has none\.'
    with pytest.raises(ConfigError, match=words):
        AGENTS[name](setup, AgentConfigs().settings_for(AGENTS[name]))


@pytest.mark.parametrize("name", ["iql", "calql"])
def test_so_does_whoever_would_go_on_with_it_online(name: str) -> None:
    with pytest.raises(ConfigError, match="needs the probability density"):
        online_agent(name, setup_of(networks_of(SMALL), seeded()), AgentConfigs())


def test_who_goes_on_online_where_nobody_is_asked_for() -> None:
    assert learner_after("fql") == "fql"
    for name in ("iql", "calql", "bc_safe", "latent", "nowhere:crr"):
        assert learner_after(name) == "rlpd"


# --- the commands ---


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> RunDir:
    """With a guard, whatever the log shows of its fallback."""
    config = commands.pretrain_config(
        agent="fql", dataset=str(tiny_dataset), steps=30, overrides=TINY
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fallback, "refusals", lambda self, *_: [() for _ in self.constraints])
        plan = commands.plan_pretrain(config, say=silent)
        root = tmp_path_factory.mktemp("fql")
        return commands.pretrain_run(plan, name="offline", runs=root, say=silent)


def test_an_offline_run_that_is_killed_goes_on_bit_for_bit(
    tmp_path: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = commands.pretrain_config(
        agent="fql", dataset=str(tiny_dataset), steps=30, overrides=TINY
    )
    plan, runs = commands.plan_pretrain(config, say=silent), {"runs": tmp_path, "say": silent}
    whole = commands.pretrain_run(plan, name="whole", **runs)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        kill_at(patch, 15)
        with pytest.raises(Killed):
            commands.pretrain_run(plan, name="cut", checkpoint_seconds=0.0, **runs)  # type: ignore[arg-type]
    assert result(commands.resume_pretrain("cut", **runs)) == result(whole)  # type: ignore[arg-type]


def test_it_goes_on_online_itself_with_every_constraint(
    offline: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default; killed it goes on bit for bit, is evaluated and exported."""
    runs = offline.path.parent
    config = commands.finetune_config(offline, budget=600, overrides=ONLINE)
    assert config.baseline.learner == "fql"
    plan = commands.plan_finetune(offline, config)
    assert "active      KL, cost constraint, shield" in plan.header
    assert "guard" in plan.header
    words = "its policies have no entropy, which rlpd would keep"
    assert f"\nlearner     fql goes on online in a form of its own: {words}\n" in plan.header
    run = commands.finetune_run(plan, name="online", runs=runs, say=silent)
    before, after = (x.load_checkpoint() for x in (offline, run))
    # It goes on from its own flow and optimisers; a policy of another version acts.
    start, end = (
        before.tensors["agent.flow_optimizer/0.step"],
        after.tensors["learner.flow_optimizer/0.step"],
    )
    assert start.item() == 30.0
    assert end.item() > 30.0
    lines = [json.loads(x) for x in (run.path / "iterations.jsonl").read_text().splitlines()]
    assert {line["divergence"] for line in lines} == {"KL bound (given the noise)"}
    assert all(line["kl_forward_mean"] < 0.05 for line in lines if line["accepted"])
    assert any(line["accepted"] for line in lines)
    # Killed and resumed.
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        plan = commands.plan_finetune(offline, config)
        with pytest.raises(Killed):
            commands.finetune_run(plan, name="cut", runs=runs, checkpoint_seconds=0.0, say=silent)
    assert result(commands.resume_finetune("cut", runs=runs, say=silent)) == result(run)
    # What comes of it.
    assert commands.evaluate_run(run.path, episodes=2, say=silent)["episodes"] == 2
    for file_format in ("onnx", "torchscript"):
        manifest = commands.export_run(run.path, file_format=file_format, say=silent)
        assert manifest["compared"]["same"]


def test_rlpd_is_refused_before_any_work(offline: RunDir) -> None:
    overrides = [*ONLINE, "baseline.learner=rlpd"]
    config = commands.finetune_config(offline, budget=600, overrides=overrides)
    with pytest.raises(ConfigError, match=r'rlpd .*how random .* kind "one_step" does not say\.'):
        commands.plan_finetune(offline, config)


OFF: dict[str, Any] = {"kl": False, "safety_constraint": False, "shield": False, "guard": False}


@pytest.mark.parametrize(("learner", "kind"), [("fql", "one_step"), ("rlpd", "gaussian")])
def test_from_scratch_a_policy_is_of_the_learner_s_kind(
    offline: RunDir, learner: str, kind: str
) -> None:
    overrides = [*ONLINE, "baseline.from_scratch=true", f"baseline.learner={learner}"]
    config = commands.finetune_config(offline, budget=300, overrides=overrides, **OFF)
    plan = commands.plan_finetune(offline, config)
    plain = "RLPD" if learner == "rlpd" else learner
    assert f"active      nothing: plain {plain}\n" in plan.header
    name = f"scratch-{learner}"
    run = commands.finetune_run(plan, name=name, runs=offline.path.parent, say=silent)
    assert run.load_checkpoint().info["policy"]["kind"] == kind


def test_the_log_does_not_judge_it(offline: RunDir) -> None:
    with pytest.raises(ConfigError, match=r'logged actions .* kind "one_step" has none\.'):
        commands.assess_runs([offline.path], say=silent)
