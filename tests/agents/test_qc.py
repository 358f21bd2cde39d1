"""Q-chunking: its values by hand and on a chain, what plans know that states do not show, and all
of its commands, also online.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from safe_offrl import commands
from safe_offrl.agents import AgentConfigs, kind_of, learner_after, online_agent
from safe_offrl.agents.qc import QC, OnlineQC, QCConfig
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.commands import offline_plan
from safe_offrl.data.dataset import Dataset
from safe_offrl.errors import ConfigError, DataError
from safe_offrl.policies.chunked import CHUNK, CHUNKED
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks
from safe_offrl.policies.proposals import PROPOSALS_MADE, ProposalNetwork
from safe_offrl.record.run import RunDir
from safe_offrl.train.fallback import Fallback
from safe_offrl.types import Batch
from tests.agents.setups import setup_of
from tests.agents.small_problems import agent_of as small_agent
from tests.agents.small_problems import bandit, log_of, trained
from tests.agents.test_latent_steering import (
    NOTHING_ELSE,
    ONLINE,
    TINY,
    batch_of,
    bits,
    seeded,
    silent,
)
from tests.agents.test_toy_agent import Killed, kill_at, result

N = PROPOSALS_MADE
LINEAR = NetworkConfig((), (4,), 2)


def episodes(length: int, *, count: int = 4, ended: bool = True) -> Dataset:
    """Of one number of an observation and one of an action, the step's place and 0."""
    place = torch.arange(length).repeat(count).float().unsqueeze(1)
    terminated = (place[:, 0] == length - 1).float() * ended
    zeros = torch.zeros(len(place))
    return log_of(place, zeros.unsqueeze(1), zeros, place + 1.0, terminated, length=length)


def agent_of(sizes: NetworkConfig, log: Dataset | None = None, **settings: Any) -> QC:
    generator = seeded()
    networks = Networks(1, 1, sizes, generator, CHUNKED)
    log = log or episodes(CHUNK)
    return QC(setup_of(networks, generator, dataset=log), QCConfig(**settings))


def network_of(actor: Actor) -> ProposalNetwork:
    assert isinstance(actor.layers, ProposalNetwork)
    return actor.layers


def simple_(network: ProposalNetwork, slope: float) -> None:
    """Plans are tanh(w / 2), number by number, and score ``slope`` times their last one."""
    (scorer,), (generator,) = network.scorer, network.generator
    assert isinstance(scorer, nn.Linear)
    assert isinstance(generator, nn.Linear)
    with torch.no_grad():
        generator.weight.copy_(torch.cat([torch.zeros(CHUNK, 1), 0.5 * torch.eye(CHUNK)], dim=1))
        generator.bias.zero_()
        scorer.weight.zero_()
        scorer.weight[0, -1] = slope


NOISE = torch.linspace(-2.0, 2.5, 2 * N * (CHUNK + 1)).view(2, N, CHUNK + 1)
PLANS = np.tanh(0.5 * NOISE[..., :-1].double().numpy())  # [2, N, h]
SHARES = np.exp(2.0 * PLANS[..., -1]) / np.exp(2.0 * PLANS[..., -1]).sum(1, keepdims=True)


# --- losses by hand ---


