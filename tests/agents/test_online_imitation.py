"""GAIL and DAgger: what they learn online by hand, who they imitate, and all of their commands."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safe_offrl import commands
from safe_offrl.agents import AgentConfigs, kind_of, learner_after, online_agent
from safe_offrl.agents.bc import BC, BCSafe
from safe_offrl.agents.dagger import DAggerConfig, OnlineDAgger
from safe_offrl.agents.gail import GAIL, GAILConfig, OnlineGAIL
from safe_offrl.agents.rlpd import RLPDConfig
from safe_offrl.agents.steering import Steering
from safe_offrl.commands.online import start_loop
from safe_offrl.compute.state import collect_state, seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import uniform_batches
from safe_offrl.errors import ConfigError, DataError
from safe_offrl.limits import Limit
from safe_offrl.policies.categorical import Categorical
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.policies.one_step import ONE_STEP
from safe_offrl.record.run import RunDir
from safe_offrl.train.fallback import Fallback
from safe_offrl.types import Batch
from tests.agents.setups import LIMIT, setup_of
from tests.agents.small_problems import bandit, log_of
from tests.agents.test_latent_steering import ONLINE, TINY, silent
from tests.agents.test_toy_agent import Killed, kill_at, result

NOTHING_ELSE = Steering()
SIZES = NetworkConfig((32,), (32,), 4)
by_name = pytest.mark.parametrize("name", ["gail", "dagger"])


def learner_of(
    name: str,
    log: Dataset,
    *,
    configs: AgentConfigs | None = None,
    discrete: bool = False,
    **settings: Any,
) -> tuple[Any, Networks]:
    generator = seeded(0)
    kind = kind_of(name, discrete=discrete)
    networks = Networks(*log.layout.sizes, SIZES, generator, kind)
    setup = setup_of(networks, generator, log, **settings)
    return online_agent(name, setup, configs or AgentConfigs()), networks


def gail_of(log: Dataset, config: GAILConfig | None = None, **settings: Any) -> OnlineGAIL:
    learner, _ = learner_of(
        "gail", log, configs=AgentConfigs(gail=config or GAILConfig()), **settings
    )
    assert isinstance(learner, OnlineGAIL)
    return learner


def dagger_of(log: Dataset, **settings: Any) -> OnlineDAgger:
    learner, _ = learner_of("dagger", log, **settings)
    assert isinstance(learner, OnlineDAgger)
    return learner


def steps_at(states: list[float], actions: list[float]) -> Dataset:
    """One step each, from these states."""
    zeros, here = torch.zeros(len(states)), torch.tensor(states).unsqueeze(1)
    return log_of(here, torch.tensor(actions).unsqueeze(1), zeros, here, zeros + 1.0)


EIGHT = steps_at([float(i) for i in range(8)], [0.1 * i for i in range(8)])


def together(*batches: Batch) -> Batch:
    return Batch(*(torch.cat(x) for x in zip(*(b.tensors for b in batches), strict=True)))


# --- GAIL by hand ---


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def says_(learner: OnlineGAIL) -> None:
    """Make the logit of a step ten times its action."""
    learner.discriminator.logits = lambda batch: 10.0 * batch.actions[:, 0]  # type: ignore[method-assign]


def test_the_discriminator_s_loss_is_by_hand() -> None:
    """Logits of demonstrations 1 and -2, of what was played 3 and 0: log D and log(1 - D)."""
    learner = gail_of(EIGHT)
    says_(learner)
    demonstrated = steps_at([0.0, 0.0], [0.1, -0.2]).transitions
    (loss,) = learner.discriminator.loss(demonstrated, steps_at([0.0, 0.0], [0.3, 0.0]).transitions)
    by_hand = (softplus(-1.0) + softplus(2.0) + softplus(3.0) + math.log(2.0)) / 2.0
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_rewards_are_bounded_and_0_where_nobody_can_tell() -> None:
    """-log(1 - D) is log(1 + exp(logit)); ends of episodes, worth 0, neither pay nor cost then."""
    learner = gail_of(EIGHT)
    says_(learner)
    steps = steps_at([0.0] * 5, [0.0, 0.2, -0.1, 0.9, -0.9]).transitions
    logits = (0.0, 2.0, -1.0, 5.0, -5.0)
    by_hand = [softplus(x) - math.log(2.0) for x in logits]
    assert learner.discriminator.rewards(steps).tolist() == pytest.approx(by_hand, abs=1e-6)
    assert by_hand[0] == 0.0


def test_what_was_played_is_held_against_as_many_demonstrations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 8 rows the first quarter is logged: 6 were played, and critics see rewards of all 8."""
    demonstrations = steps_at([50.0], [0.5])
    learner = gail_of(demonstrations, offline_share=0.25)
    says_(learner)
    seen: dict[str, Any] = {}

    def update(demonstrated: Batch, online: Batch) -> Tensor:
        seen["demonstrated"] = demonstrated.observations.flatten().tolist()
        seen["online"] = online.observations.flatten().tolist()
        return torch.zeros(())

    def update_critics(batch: Batch) -> dict[str, Tensor]:
        seen["batch"] = batch
        return {}

    monkeypatch.setattr(learner.discriminator, "update", update)
    monkeypatch.setattr(learner.learner, "update_critics", update_critics)
    batch = EIGHT.transitions
    metrics = learner.update_critics(batch._replace(rewards=torch.full((8,), 99.0)))
    assert seen["demonstrated"] == [50.0] * 6
    assert seen["online"] == [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    by_hand = [softplus(min(float(i), 5.0)) - math.log(2.0) for i in range(8)]
    assert seen["batch"].rewards.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert torch.equal(seen["batch"].actions, batch.actions)
    assert metrics["learner/imitation_reward"].item() == pytest.approx(sum(by_hand[2:]) / 6.0)


def test_the_environment_s_reward_has_no_part_in_it() -> None:
    states = []
    for rewards in (0.0, 7.0):
        learner = gail_of(EIGHT)
        batch = EIGHT.transitions._replace(rewards=torch.full((8,), rewards))
        for _ in range(3):
            learner.update_critics(batch)
            learner.update_actor(batch, NOTHING_ELSE)
        states.append(collect_state(learner.parts()))
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_the_discriminator_learns_with_the_critics_and_not_with_the_actor() -> None:
    learner, batch = gail_of(EIGHT), EIGHT.transitions
    network = {"discriminator": learner.discriminator.network}
    before = collect_state(network)
    learner.update_actor(batch, NOTHING_ELSE)
    assert all(torch.equal(v, before[k]) for k, v in collect_state(network).items())
    learner.update_critics(batch)
    assert not any(torch.equal(v, before[k]) for k, v in collect_state(network).items())


def test_a_policy_without_entropy_is_refused() -> None:
    networks = Networks(1, 1, SIZES, seeded(0), ONE_STEP)
    with pytest.raises(ConfigError, match=r"The entropy that gail keeps .* \"one_step\" does not"):
        online_agent("gail", setup_of(networks, seeded(0), EIGHT), AgentConfigs())


def test_rlpd_has_its_discount() -> None:
    learner = gail_of(EIGHT, GAILConfig(discount=0.5), learner=RLPDConfig(discount=0.9, tau=0.1))
    assert (learner.learner.config.discount, learner.learner.config.tau) == (0.5, 0.1)


def test_values_that_are_all_but_0_are_not_blown_up() -> None:
    """Q = .01 a: divided by 1, its slope over the mean of actions stays .01."""
    learner, batch = gail_of(EIGHT), EIGHT.transitions
    networks = learner.learner.networks
    networks.q = lambda observations, actions: 0.01 * actions[:, 0].expand(2, -1)  # type: ignore[method-assign]
    with torch.no_grad():
        learner.learner.log_temperature.fill_(-40.0)
    noise = torch.zeros(8, *networks.actor.noise_shape)
    with torch.no_grad():
        policy = networks.actor(batch.observations).quadrature(noise)
    loss, _ = learner.learner.actor_loss(batch, noise, (), None, 0.0)
    by_hand = -0.01 * policy.expect(policy.actions[:, 0]).mean().item()
    assert loss.item() == pytest.approx(by_hand, rel=1e-4)


def unsafe_and_safe() -> Dataset:
    """Four episodes of a step; those from 1 and 3 have an accident."""
    log = steps_at([0.0, 1.0, 2.0, 3.0], [0.0] * 4)
    accidents = torch.tensor([0.0, 1.0, 0.0, 1.0])
    rows = log.layout.pack(log.transitions._replace(accidents=accidents))
    return Dataset(rows, log.layout, log.episode_starts, log.truncated, 1, "")


@pytest.mark.parametrize("safe_only", [False, True])
def test_demonstrations_are_the_log_or_what_is_safe_of_it(safe_only: bool) -> None:
    config = GAILConfig(safe_only=safe_only)
    learner = gail_of(unsafe_and_safe(), config)
    shown = learner.demonstrations.transitions.observations.flatten().tolist()
    assert shown == ([0.0, 2.0] if safe_only else [0.0, 1.0, 2.0, 3.0])
    networks = Networks(1, 1, SIZES, seeded(0), kind_of("gail", discrete=False))
    agent = GAIL(setup_of(networks, seeded(0), unsafe_and_safe()), config)
    assert isinstance(agent.imitation, BCSafe if safe_only else BC)


def test_without_a_safe_episode_it_says_so() -> None:
    log = unsafe_and_safe().subset(torch.tensor([1, 3]).numpy())
    with pytest.raises(DataError, match="so gail has nothing to imitate"):
        gail_of(log, GAILConfig(safe_only=True))
    assert gail_of(log).demonstrations.episodes == 2
    assert Limit("accident", 0.1, 1.0) == LIMIT


def test_it_recovers_how_often_a_demonstrator_chose_whatever_is_paid() -> None:
    """60, 30 and 10 %, where the environment pays for the last one alone."""
    g, share = seeded(5), torch.tensor([0.6, 0.3, 0.1])
    chosen = torch.eye(3)[torch.multinomial(share, 1000, True, generator=g)]
    log = bandit(chosen, 5.0 * chosen[:, 2])
    learner, networks = learner_of(
        "gail",
        log,
        configs=AgentConfigs(gail=GAILConfig(learning_rate=3e-3)),
        discrete=True,
        learner=RLPDConfig(learning_rate=3e-3, tau=0.05),
    )
    policies = []
    for _ in range(800):
        logged, online = uniform_batches(log.rows, log.layout, 2, 32, g)
        with torch.no_grad():
            policy = networks.actor(online.observations)
        assert isinstance(policy, Categorical)
        probabilities = policy.log_probs.exp()
        policies.append(probabilities.mean(0))
        played = torch.eye(3)[torch.multinomial(probabilities, 1, generator=g)[:, 0]]
        batch = together(logged, online._replace(actions=played, rewards=5.0 * played[:, 2]))
        learner.update_critics(batch)
        learner.update_actor(batch, NOTHING_ELSE)
    # It goes round about it, as players of a game do.
    assert torch.stack(policies[400:]).mean(0).tolist() == pytest.approx(share.tolist(), abs=0.07)


# --- DAgger by hand ---


def test_online_rows_have_the_controller_s_actions() -> None:
    learner = dagger_of(EIGHT, offline_share=0.25, controller=lambda o: -0.1 * o)
    batch = learner.labelled(EIGHT.transitions)
    by_hand = [0.0, 0.1, -0.2, -0.3, -0.4, -0.5, -0.6, -0.7]
    assert batch.actions.flatten().tolist() == pytest.approx(by_hand)
    assert torch.equal(batch.observations, EIGHT.transitions.observations)


def test_its_loss_is_the_likelihood_of_logged_actions_and_labels() -> None:
    learner = dagger_of(EIGHT, controller=lambda o: -0.1 * o)
    batch = EIGHT.transitions
    by_hand = torch.tensor([0.0, 0.1, 0.2, 0.3, -0.4, -0.5, -0.6, -0.7]).unsqueeze(1)
    p = learner.actor.density(batch.observations).log_prob(by_hand)
    loss = learner.update_actor(batch, NOTHING_ELSE)["learner/actor_loss"]
    assert loss.item() == pytest.approx(-p.mean().item(), rel=1e-5)


def test_it_learns_no_values() -> None:
    learner, networks = learner_of("dagger", EIGHT)
    before = collect_state(networks.parts() | learner.parts())
    assert learner.update_critics(EIGHT.transitions) == {}
    after = collect_state(networks.parts() | learner.parts())
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert "critics" not in learner.parts()


def test_without_a_controller_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="dagger needs a controller"):
        dagger_of(EIGHT, controller=None)


