"""The online phase on HazardLine-v0, tiny networks: who acts, what is measured and kept."""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from safe_offrl.agents.rlpd import RLPD
from safe_offrl.agents.steering import Steering
from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError
from safe_offrl.policies.acting import NumpyActor
from safe_offrl.policies.networks import Actor, NetworkConfig, Risk, StackedMLP
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.guard import Guard, GuardConfig, Watch
from safe_offrl.safety.selection import SelectionConfig
from safe_offrl.safety.shield import ShieldConfig
from safe_offrl.spec import SafetySpec
from safe_offrl.train.baselines import BaselineConfig
from safe_offrl.train.finetune import Finetuning
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.iteration import Iteration
from safe_offrl.train.pretrain import Pretraining
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Batch, Episode

ENV = "HazardLine-v0"
HORIZON = 20
OFFLINE_MARK = 7.0  # return-to-go of every logged row here; online rows have 0
NETWORKS = NetworkConfig((16,), (16,), 3)
CRITIC = SafetyCriticConfig(members=3, reference=1, hidden=(16,))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    env = make_env(ENV, SafetySpec())
    arrays = log_episodes(
        env, behaviours=[random_behaviour(1)], shares=[1.0], transitions=1500, seed=0
    )
    path: Path = tmp_path_factory.mktemp("line") / "line.hdf5"
    metadata = {
        "env_id": ENV,
        "accident": "cost",
        "cost_threshold": 0.0,
        "horizon": HORIZON,
        "behaviours": [{"name": "random"}],
    }
    write_dataset(path, arrays, metadata)
    loaded = load_dataset(path, discount=0.99, spec=SafetySpec())
    mark = torch.full((len(loaded.rows),), OFFLINE_MARK)
    return replace(loaded, rows=loaded.layout.pack(loaded.transitions._replace(return_to_go=mark)))


@pytest.fixture(scope="module")
def pretraining(dataset: Dataset) -> Pretraining:
    config = PretrainConfig(
        env=ENV,
        steps=60,
        alignment_steps=20,
        batch_size=32,
        log_every=40,
        networks=NETWORKS,
        critic=CRITIC,
    )
    result = Pretraining(config, dataset)
    list(result.run())
    return result


def config_of(epsilon: float = 0.9, delta: float = 0.05, **settings: Any) -> FinetuneConfig:
    defaults: dict[str, Any] = {
        "budget": 500,
        "warmup_steps": 100,
        "iteration_steps": 60,
        "update_every": 3,
        "utd": 2,
        "batch_size": 32,
        "networks": NETWORKS,
        "critic": CRITIC,
        "safety": SafetySpec(epsilon=epsilon, delta=delta),
        "selection": SelectionConfig(share=0.0),
    }
    return FinetuneConfig(**{**defaults, **settings})


ALL_OFF = {"kl": False, "safety_constraint": False, "shield": False, "guard": False}