def test_the_target_is_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With l = 2 a_5 and Q' = 3 a_1 + a_5 and a_1 + 2, the less of which counts, plan by plan.

    Q is a_1 and 2 a_5 at the chunks .1, .2 ... .5 and -.1 ... -.5; the second ends there.
    """
    agent = agent_of(LINEAR, discount=0.9).learner
    simple_(network_of(agent.plans.actor), 2.0)
    monkeypatch.setattr(
        agent.plans,
        "target_q",
        lambda o, a, _=None: torch.stack([3.0 * a[:, 0] + a[:, 4], a[:, 0] + 2.0]),
    )
    monkeypatch.setattr(
        agent.plans, "q", lambda o, a: torch.stack([a[:, 0], 2.0 * a[:, 4]]), raising=True
    )
    one = torch.arange(1, CHUNK + 1) / 10.0
    batch = batch_of(torch.stack([one, -one]), torch.tensor([0.3, -0.6]))
    batch = batch._replace(terminated=torch.tensor([0.0, 1.0]))
    (loss,) = agent.values.critic_loss(batch, NOISE)
    least = np.minimum(3.0 * PLANS[0, :, 0] + PLANS[0, :, 4], PLANS[0, :, 0] + 2.0)
    targets = 0.3 + 0.9**5 * (SHARES[0] * least).sum(), -0.6
    errors = [(0.1 - targets[0], -0.1 - targets[1]), (1.0 - targets[0], -1.0 - targets[1])]
    expected = sum((x**2 + y**2) / 2.0 for x, y in errors)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_reward_reaches_back_h_steps_in_one_backup(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of 12 steps with a reward of 1 at its end, .9^(11 - t) at step t.

    The exact values are there after three backups; one step each would take twelve.
    """
    log = episodes(12, count=1)
    log.column("rewards")[-1] = 1.0
    agent = agent_of(LINEAR, log, discount=0.9)
    plans, values = agent.learner.plans, torch.zeros(13)
    monkeypatch.setattr(plans, "q", lambda o, a: torch.zeros(2, len(o)))
    monkeypatch.setattr(
        plans, "target_q", lambda o, a, _=None: values[o[:, 0].long()].expand(2, -1)
    )
    drawn = agent.logged.draw(300, seeded())
    exact = [0.9 ** (11 - t) for t in range(12)]
    for first in (7, 2, 0):  # where values are known after this backup
        backed_up = torch.zeros(13)
        for t in range(12):
            row = int((drawn.observations[:, 0] == t).nonzero()[0])
            batch = Batch(*(x[row : row + 1] for x in drawn.tensors))
            noise = plans.actor.noise((1,), seeded())
            (loss,) = agent.learner.values.critic_loss(batch, noise)
            backed_up[t] = (loss / 2.0).sqrt()  # two members of Q = 0
        values = backed_up
        known = [0.0] * first + exact[first:]
        assert values[:12].tolist() == pytest.approx(known, abs=1e-6)


def test_the_loss_of_the_choice_is_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Q = 4 a_5 (the least of two), lambda 3 and Q_C = a^2 of the first action alone."""
    agent = agent_of(LINEAR, temperature=0.7).learner
    simple_(network_of(agent.plans.actor), 2.0)
    monkeypatch.setattr(
        agent.plans, "q", lambda o, a: torch.stack([4.0 * a[:, 4], 4.0 * a[:, 4] + 1.0])
    )

    def risk(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
        assert actions.shape[1] == 1
        return actions[:, 0].square()

    size = (SHARES * np.abs(4.0 * PLANS[..., 4])).sum(1).mean()
    kl = (SHARES * np.log(SHARES * N)).sum(1)
    each = -4.0 * PLANS[..., 4] / size + 3.0 * PLANS[..., 0] ** 2
    by_hand = ((SHARES * each).sum(1) + 0.7 * kl).mean()
    batch, penalty = (
        batch_of(torch.zeros(2, CHUNK), torch.zeros(2)),
        Penalty(risk, torch.tensor(3.0)),
    )
    loss, divergence = agent.choice.actor_loss(batch, NOISE, (penalty,))
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert divergence.item() == pytest.approx(kl.mean(), rel=1e-5)


def test_an_anchor_costs_the_kl_of_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """l is 2 a_5, the anchor's -a_5, of the plans at which policies are compared."""
    agent = agent_of(LINEAR).learner
    networks = Networks(1, 1, LINEAR, seeded(), CHUNKED)
    network, anchor = network_of(agent.plans.actor), networks.actor
    simple_(network, 2.0)
    simple_(network_of(anchor), -1.0)
    monkeypatch.setattr(agent.plans, "q", lambda o, a: torch.zeros(2, len(a)))
    batch = batch_of(torch.zeros(2, CHUNK), torch.zeros(2))
    free, _ = agent.choice.actor_loss(batch, NOISE, ())
    held, _ = agent.choice.actor_loss(batch, NOISE, (), anchor, torch.tensor(0.8))
    last = np.tanh(0.5 * network.fixed[..., -1].double().numpy().clip(-3.0, 3.0))
    p, q = (np.exp(k * last) / np.exp(k * last).sum(1, keepdims=True) for k in (2.0, -1.0))
    kl = (p * np.log(p / q)).sum(1).mean()
    assert (held - free).item() == pytest.approx(0.8 * kl, rel=1e-4)