def test_it_learns_what_the_log_never_had() -> None:
    """Logged are states below 0 and the action .6; the controller takes -.6 above 0."""
    g = seeded(5)
    below = -torch.rand(500, 1, generator=g)
    log = steps_at(below.flatten().tolist(), [0.6] * 500)
    learner, networks = learner_of(
        "dagger",
        log,
        configs=AgentConfigs(dagger=DAggerConfig(learning_rate=3e-3)),
        controller=lambda o: torch.where(o > 0.0, -0.6, 0.6),
    )
    for _ in range(300):
        logged, online = uniform_batches(log.rows, log.layout, 2, 32, g)
        online = online._replace(observations=-online.observations)  # and other actions than its
        learner.update_actor(together(logged, online), NOTHING_ELSE)
    with torch.no_grad():
        policy = networks.actor(torch.tensor([[-0.5], [0.5]]))
        actions = policy.act(torch.zeros(2, *networks.actor.noise_shape)).flatten()
    assert actions.tolist() == pytest.approx([0.6, -0.6], abs=0.1)


# --- the commands ---


Pretrained = Callable[[str], RunDir]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> Pretrained:
    """The run of an agent, made once, with a guard whatever the log shows of its fallback."""

    def made(name: str) -> RunDir:
        config = commands.pretrain_config(
            agent=name, dataset=str(tiny_dataset), steps=30, overrides=TINY
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Fallback, "refusals", lambda self, *_: [() for _ in self.constraints])
            plan = commands.plan_pretrain(config, say=silent)
            root = tmp_path_factory.mktemp(name)
            return commands.pretrain_run(plan, name="offline", runs=root, say=silent)

    return functools.cache(made)