@dataclass
class Trace:
    """A run with everything that was sent to the environment and every policy that acted."""

    tuning: Finetuning
    episodes: list[Episode] = field(default_factory=list)
    iterations: list[Iteration] = field(default_factory=list)
    policies: dict[int, Actor] = field(default_factory=dict)  # by version
    sent: dict[int, list[tuple[np.ndarray, np.ndarray]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # episode -> (observation, action) pairs

    def run(self) -> Iterator[Episode | Iteration]:
        self.policies[self.tuning.deployment.version] = copy.deepcopy(self.tuning.deployment.actor)
        for item in self.tuning.run():
            if isinstance(item, Episode):
                self.episodes.append(item)
            else:
                assert isinstance(item, Iteration)
                self.iterations.append(item)
                self.policies[item.version] = copy.deepcopy(self.tuning.deployment.actor)
            yield item


def begin(
    config: FinetuneConfig,
    dataset: Dataset,
    pretraining: Pretraining,
    *,
    shield: bool = False,
    guard: Guard | None = None,
) -> Trace:
    env = make_env(ENV, config.safety)
    info = {**pretraining.info(), "shield_acts": shield}
    tensors = pretraining.state_dict()
    if guard is not None:
        info["guard"], tensors = json.loads(json.dumps(guard.words())), tensors | guard.tensors()
    trace = Trace(Finetuning(config, env, dataset, tensors, info))
    watch(env, trace)
    return trace


def watch(env: AccidentEnv, trace: Trace) -> None:
    reset, step = env.reset, env.step
    last: list[np.ndarray] = []

    def watched_reset(**arguments: Any) -> Any:
        observation, info = reset(**arguments)
        last[:] = [observation]
        return observation, info

    def watched_step(action: np.ndarray) -> Any:
        trace.sent[trace.tuning.episodes].append((last[0], action.copy()))
        result = step(action)
        last[:] = [result[0]]
        return result

    env.reset = watched_reset  # type: ignore[method-assign]
    env.step = watched_step  # type: ignore[method-assign]


def parameters(actor: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in actor.parameters()]


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# --- who acts ---


@pytest.mark.parametrize("settings", [{}, ALL_OFF], ids=["constrained", "all off"])
def test_every_action_is_the_deployed_policys_from_the_first_on(
    dataset: Dataset, pretraining: Pretraining, settings: dict[str, bool]
) -> None:
    """Replay: each action sent equals the action of the version on record. None is random."""
    config = config_of(seed=3, **settings)
    trace = begin(config, dataset, pretraining)
    list(trace.run())
    assert equal(trace.policies[0], pretraining.networks.actor)
    assert trace.episodes[0].version == 0
    rng = np.random.default_rng(config.seed)
    replayed = 0
    for episode in trace.episodes:
        actor = NumpyActor(trace.policies[episode.version])
        for observation, action in trace.sent[episode.index]:
            (expected,) = actor.draw(pretraining.normalizer(observation), 1, rng)
            np.testing.assert_array_equal(action, expected)
            replayed += 1
    assert replayed == trace.tuning.steps
    assert trace.tuning.deployment.version > 0


def test_warmup_is_the_frozen_pretrained_policys(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    trace = begin(config_of(), dataset, pretraining)
    tuning = trace.tuning
    critics, safety = (
        parameters(tuning.networks.critics),
        parameters(tuning.constraints[0].critic.net),
    )
    multiplier = tuning.constraints[0].multiplier.value.item()
    assert multiplier == pretraining.constraints[0].multiplier.value.item() > 0.0  # warm-started
    for item in trace.run():
        assert isinstance(item, Episode)
        assert item.phase == "warmup"
        assert item.version == 0
        assert equal(tuning.networks.actor, pretraining.networks.actor)
        if tuning.steps >= tuning.config.warmup_steps:
            break
    # At the end of the warm-up the critics have learnt, the actor has not.
    assert tuning.steps >= 100
    assert equal(tuning.networks.actor, pretraining.networks.actor)
    assert not torch.equal(critics[0], parameters(tuning.networks.critics)[0])
    assert not torch.equal(safety[0], parameters(tuning.constraints[0].critic.net)[0])
    assert tuning.constraints[0].multiplier.value.item() == multiplier
    for item in trace.run():
        if isinstance(item, Iteration):
            break
        assert item.phase == "online"


def test_the_shield_acts_and_executed_actions_are_stored(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    """Without a margin the first of four draws is the least risky one in every fourth step."""
    config = config_of(shielding=ShieldConfig(margin=0.0))
    trace = begin(config, dataset, pretraining, shield=True)
    list(trace.run())
    interventions = sum(e.shield_interventions for e in trace.episodes)
    assert interventions / sum(e.steps for e in trace.episodes) == pytest.approx(0.75, abs=0.08)
    experience = trace.tuning.experience
    stored = experience.buffer.recent_transitions(experience.buffer.size).actions.numpy()
    sent = [action for e in trace.episodes for _, action in trace.sent[e.index]]
    np.testing.assert_array_equal(stored, np.stack(sent))


def test_the_actor_is_steered_by_members_that_nothing_pushes(
    dataset: Dataset, pretraining: Pretraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = RLPD.update_actor
    asked: list[Risk] = []

    def watched(self: RLPD, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        asked.extend(penalty.risk for penalty in steering.penalties)
        return update(self, batch, steering)

    monkeypatch.setattr(RLPD, "update_actor", watched)
    trace = begin(config_of(), dataset, pretraining)
    next(item for item in trace.run() if isinstance(item, Iteration))
    assert set(asked) == {trace.tuning.constraints[0].critic.plain_risk}


def test_a_shield_that_is_switched_off_does_not_act_though_it_might(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    trace = begin(config_of(shield=False, budget=200), dataset, pretraining, shield=True)
    list(trace.run())
    assert not trace.tuning.deployment.shield.acts
    assert sum(e.shield_interventions for e in trace.episodes) == 0


# --- the guard ---

FROM = 0.68  # share of the horizon that is left where the fallback takes over
TAKEN = -0.25  # its action


def guard_of(
    dataset: Dataset, *, limit: float = 0.5, constraint: str = "accident", to_right: bool = False
) -> Guard:
    """A value of 1, whatever the action, where less than FROM of the horizon is left.

    ``to_right``: where the action's first number is above 0 instead.
    """
    observation, action = dataset.layout.sizes
    fallbacks = [Actor(observation, action, (4,), torch.Generator().manual_seed(0))] * 2
    with torch.no_grad():
        for parameter in fallbacks[0].parameters():
            parameter.zero_()
        parameter[:action] = math.atanh(TAKEN)
    net = StackedMLP(
        2, observation + 1 + action, (), layer_norm=True, generator=torch.Generator()
    ).requires_grad_(False)
    net.output.weight.zero_()
    if to_right:
        net.output.weight[:, observation + 1] = 300.0
        net.output.bias.zero_()
    else:
        net.output.weight[:, observation] = -70.0
        net.output.bias[:] = 70.0 * FROM
    return Guard(fallbacks, [Watch(constraint, limit, net, 1.0, constraint == "cost")])


def test_the_fallback_acts_where_the_guard_hands_over_and_it_is_counted(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    """Of a limit of cost: late, and where a step has cost 1 before."""
    safety = SafetySpec(constraint="cost", cost_limit=0.5)
    guard = guard_of(dataset, constraint="cost")
    trace = begin(config_of(safety=safety), dataset, pretraining, guard=guard)
    list(trace.run())
    buffer, row = trace.tuning.experience.buffer, 0
    assert trace.tuning.deployment.version > 0
    costs = buffer.recent_transitions(buffer.size).costs.tolist()
    for episode in trace.episodes:
        sent = [action for _, action in trace.sent[episode.index]]
        late = [
            1.0 - k / HORIZON < FROM or sum(costs[row : row + k]) >= 0.5 for k in range(len(sent))
        ]
        handed_over = buffer.recent_hand_overs(buffer.size)[row : row + len(sent)]
        assert handed_over == late
        assert episode.guarded_steps == sum(handed_over)
        assert [abs(float(a[0]) - TAKEN) < 1e-6 for a in sent] == handed_over
        row += len(sent)
    assert row == buffer.size == trace.tuning.steps
    stored = buffer.recent_transitions(buffer.size).actions.numpy()
    every = [action for e in trace.episodes for _, action in trace.sent[e.index]]
    np.testing.assert_array_equal(stored, np.stack(every))
    assert 0 < sum(e.guarded_steps for e in trace.episodes) < row


def test_of_accidents_the_fallback_acts_where_it_is_safer(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    """By .5 it is right of 0; left of that, and where it is late, nobody is safer."""
    guards = [guard_of(dataset, to_right=to_right) for to_right in (True, False)]
    trace, late = (begin(config_of(0.5), dataset, pretraining, guard=guard) for guard in guards)
    list(trace.run())
    buffer = trace.tuning.experience.buffer
    handed_over = buffer.recent_hand_overs(buffer.size)
    first = buffer.recent_transitions(buffer.size).actions[:, 0].tolist()
    assert 20 < sum(handed_over) < len(handed_over) - 20
    for over, action in zip(handed_over, first, strict=True):
        assert (abs(action - TAKEN) < 1e-6) if over else (action < 0.0)
    assert sum(e.guarded_steps for e in trace.episodes) == sum(handed_over)
    list(late.run())
    assert sum(e.guarded_steps for e in late.episodes) == 0


def test_the_guard_is_held_to_the_limits_and_the_caution_of_the_run(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    config = config_of(0.37, guarding=GuardConfig(caution=3.5))
    tuning = begin(config, dataset, pretraining, guard=guard_of(dataset)).tuning
    assert tuning.guard is not None
    assert [watch.limit for watch in tuning.guard.watches] == [0.37]
    assert tuning.guard.caution == 3.5
    assert tuning.policy.guard is tuning.guard
    kept = DeployedPolicy.restored(tuning.state_dict(), tuning.info()["policy"])
    assert kept.guard is not None
    assert kept.guard.sha256 == tuning.guard.sha256 != guard_of(dataset).sha256


def test_there_is_no_guard_where_it_is_off_or_none_was_left(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    guard = guard_of(dataset)
    assert begin(config_of(guard=False), dataset, pretraining, guard=guard).tuning.guard is None
    assert begin(config_of(), dataset, pretraining).tuning.guard is None
    # Pretrain runs of earlier versions do not say that there is none.
    earlier = {key: value for key, value in pretraining.info().items() if key != "guard"}
    env, config = make_env(ENV, SafetySpec(epsilon=0.9)), config_of()
    tuning = Finetuning(config, env, dataset, pretraining.state_dict(), earlier)
    assert tuning.guard is None
    assert "guard" not in tuning.info()["policy"]
    assert not any(name.startswith("guard") for name in tuning.state_dict())


def test_a_guard_that_never_hands_over_leaves_no_trace(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    """Nothing is ahead of anything."""
    whole, without = (
        begin(config_of(0.9), dataset, pretraining, guard=guard)
        for guard in (guard_of(dataset), None)
    )
    assert whole.tuning.guard is not None
    whole.tuning.guard.watches[0].net.output.weight.zero_()
    whole.tuning.guard.watches[0].net.output.bias.fill_(-30.0)
    for trace in (whole, without):
        list(trace.run())
    assert whole.episodes == without.episodes
    assert list(map(repr, whole.iterations)) == list(map(repr, without.iterations))
    one, other = whole.tuning.state_dict(), without.tuning.state_dict()
    assert {key for key in one if key not in other} == {k for k in one if k.startswith("guard/")}
    assert [key for key in other if not torch.equal(one[key], other[key])] == []


def test_the_guard_alone_does_not_keep_the_learner_from_acting(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    """It is deployed after every episode, untested, as with everything off; and guarded."""
    settings = ALL_OFF | {"guard": True}
    guard = guard_of(dataset, to_right=True)
    trace = begin(config_of(**settings), dataset, pretraining, guard=guard)
    list(trace.run())
    online = [e for e in trace.episodes if e.phase == "online"]
    assert [e.version for e in online] == list(range(len(online)))
    assert sum(e.guarded_steps for e in online) > 0
    assert len(trace.tuning.experience.buffer.rows) == trace.tuning.steps


# --- SOOPER's guard, a baseline ---


def sooper(dataset: Dataset, pretraining: Pretraining, epsilon: float, **settings: Any) -> Trace:
    off = ALL_OFF | {"guard": True}
    baseline = BaselineConfig(sooper=True)
    return begin(config_of(epsilon, baseline=baseline, **off, **settings), dataset, pretraining)


def test_the_guard_of_sooper_is_the_pretrained_policy_until_the_end(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    tuning = sooper(dataset, pretraining, 0.9).tuning
    assert tuning.guard is not None
    (fallback,), (watch,) = tuning.guard.fallbacks, tuning.guard.watches
    assert equal(fallback, pretraining.networks.actor)
    assert fallback is not tuning.networks.actor
    critic = pretraining.constraints[0].critic
    assert equal(watch.net, critic.net.select(critic.pushed))
    assert (watch.constraint, watch.limit, tuning.guard.caution) == ("accident", 0.9, 1.0)
    assert tuning.guard.until_end


def test_an_episode_ends_for_the_learner_where_it_is_handed_over(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    trace = sooper(dataset, pretraining, 0.9)
    guard = guard_of(dataset, limit=0.9)
    trace.tuning.guard = Guard(guard.fallbacks, guard.watches, until_end=True)
    running = trace.run()
    while not any(e.guarded_steps > 3 for e in trace.episodes):
        next(running)
    batch = trace.tuning.experience.buffer.recent_transitions(10_000)
    handed = trace.episodes[-1].guarded_steps
    assert len(batch.rewards) == sum(e.steps - e.guarded_steps for e in trace.episodes)
    assert batch.terminated[-1] == 1.0
    assert batch.time_to_go[-1].item() == pytest.approx(
        1.0 - (trace.episodes[-1].steps - handed - 1) / HORIZON
    )
    assert trace.tuning.steps == sum(e.steps for e in trace.episodes)  # all of them are charged


def test_an_episode_that_is_handed_over_at_its_first_step_teaches_nothing(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    """A limit that no state is below: whatever is learnt is learnt from the log."""
    trace = sooper(dataset, pretraining, 1e-6, budget=200)
    list(trace.run())
    assert all(e.guarded_steps == e.steps for e in trace.episodes)
    assert trace.tuning.experience.buffer.size == 0
    assert trace.tuning.steps > 150


# --- the two constraints, after every iteration ---


@pytest.mark.parametrize(("epsilon", "delta"), [(0.9, 0.05), (0.9, 0.002), (0.01, 0.05)], ids=str)
def test_both_constraints_hold_after_every_iteration(
    dataset: Dataset, pretraining: Pretraining, epsilon: float, delta: float
) -> None:
    config = config_of(epsilon, delta, budget=700, update_every=2)
    trace = begin(config, dataset, pretraining)
    tuning, accepted, excepted = trace.tuning, 0, 0
    previous, version, limit = copy.deepcopy(tuning.deployment.actor), 0, delta
    for item in trace.run():
        if not isinstance(item, Iteration):
            continue
        if item.accepted:
            accepted += 1
            assert item.version == version + 1
            # Measured again, here, on what the previous policy visited.
            observations = tuning.experience.buffer.recent_transitions(
                config.visited_steps
            ).observations
            with torch.no_grad():
                new, old = tuning.deployment.actor(observations), previous(observations)
            forward, reverse = new.divergence(old), old.divergence(new)
            assert forward.mean() < limit
            assert reverse.mean() < limit
            assert forward.quantile(0.95) < config.acceptance.tail_ratio * limit
            assert item.kl_forward_mean == pytest.approx(forward.mean().item(), abs=1e-5)
            assert item.kl_reverse_mean == pytest.approx(reverse.mean().item(), abs=1e-5)
            below = item.v_candidate < epsilon
            assert below or (item.v_previous >= epsilon and item.v_candidate < item.v_previous)
            excepted += not below
        elif not item.rolled_back:
            assert item.version == version
            assert equal(tuning.deployment.actor, previous)
        previous, version = copy.deepcopy(tuning.deployment.actor), item.version
        limit = float(tuning.deployment.delta)  # an alarm halves it
        if not tuning.stopped:
            assert equal(
                tuning.networks.actor, tuning.deployment.actor
            )  # the next proposal starts here
    assert accepted > 0
    assert (excepted > 0) == (epsilon == 0.01)  # the exception is needed there, and only there
    assert tuning.decisions.iterations == len(trace.iterations) >= 8


def test_an_adversarial_learner_never_acts(
    dataset: Dataset, pretraining: Pretraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner that jumps anywhere after each update is far outside the trust region."""
    update = RLPD.update_actor

    def wrecked(self: RLPD, *arguments: Any) -> dict[str, Tensor]:
        metrics = update(self, *arguments)
        with torch.no_grad():
            for parameter in self.networks.actor.parameters():
                parameter.add_(20.0)
        return metrics

    monkeypatch.setattr(RLPD, "update_actor", wrecked)
    trace = begin(config_of(), dataset, pretraining)
    list(trace.run())
    proposed = trace.iterations[1:]
    assert len(proposed) > 3
    assert not any(i.accepted for i in proposed)
    assert {i.version for i in proposed} == {trace.iterations[0].version}
    assert all("is not below" in i.reason for i in proposed)
    assert equal(trace.tuning.deployment.actor, pretraining.networks.actor)


def test_an_alarm_rolls_back_and_shrinks_delta(dataset: Dataset, pretraining: Pretraining) -> None:
    """Some 40 % of the episodes end in an accident; epsilon is 1 %."""
    trace = begin(config_of(0.01, 0.05, budget=700), dataset, pretraining)
    halvings = 0
    for item in trace.run():
        if isinstance(item, Iteration):
            halvings += item.reason.startswith("alarm")
            assert float(trace.tuning.deployment.delta) == pytest.approx(
                max(0.05 * 0.5**halvings, 0.05 / 16)
            )
            if item.reason.startswith("alarm"):
                assert not item.accepted
                assert not trace.tuning.monitor.alarm
            if item.rolled_back:
                assert equal(trace.tuning.deployment.actor, trace.tuning.deployment.certified)
                # Nothing was ever certified below 1 %, so it is the pretrained policy.
                assert equal(trace.tuning.deployment.actor, pretraining.networks.actor)
    assert halvings > 0


# --- symmetric sampling ---


@pytest.mark.parametrize(("utd", "share"), [(1, 0.5), (4, 0.5), (3, 0.25), (2, 0.0)])
def test_every_batch_of_every_utd_slice_has_its_share_of_logged_rows(
    dataset: Dataset,
    pretraining: Pretraining,
    monkeypatch: pytest.MonkeyPatch,
    utd: int,
    share: float,
) -> None:
    counts: dict[str, list[int]] = {"critics": [], "actor": [], "safety": []}

    def offline_rows(batch: Batch) -> int:
        assert batch.rewards.shape == (32,)
        mark = torch.tensor(OFFLINE_MARK) * pretraining.normalizer.reward_scale
        return int((batch.return_to_go == mark).sum())

    def watched(method: str, kind: type, name: str) -> None:
        original = getattr(kind, method)

        def watching(self: Any, batch: Batch, *arguments: Any, **named: Any) -> Any:
            counts[name].append(offline_rows(batch))
            return original(self, batch, *arguments, **named)

        monkeypatch.setattr(kind, method, watching)

    watched("update_critics", RLPD, "critics")
    watched("update_actor", RLPD, "actor")
    watched("update", SafetyCritic, "safety")
    trace = begin(config_of(budget=160, utd=utd, offline_share=share), dataset, pretraining)
    list(trace.run())
    updates = trace.tuning.steps // 3
    assert len(counts["critics"]) == updates * utd
    assert len(counts["safety"]) == updates
    assert 0 < len(counts["actor"]) < updates  # none while warming up
    assert set(counts["critics"] + counts["actor"] + counts["safety"]) == {round(32 * share)}


def test_the_estimate_that_decides_is_as_sure_as_was_asked(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    """At 50 % it is the mean itself; above it as many standard errors as a normal quantile."""

    def first(confidence: float) -> float:
        safety = SafetySpec(epsilon=0.9, confidence=confidence)
        trace = begin(config_of(safety=safety), dataset, pretraining)
        return next(e for e in trace.run() if isinstance(e, Iteration)).v_previous

    mean = first(0.5)
    usual = first(0.95) - mean
    assert usual > 0.0
    assert (first(0.99) - mean) / usual == pytest.approx(2.326 / 1.645, rel=1e-3)
    assert (first(0.8) - mean) / usual == pytest.approx(0.842 / 1.645, rel=1e-3)


# --- budgets ---


@pytest.mark.parametrize("budget", [20, 39, 173, 250])
def test_the_budget_is_never_exceeded_and_used_up(
    dataset: Dataset, pretraining: Pretraining, budget: int
) -> None:
    trace = begin(config_of(budget=budget), dataset, pretraining)
    list(trace.run())
    assert sum(len(actions) for actions in trace.sent.values()) == trace.tuning.steps
    assert budget - HORIZON < trace.tuning.steps <= budget
    left = budget - trace.tuning.steps
    words = f"{left} of {budget} steps are left, fewer than an episode of {HORIZON} may take"
    assert trace.tuning.stopped == (words if left else "the budget is spent")
    # The state is whole at the end: what is loaded from it has nothing left to do.
    again = begin(config_of(budget=budget), dataset, pretraining)
    again.tuning.load(trace.tuning.state_dict(), trace.tuning.info())
    assert list(again.run()) == []
    assert again.tuning.steps == trace.tuning.steps
    assert [e.index for e in trace.episodes] == list(range(len(trace.episodes)))
    assert trace.episodes[-1].total_steps == trace.tuning.steps


def test_the_last_part_tests_who_has_acted(dataset: Dataset, pretraining: Pretraining) -> None:
    """In the last 200 of 500 steps nobody learns; who acts there is one that acted before."""
    selection = SelectionConfig(share=0.4, neighbours=0)
    trace = begin(config_of(selection=selection), dataset, pretraining)
    tuning = trace.tuning
    before: list[Tensor] = []
    learnt = 0  # the last version that learning made
    for item in trace.run():
        if isinstance(item, Episode) and item.phase == "testing":
            assert item.total_steps - item.steps >= 300
            assert all(map(torch.equal, before, parameters(tuning.networks.critics)))
            assert any(equal(tuning.deployment.actor, trace.policies[v]) for v in range(learnt + 1))
        elif isinstance(item, Episode) and tuning.config.testing(item.total_steps):
            before = parameters(tuning.networks.critics)
            learnt = item.version
    tests = [e for e in trace.episodes if e.phase == "testing"]
    assert sum(e.steps for e in tests) > 200 - 2 * HORIZON
    assert tuning.steps > 500 - HORIZON
    # By hand: the versions before, by the returns of their own episodes.
    evidence: dict[int, list[Episode]] = defaultdict(list)
    for episode in trace.episodes:
        if episode.phase != "testing":
            evidence[episode.version].append(episode)

    def error(values: Sequence[float]) -> float:
        return float(np.std(values, ddof=1)) / len(values) ** 0.5

    kept, upper = {}, {}
    for version, played in evidence.items():
        if len(played) >= 3:
            returns, accidents = zip(*((e.episode_return, e.accident) for e in played), strict=True)
            upper[version] = np.mean(accidents) + error(accidents)
            if upper[version] <= 0.9:
                kept[version] = np.mean(returns) - error(returns)
    best = max(kept, key=lambda v: kept[v])
    assert equal(trace.policies[tests[0].version], trace.policies[best])
    assert trace.iterations[-1].step >= 300
    selected = [i for i in trace.iterations if i.reason.startswith(f"selected: version {best}")]
    assert selected
    assert selected[0].rolled_back
    assert selected[0].version == tests[0].version != best
    assert selected[0].v_candidate == pytest.approx(upper[best])  # what its own episodes showed
    # Who is handed over was tested.
    assert tuning.decisions.selection.tested > 0
    tested = {e.version for e in tests}
    assert any(equal(tuning.deployment.actor, trace.policies[v]) for v in tested)


def test_a_learner_that_nothing_tests_is_not_selected_from(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    selection = SelectionConfig(share=0.4)
    trace = begin(config_of(selection=selection, **ALL_OFF), dataset, pretraining)
    list(trace.run())
    assert {e.phase for e in trace.episodes} == {"warmup", "online"}
    assert not trace.tuning.decisions.selection.parts()


@pytest.mark.parametrize("budget", range(300, 400, 20))
def test_what_is_handed_over_has_acted(
    dataset: Dataset, pretraining: Pretraining, budget: int
) -> None:
    """A proposal after every episode, the last one apart."""
    trace = begin(config_of(budget=budget, iteration_steps=1), dataset, pretraining)
    list(trace.run())
    assert trace.tuning.policy.version == trace.episodes[-1].version > 0
    assert trace.iterations[-1].step < trace.tuning.steps


def test_an_alarm_is_answered_behind_the_last_episode(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    """The only decision falls there, for the warm-up takes all of the budget but one episode."""
    config = config_of(epsilon=0.01, budget=300, warmup_steps=280, iteration_steps=1)
    trace = begin(config, dataset, pretraining)
    list(trace.run())
    (decision,) = trace.iterations
    assert decision.step == trace.tuning.steps
    assert decision.reason.startswith("alarm")
    assert not trace.tuning.alarm


def test_a_budget_below_one_episode_is_refused(dataset: Dataset, pretraining: Pretraining) -> None:
    with pytest.raises(ConfigError, match="too small for one episode"):
        begin(config_of(budget=HORIZON - 1), dataset, pretraining)


def test_the_accident_budget_stops_the_run(dataset: Dataset, pretraining: Pretraining) -> None:
    trace = begin(config_of(accident_budget=4), dataset, pretraining)
    list(trace.run())
    assert sum(e.accident for e in trace.episodes) == 4
    assert trace.episodes[-1].accident
    assert trace.tuning.stopped == "the accident budget of 4 is spent"
    assert trace.tuning.steps < 500 - HORIZON


# --- ablations ---


def test_all_off_is_plain_learning_from_the_same_policy(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    trace = begin(config_of(epsilon=0.01, **ALL_OFF), dataset, pretraining, shield=True)
    tuning = trace.tuning
    before = parameters(tuning.constraints[0].critic.net)
    for item in trace.run():
        if isinstance(item, Iteration) and item.accepted:
            assert equal(tuning.deployment.actor, tuning.networks.actor)
            assert tuning.deployment.actor is not tuning.networks.actor
    online = [e for e in trace.episodes if e.phase == "online"]
    # The learner acts in the next episode, whatever it has become.
    assert [e.version for e in online] == list(range(online[0].version, tuning.deployment.version))
    assert len(trace.policies) == tuning.deployment.version + 1
    assert not any(i.rolled_back for i in trace.iterations)
    assert tuning.constraints[0].multiplier.value.item() == 0.0
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, parameters(tuning.constraints[0].critic.net), strict=True)
    )
    assert not equal(tuning.deployment.actor, pretraining.networks.actor)


def test_no_kl_measures_it_all_the_same(dataset: Dataset, pretraining: Pretraining) -> None:
    trace = begin(config_of(0.9, 1e-9, kl=False), dataset, pretraining)
    list(trace.run())
    moved = [i for i in trace.iterations if i.accepted and i.kl_forward_mean > 1e-9]
    assert moved  # beyond a delta of 1e-9
    assert not any(i.constraints_satisfied for i in moved)


def test_no_safety_constraint_leaves_the_trust_region(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    trace = begin(config_of(0.0001, safety_constraint=False), dataset, pretraining)
    list(trace.run())
    accepted = [i for i in trace.iterations if i.accepted]
    assert accepted
    assert all(max(i.kl_forward_mean, i.kl_reverse_mean) < i.delta for i in accepted)
    assert all(i.multiplier == 0.0 for i in trace.iterations)
    assert not any(i.constraints_satisfied for i in accepted)


# --- resume ---


def assert_resumed_bitwise(
    dataset: Dataset,
    pretraining: Pretraining,
    stop_at: int,
    settings: dict[str, Any],
    guard: Guard | None = None,
) -> None:
    config = config_of(**settings)
    whole = begin(config, dataset, pretraining, shield=True, guard=guard)
    kept: tuple[dict[str, Tensor], str, int] | None = None
    for item in whole.run():
        if isinstance(item, Iteration) and item.index + 1 == stop_at:
            kept = whole.tuning.state_dict(), json.dumps(whole.tuning.info()), len(whole.episodes)
    assert kept is not None
    assert ("experience/handed_over" in kept[0]) == (guard is not None)
    rest = begin(config, dataset, pretraining, shield=True, guard=guard)
    rest.tuning.load(kept[0], json.loads(kept[1]))
    list(rest.run())
    assert rest.episodes == whole.episodes[kept[2] :]
    # as text: NaN is not equal to itself
    assert [repr(i) for i in rest.iterations] == [repr(i) for i in whole.iterations[stop_at:]]
    one, other = whole.tuning.state_dict(), rest.tuning.state_dict()
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert json.dumps(whole.tuning.info()) == json.dumps(rest.tuning.info())


@pytest.mark.parametrize(
    ("stop_at", "settings"), [(1, {}), (3, {}), (4, ALL_OFF)], ids=["first", "third", "all off"]
)
def test_resume_equals_uninterrupted_bitwise(
    dataset: Dataset, pretraining: Pretraining, stop_at: int, settings: dict[str, Any]
) -> None:
    assert_resumed_bitwise(dataset, pretraining, stop_at, settings)


@pytest.mark.parametrize("stop_at", [1, 3])
@pytest.mark.parametrize("constraint", ["accident", "cost"])
def test_resume_is_bitwise_behind_a_guard(
    dataset: Dataset, pretraining: Pretraining, constraint: str, stop_at: int
) -> None:
    """Who acted is in the checkpoint: sums of costs stop where the fallback began to."""
    safety = SafetySpec(constraint=constraint, epsilon=0.9, cost_limit=0.5)
    guard = guard_of(dataset, constraint=constraint, to_right=constraint == "accident")
    assert_resumed_bitwise(dataset, pretraining, stop_at, {"safety": safety}, guard)


@pytest.mark.parametrize("stop_at", [2, 5, 7])
def test_resume_is_bitwise_while_versions_are_tested(
    dataset: Dataset, pretraining: Pretraining, stop_at: int
) -> None:
    selection = SelectionConfig(share=0.5, neighbours=1, kept=2)
    assert_resumed_bitwise(dataset, pretraining, stop_at, {"selection": selection})


@pytest.mark.parametrize("stop_at", [3, 4, 5, 6])
def test_resume_is_bitwise_where_an_episode_pays_for_no_update(
    dataset: Dataset, pretraining: Pretraining, stop_at: int
) -> None:
    """All off there is an iteration after every episode, and most are shorter than 40 steps."""
    assert_resumed_bitwise(dataset, pretraining, stop_at, {**ALL_OFF, "update_every": 40})


@pytest.mark.promise("R8")
def test_two_runs_are_equal_and_seeds_matter(dataset: Dataset, pretraining: Pretraining) -> None:
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(int(np.random.default_rng().integers(1000)))  # must not matter
        trace = begin(config_of(seed=seed, budget=200), dataset, pretraining)
        runs.append([repr(item) for item in trace.run()])
    assert runs[0] == runs[1] != runs[2]


# --- settings ---


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 0},
        {"accident_budget": 0},
        {"warmup_steps": 0},
        {"iteration_steps": 0},
        {"utd": 0},
        {"update_every": 0},
        {"batch_size": 1},
        {"offline_share": 1.0},
        {"visited_steps": 0},
        {"visited_episodes": -1},
        {"offline_share": -0.1},
        {"offline_share": math.nan},
    ],
    ids=str,
)
def test_settings_that_cannot_run_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config_of(**settings)


@pytest.mark.promise("R9")
@pytest.mark.parametrize(
    ("spoil", "loss"),
    [
        (lambda loop: loop.networks.critics, "RLPD.critic_loss"),
        (lambda loop: loop.networks.actor, "RLPD.critic_loss"),  # its actions are in the targets
        (lambda loop: loop.constraints[0].critic.net, "SafetyCritic.loss"),
        (lambda loop: [loop.constraints[0].multiplier.value], "RLPD.actor_loss"),
    ],
    ids=["critics", "actor", "safety critic", "multiplier"],
)
def test_learning_that_diverges_stops_before_an_optimiser_steps(
    dataset: Dataset, pretraining: Pretraining, spoil: Callable[[Finetuning], Any], loss: str
) -> None:
    trace = begin(config_of(), dataset, pretraining)
    loop = trace.tuning
    running = trace.run()
    while not trace.iterations:
        next(running)
    spoilt = spoil(loop)
    tensors = list(spoilt.parameters() if isinstance(spoilt, torch.nn.Module) else spoilt)
    with torch.no_grad():
        tensors[0].fill_(math.nan)
    with pytest.raises(FloatingPointError, match=f"^{loss} is nan"):
        list(running)
    networks = (loop.networks.critics, loop.networks.actor, loop.constraints[0].critic.net)
    for parameter in (p for net in networks for p in net.parameters()):
        assert any(parameter is t for t in tensors) or parameter.isfinite().all()