def test_who_learns_what() -> None:
    agent = agent_of(NetworkConfig((8,), (8,), 2), learning_rate=1e-2)
    learner, network = agent.learner, network_of(agent.learner.plans.actor)
    chunks = agent.logged.draw(6, seeded())._replace(actions=torch.rand(6, CHUNK))
    noise, t = torch.randn(6, CHUNK, generator=seeded()), torch.rand(6, 1, generator=seeded())
    modules = (
        *(learner.plans.critics, learner.plans.target_critics, network.scorer, network.generator),
        agent.behaviour.flow,
    )

    def moved(step: Any, *arguments: object) -> list[bool]:
        before = [bits(module) for module in modules]
        step(*arguments)
        return [bits(module) != old for module, old in zip(modules, before, strict=True)]

    assert moved(learner.update_critics, chunks) == [True, True, False, False, False]
    assert moved(learner.update_actor, chunks, NOTHING_ELSE) == [False, False, True, False, False]
    distil = agent.distillation.update, chunks.observations, noise
    assert moved(*distil) == [False, False, False, True, False]
    assert moved(agent.behaviour.update, chunks, noise, t) == [False] * 4 + [True]
    batch = batch_of(torch.rand(6, 1), torch.rand(6))
    assert moved(agent.update, batch, NOTHING_ELSE) == [True] * 5