def online_plan(run: RunDir, *overrides: str) -> commands.FinetunePlan:
    config = commands.finetune_config(run, budget=600, overrides=[*ONLINE, *overrides])
    return commands.plan_finetune(run, config, accept_risk=True)


def asking(controller: str) -> str:
    return f"baseline.agents.dagger.controller={controller}"


@by_name
def test_it_goes_on_online_itself_with_every_constraint(
    name: str, offline: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default; killed it goes on bit for bit, and is evaluated."""
    pretrained, overrides = offline(name), [asking("cautious")] if name == "dagger" else []
    runs, plan = pretrained.path.parent, online_plan(pretrained, *overrides)
    assert "active      KL, cost constraint, shield" in plan.header
    assert "guard" in plan.header
    words = "goes on online in a form of its own: offline it is behaviour cloning"
    assert f"\nlearner     {name} {words}\n" in plan.header
    run = commands.finetune_run(plan, name="online", runs=runs, say=silent)
    before, after = (x.load_checkpoint().tensors for x in (pretrained, run))
    moved = "actor/layers.0.weight"
    assert not torch.equal(before[f"agent.{moved}"], after[f"learner.{moved}"])
    step = "actor_optimizer/0.step"
    if name == "dagger":  # its likelihood goes on where it was
        assert before[f"agent.{step}"].item() == 30.0 < after[f"learner.{step}"].item()
    else:  # its critics are as old as its discriminator, and not those that were aligned
        steps = [after[f"learner.{x}_optimizer/0.step"] for x in ("critic", "discriminator")]
        assert steps[0].item() == steps[1].item() > 0.0
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            commands.finetune_run(
                online_plan(pretrained, *overrides),
                name="cut",
                runs=runs,
                checkpoint_seconds=0.0,
                say=silent,
            )
    assert result(commands.resume_finetune("cut", runs=runs, say=silent)) == result(run)
    assert commands.evaluate_run(run.path, episodes=2, say=silent)["episodes"] == 2


def test_what_gail_begins_online_with(offline: Pretrained) -> None:
    """The policy that has imitated, and critics that know nothing of the environment's reward."""
    plan, before = (
        online_plan(offline("gail"), "offline_share=0.25"),
        offline("gail").load_checkpoint().tensors,
    )
    learner = start_loop(plan).learner
    plan.env.close()
    assert isinstance(learner, OnlineGAIL)
    assert learner.offline_share == 0.25
    now = collect_state(learner.parts())
    networks = ("actor", "critics", "target_critics")
    keys = [key for key in now if key.partition("/")[0] in networks]
    same = {key: torch.equal(now[key], before[f"learner.{key}"]) for key in keys}
    assert len(same) == 12
    assert all(value == key.startswith("actor/") for key, value in same.items())
    critics = {key: value for key, value in now.items() if key.startswith("critics/")}
    assert all(torch.equal(value, now[f"target_{key}"]) for key, value in critics.items())


@by_name
def test_rlpd_can_be_asked_for(name: str, offline: Pretrained) -> None:
    plan = online_plan(offline(name), "baseline.learner=rlpd")
    plan.env.close()
    assert "\nlearner " not in plan.header


def test_a_controller_must_be_chosen_where_there_are_several(offline: Pretrained) -> None:
    which = r"it must be told which of the ones .* hurried, moderate, cautious\. Set baseline\.a"
    with pytest.raises(ConfigError, match=which):
        online_plan(offline("dagger"), asking(""))
    with pytest.raises(ConfigError, match=r'"bold" is not among the ones .* hurried, moderate, '):
        online_plan(offline("dagger"), asking("bold"))


@by_name
def test_who_goes_on_online_where_nobody_is_asked_for(name: str) -> None:
    assert learner_after(name) == name
    assert learner_after("bc") == "rlpd"