def test_online_the_generator_stays_bit_for_bit_and_an_anchor_holds_the_scorer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Q is the last action of a plan."""
    moved = {}
    for weight in (0.0, 1000.0):
        networks = Networks(1, 1, NetworkConfig((8,), (8,), 2), seeded(), CHUNKED)
        setup = setup_of(networks, seeded(1), dataset=episodes(CHUNK))
        learner = online_agent("qc", setup, AgentConfigs(qc=QCConfig(learning_rate=3e-3)))
        assert isinstance(learner, OnlineQC)
        monkeypatch.setattr(learner.plans, "q", lambda o, a: a[:, -1].expand(2, -1))
        network, anchor = network_of(networks.actor), copy.deepcopy(networks.actor)
        generator = bits(network.generator)
        batch = batch_of(torch.rand(32, CHUNK), torch.rand(32))
        for _ in range(100):
            metrics = learner.update_actor(batch, Steering((), anchor, torch.tensor(weight)))
            assert all(math.isfinite(float(value)) for value in metrics.values())
        assert bits(network.generator) == generator
        here = torch.zeros(1, 1)
        moved[weight] = networks.actor(here).divergence(anchor(here)).item()
    assert moved[1000.0] < 0.01 < 0.5 < moved[0.0]


# --- what plans know that states do not show ---


def drawn_from(networks: Networks, *, place: float = 0.0, count: int = 4000) -> Tensor:
    """Actions [count] at this observation."""
    kind, shape = networks.actor.kind, networks.actor.noise_shape
    noise = torch.from_numpy(kind.draw_noise((count, 1, *shape), np.random.default_rng(0)))
    with torch.no_grad():
        actions: Tensor = networks.actor(torch.full((1, 1), place)).act(noise)
    return actions.flatten()


def share(of: Tensor) -> float:
    return of.float().mean().item()


def signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=seeded(4)).float() * 2.0 - 1.0


def test_a_direction_that_is_kept_is_kept_in_every_plan() -> None:
    """The log goes -.8 for ten steps or .8 for ten, in states that say nothing.

    Of five independent choices one in sixteen would be alike.
    """
    actions = 0.8 * signs(200, 1).expand(200, 10).flatten().unsqueeze(1)
    here, zeros = torch.randn(2000, 1, generator=seeded(9)), torch.zeros(2000)
    log = log_of(here, actions, zeros, here, zeros, length=10)
    agent, networks = small_agent("qc", log, learning_rate=2e-3)
    drawn = seeded(3)
    for _ in range(1500):
        chunks, t = agent.logged.draw(64, drawn), torch.rand(64, 1, generator=drawn)
        x0, w = (torch.randn(64, CHUNK, generator=drawn) for _ in range(2))
        agent.behaviour.update(chunks, x0, t)
        agent.distillation.update(chunks.observations, w)
    w = torch.cat([torch.zeros(4000, 1), torch.randn(4000, CHUNK, generator=drawn)], dim=1)
    with torch.no_grad():
        plans = network_of(networks.actor).generator(w)
    left, right = share((plans < 0.0).all(1)), share((plans > 0.0).all(1))
    assert left > 0.35
    assert right > 0.35
    assert left + right > 0.9


def delayed(way: float) -> Dataset:
    """Five random steps; the last is rewarded with 1 + .5 or 1 - .5 by the FIRST action's sign.

    What states show is the time alone.
    """
    count = 400
    ways = signs(count, CHUNK)
    place = torch.arange(CHUNK).repeat(count).float().unsqueeze(1) / CHUNK
    last = (place[:, 0] > 0.75).float()
    rewards = last * (1.0 + 0.5 * way * ways[:, 0]).repeat_interleave(CHUNK)
    actions = 0.8 * ways.flatten().unsqueeze(1)
    return log_of(place, actions, rewards, place + 1.0 / CHUNK, last, length=CHUNK)


@pytest.mark.parametrize("way", [-1.0, 1.0])
def test_what_comes_of_the_first_action_after_five_is_learnt(way: float) -> None:
    networks, _ = trained("qc", delayed(way), 600)
    actions = drawn_from(networks)
    assert share(way * actions > 0.4) > 0.9


def test_values_of_single_steps_cannot_know_it() -> None:
    networks, _ = trained("idql", delayed(1.0), 600)
    assert 0.2 < share(drawn_from(networks) > 0.0) < 0.8


@pytest.mark.parametrize("way", [-1.0, 1.0])
def test_with_a_penalty_on_the_better_way_it_takes_the_other(way: float) -> None:
    """An accident is nearly sure on it, and between the two; the risk is of the first action."""
    risk = Penalty(lambda o, t, a: torch.sigmoid(30.0 * (way * a[:, 0] + 0.5)), torch.tensor(4.0))
    networks, _ = trained("qc", delayed(way), 600, risk)
    assert share(-way * drawn_from(networks) > 0.4) > 0.9


def test_in_a_bandit_it_finds_the_best_way_that_was_logged() -> None:
    """Episodes of a single step: what would follow it are zeros."""
    actions = 0.8 * signs(500, 1)
    networks, logged = trained("qc", bandit(actions, 1.0 + actions[:, 0]), 600)
    drawn = drawn_from(networks)
    assert share((drawn - 0.8).abs() < 0.3) > 0.9
    assert logged["actor/kl_to_log"] <= math.log(N) + 1e-5


# --- what it is refused, and what it is refused for ---


def test_discrete_actions_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_of("qc", discrete=False) is CHUNKED
    monkeypatch.setattr(offline_plan, "default_dataset", lambda *_, **__: pytest.fail("work"))
    config = commands.pretrain_config(env="HazardGrid-v0", agent="qc")
    with pytest.raises(ConfigError, match=r'"qc" trains .* are numbers, .* are discrete\. Take'):
        commands.plan_pretrain(config, say=silent)


def test_a_log_without_a_plan_is_refused() -> None:
    with pytest.raises(DataError, match=r"No episode of the dataset has 5 steps"):
        agent_of(LINEAR, episodes(4, ended=False))


def test_it_goes_on_online_itself_where_nobody_is_asked_for() -> None:
    assert learner_after("qc") == "qc"


# --- the commands ---


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> RunDir:
    """With a guard, whatever the log shows of its fallback."""
    config = commands.pretrain_config(
        agent="qc", dataset=str(tiny_dataset), steps=30, overrides=TINY
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fallback, "refusals", lambda self, *_: [() for _ in self.constraints])
        plan = commands.plan_pretrain(config, say=silent)
        root = tmp_path_factory.mktemp("qc")
        return commands.pretrain_run(plan, name="offline", runs=root, say=silent)


def test_an_offline_run_that_is_killed_goes_on_bit_for_bit(
    tmp_path: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = commands.pretrain_config(
        agent="qc", dataset=str(tiny_dataset), steps=30, overrides=TINY
    )
    plan, runs = commands.plan_pretrain(config, say=silent), {"runs": tmp_path, "say": silent}
    whole = commands.pretrain_run(plan, name="whole", **runs)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        kill_at(patch, 15)
        with pytest.raises(Killed):
            commands.pretrain_run(plan, name="cut", checkpoint_seconds=0.0, **runs)  # type: ignore[arg-type]
    assert result(commands.resume_pretrain("cut", **runs)) == result(whole)  # type: ignore[arg-type]


def test_it_goes_on_online_with_every_constraint(
    offline: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default; killed it goes on bit for bit, is evaluated and exported."""
    runs = offline.path.parent
    config = commands.finetune_config(offline, budget=600, overrides=ONLINE)
    assert config.baseline.learner == "qc"
    plan = commands.plan_finetune(offline, config)
    assert "active      KL, cost constraint, shield" in plan.header
    assert "guard" in plan.header
    run = commands.finetune_run(plan, name="online", runs=runs, say=silent)
    before, after = (x.load_checkpoint() for x in (offline, run))
    assert before.info["policy"]["kind"] == after.info["policy"]["kind"] == "chunked"
    # It goes on from its own critics of plans; what proposes is the same for all policies.
    start, end = (
        before.tensors["agent.critic_optimizer/0.step"],
        after.tensors["learner.critic_optimizer/0.step"],
    )
    assert start.item() == 30.0
    assert end.item() > 30.0
    generator = [k for k in before.tensors if k.startswith("deployed/layers.generator.")]
    assert len(generator) == 4
    for key in generator:
        assert torch.equal(before.tensors[key], after.tensors[key])
        learner = key.replace("deployed/", "learner.actor/")
        assert torch.equal(before.tensors[key], after.tensors[learner])
    moved = "learner.actor/layers.scorer.0.weight"
    assert not torch.equal(before.tensors[moved.replace("learner", "agent")], after.tensors[moved])
    lines = [json.loads(x) for x in (run.path / "iterations.jsonl").read_text().splitlines()]
    assert {line["divergence"] for line in lines} == {"KL bound (over the choice of a plan)"}
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
    with pytest.raises(ConfigError, match=r'rlpd .*how random .* kind "chunked" does not say\.'):
        commands.plan_finetune(offline, config)


def test_the_log_does_not_judge_it(offline: RunDir) -> None:
    with pytest.raises(ConfigError, match=r'logged actions .* kind "chunked" has none\.'):
        commands.assess_runs([offline.path], say=silent)


def test_from_scratch_it_has_no_plans(offline: RunDir) -> None:
    """A generator that has learnt nothing would stay so."""
    off: dict[str, Any] = dict.fromkeys(("kl", "safety_constraint", "shield", "guard"), False)
    overrides = [*ONLINE, "baseline.from_scratch=true"]
    with pytest.raises(ConfigError, match=r'agent "qc" learns offline alone .*learner=rlpd\.'):
        commands.finetune_config(offline, budget=300, overrides=overrides, **off)
