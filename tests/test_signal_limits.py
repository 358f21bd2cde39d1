"""A limit of a named cost signal: whatever is limited sees the costs of this signal alone."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from safe_offrl import commands
from safe_offrl.agents.bc import safe_episodes
from safe_offrl.assess.assessment import assess_policy
from safe_offrl.assess.fitted_features import FittedConfig, episode_totals
from safe_offrl.certify.certificate import Claim, contribution, play, reserve, sealed
from safe_offrl.certify.recheck import recheck
from safe_offrl.check.situations import find_situations
from safe_offrl.collect.build import _unsafe_episodes
from safe_offrl.collect.penalty import Account, Penalised
from safe_offrl.commands.common import logged_signals, require_both_outcomes
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.online_buffer import OnlineBuffer
from safe_offrl.data.sampling import Reach, RiskSampler
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.deploy import export
from safe_offrl.deploy.episodes import play_episode
from safe_offrl.deploy.evaluate import evaluate
from safe_offrl.deploy.graph import Inputs, Outputs, PolicyGraph
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, DataError, EnvFault
from safe_offrl.limits import ACCIDENT, COST, Limit, quantity_named
from safe_offrl.policies.networks import Actor, NetworkConfig
from safe_offrl.policy import load_policy
from safe_offrl.record.final_policy import final_policy, stored_policy
from safe_offrl.record.ledger import parse_ledger
from safe_offrl.record.online_curves import OnlineCurves
from safe_offrl.record.run import RunDir
from safe_offrl.report.charts.outcome import harm
from safe_offrl.report.run_data import read_run
from safe_offrl.safety.critic import SafetyCriticConfig
from safe_offrl.safety.guard import Guard, Watch
from safe_offrl.safety.monitor import SafetyMonitor
from safe_offrl.safety.outlook import CostAhead, accident_within
from safe_offrl.safety.shield import Shield
from safe_offrl.spec import SafetySpec
from safe_offrl.train.fallback import Fallback
from safe_offrl.train.foundation import Foundation, settings_of
from safe_offrl.train.pretrain import Pretraining
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Batch, Episode, Layout, Normalizer
from tests.safety.test_guard import LEFT, fallback, guard_of, net_of, v
from tests.test_resume import killed, record, silent
from tests.toll_line import ENV, HORIZON, SIGNALS, TINY, logged_tolls

ONLINE = ["warmup_steps=100", "iteration_steps=60", "batch_size=16"]
LIMITS = {"right": 40.0, "cost": 15.0}  # of at most 60 and 20 an episode
SOURCES = {"a": "a", "b": "b"}


def episode(**changes: Any) -> Episode:
    """One that costs 2 in all, 30 in a, and nothing in b."""
    played = Episode(
        index=0,
        seed=0,
        steps=20,
        total_steps=20,
        episode_return=1.0,
        cost=2.0,
        accident=True,
        accident_steps=1,
        version=0,
        phase="online",
        shield_interventions=0,
        signal_costs={"a": 30.0, "b": 0.0},
    )
    return played._replace(**changes)


def by_hand() -> Dataset:
    """Two episodes of three and two steps: their costs, and what they cost in a and b."""
    zeros, column = torch.zeros(5), torch.arange(5.0).unsqueeze(1)
    costs = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    a, b = torch.tensor([0.0, 2.0, 4.0, 0.0, 8.0]), torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5])
    accidents, left = costs.clone(), torch.tensor([1.0, 0.75, 0.5, 1.0, 0.75])
    batch = Batch(
        *(column, column, zeros, accidents, costs, column, zeros, left, zeros),
        torch.stack([a, b], -1),
    )
    layout = Layout(1, 1, ("a", "b"))
    starts, truncated = np.array([0, 3, 5]), np.array([False, False, True, False, True])
    return Dataset(layout.pack(batch), layout, starts, truncated, 4, "x")


A, B = Limit("a", 0.5, 32.0), Limit("b", 0.5, 2.0)


# --- the contract ---


def test_a_signal_is_limited_by_its_name() -> None:
    spec = SafetySpec(limits={"a": 16.0, "accident": 0.03}, signals=SOURCES)
    assert (spec.constraint, spec.limit_value, spec.epsilon) == ("a", 16.0, 0.03)
    assert spec.all_limits(4, 1.0, {"a": 8.0, "b": 0.5}) == (A, Limit("accident", 0.03, 1.0))
    assert [each.bounds for each in spec.each()] == [{"a": 16.0}, {"accident": 0.03}]
    assert [each.quantity for each in spec.each()] == [quantity_named("a"), ACCIDENT]
    assert quantity_named("a") is quantity_named("a")  # as settings of limits are told apart
    assert quantity_named("cost") is COST


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"c": 1.0}, 'there are "accident", "cost", "a", "b" .* safety.signals.c=cost_c'),
        ({"a": 0.0}, r"safety\.limits\.a is 0\.0, but a finite"),
        ({"a": math.nan}, r"safety\.limits\.a is nan"),
    ],
)
def test_what_means_nothing_is_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SafetySpec(limits=limits, signals=SOURCES)


def test_a_limit_that_no_episode_can_exceed_is_refused() -> None:
    spec = SafetySpec(limits={"a": 32.0}, signals=SOURCES)
    with pytest.raises(ConfigError, match=r"limits\.a is 32, .* a cost at most 8 never exceed 32"):
        spec.all_limits(4, 1.0, {"a": 8.0, "b": 0.5})
    with pytest.raises(ConfigError, match=r"Of a signal give safety\.limits\.a"):
        SafetySpec(constraint="a", signals=SOURCES)
    with pytest.raises(ConfigError, match="means nothing"):
        quantity_named("no name")


def test_a_signals_words_are_its_own() -> None:
    of = quantity_named("hazards")
    assert of.promise(25.0, 20) == "expected hazards cost of 20 steps < 25 (limits.hazards)"
    assert of.alarming(25.0) == "that cost 100 or more in hazards"
    assert of.happened.format(limit=25.0) == "cost more than 25 in hazards"
    assert (COST.happened.format(limit=5.0), COST.measure) == ("cost more than 5", "expected_cost")


def test_a_cost_limit_beside_a_signals_has_the_same_settings() -> None:
    """What depends on the kind of quantity is that of the first, as tuned."""
    spec = SafetySpec(limits={"a": 16.0, "cost": 1.0, "accident": 0.1}, signals=SOURCES)
    critic = SafetyCriticConfig(target_gap=0.03, weight_decay=0.2)
    config = PretrainConfig(safety=spec, critic=critic)
    assert settings_of(config, "critic", COST, critic) is critic
    assert settings_of(config, "critic", ACCIDENT, critic) == SafetyCriticConfig()
    first = replace(config, safety=SafetySpec(limits={"accident": 0.1, "a": 1.0}, signals=SOURCES))
    own = settings_of(first, "critic", quantity_named("a"), SafetyCriticConfig())
    assert (own.target_gap, own.weight_decay) == (0.005, 0.1)


# --- the log, as a limit sees it ---


def test_a_log_under_a_limit_costs_what_the_signal_does() -> None:
    data = by_hand()
    seen, other = data.under(A), data.under(B)
    assert seen.column("costs").tolist() == [0.0, 2.0, 4.0, 0.0, 8.0]
    assert seen.transitions.costs.tolist() == [0.0, 2.0, 4.0, 0.0, 8.0]
    assert (seen.episode_costs.tolist(), other.episode_costs.tolist()) == ([6.0, 8.0], [1.5, 1.0])
    assert (seen.cost_max, other.cost_max, data.cost_max) == (8.0, 0.5, 1.0)
    assert data.signals_max == {"a": 8.0, "b": 0.5}
    assert data.under(Limit("cost", 0.5, 4.0)).episode_costs.tolist() == [1.0, 0.0]
    assert seen.episode_accidents.tolist() == data.episode_accidents.tolist() == [True, False]
    # 2.8 on average, .5 in every step.
    assert seen.dangers.tolist() == [False, False, True, False, True]
    assert not other.dangers.any()
    assert accident_within(seen, 2).tolist() == [False, True, True, True, True]
    assert (seen.dangerous_episodes.tolist(), data.dangers.tolist()[0]) == ([True, True], True)


def test_a_mapped_log_is_seen_alike(log: Path, root: Path) -> None:
    commands.convert_dataset(log, root / "tolls.mmap", say=silent)
    spec, limit = SafetySpec(signals=SIGNALS), Limit("right", 0.5, 60.0)
    mapped, memory = (
        load_dataset(path, discount=0.9, spec=spec).under(limit)
        for path in (root / "tolls.mmap", log)
    )
    assert mapped.cost_max == memory.cost_max == 3.0
    assert mapped.episode_costs.tolist() == memory.episode_costs.tolist()
    rows = torch.arange(50)
    costs = [data.layout.unpack(data.rows[rows]).costs for data in (mapped, memory)]
    assert torch.equal(*costs)


def test_each_reach_draws_the_costs_and_events_of_its_limit() -> None:
    """Two steps, the second at a half; a is above 0 in rows 1, 2 and 4, an accident is in row 0."""
    data, generator = by_hand(), torch.Generator().manual_seed(0)
    buffer = OnlineBuffer(data.layout, 8, reaches=[Reach(2, 0.5, "a"), Reach(2, 0.5), Reach()])
    assert isinstance(data.rows, torch.Tensor)
    buffer.append(data.rows)
    logged = RiskSampler.from_dataset(data, steps=2, discount=0.5, limited="a")
    wanted = {"a": [1.0, 4.0, 4.0, 4.0, 8.0], "cost": [1.0, 0.0, 0.0, 0.0, 0.0]}
    share = 0.9
    for sampler, name, events in (
        (logged, "a", [1, 2, 4]),
        (buffer.risk_sampler(0), "a", [1, 2, 4]),
        (buffer.risk_sampler(1), "cost", [0]),
    ):
        drawn, weights, _ = sampler.draw(400, share, generator)
        at = drawn.observations[:, 0].long()
        assert torch.equal(drawn.costs, torch.tensor(wanted[name])[at])
        # Weights are 1 / (.1 + .9 * 5 / events) of an event, 10 of another row.
        is_event = torch.isin(at, torch.tensor(events))
        assert weights[~is_event].tolist() == pytest.approx([10.0] * int((~is_event).sum()))
        assert weights[is_event][0].item() == pytest.approx(1.0 / (0.1 + 0.9 * 5 / len(events)))
        assert 0.9 < float(is_event.float().mean()) < 1.0
    one_step = OnlineBuffer(data.layout, 8, reaches=[Reach(limited="a")])
    one_step.append(data.rows)
    drawn, _, _ = one_step.risk_sampler().draw(50, 0.0, generator)
    at = drawn.observations[:, 0].long()
    assert torch.equal(drawn.costs, torch.tensor([0.0, 2.0, 4.0, 0.0, 8.0])[at])


def test_what_reads_a_log_for_a_limit_reads_its_signal() -> None:
    data = by_hand()
    # Costs of a are 6 and 8, of b 1.5 and 1.
    assert safe_episodes(data, [Limit("a", 7.0 / 32.0, 32.0)]).episodes == 1
    assert safe_episodes(data, [Limit("a", 7.0 / 32.0, 32.0)]).episode_lengths.tolist() == [3]
    assert safe_episodes(data, [Limit("b", 0.6, 2.0)]).episode_lengths.tolist() == [2]
    assert episode_totals(data.under(A), A)[0].tolist() == [6.0 / 32.0, 0.25]
    outlook = CostAhead(4, 8.0, 0.5, 1)
    # Mean cost 2.8 of 8: .35. Ahead of the third row .5 * 4/8 in a window of one, then nothing.
    assert outlook.first_logit(data.under(A)) == pytest.approx(math.log(0.35 / 0.65))
    assert outlook.within(data.under(A), np.zeros(5, np.float32), 1)[0][2] == 0.25
    data.column("costs_a").zero_()
    zero = replace(data, layout=Layout(1, 1, ("z", "b")))
    spec = SafetySpec(limits={"z": 1.0}, signals={"z": "z", "b": "b"})
    with pytest.raises(DataError, match="has the z cost 0, so z cost cannot be learnt"):
        require_both_outcomes(zero, Path("x"), spec)


def test_what_an_episode_counts_as_whose_end_is_unknown() -> None:
    """Of a limited signal all that it can cost; of the others what the log shows: 3 * .5 + .5."""
    config = PretrainConfig(safety=SafetySpec(limits={"a": 16.0}, signals=SOURCES))
    base = Foundation.from_log(config, by_hand(), 4, False, "cpu")
    assert base.worst_signals == {"a": 32.0, "b": 2.0}
    assert base.worst_cost == by_hand().worst_cost == 4.0
    assert base.costs_info().keys() == {"cost_max", "worst_cost", "signals_max", "worst_signals"}
    plain = Foundation.from_log(PretrainConfig(), by_hand(), 4, False, "cpu")
    assert plain.costs_info().keys() == {"cost_max", "worst_cost"}
    assert plain.worst_signals == {"a": 28.0 + 4.0, "b": 2.0}


# --- learning ---


def test_the_critic_of_each_limit_learns_its_own_truth() -> None:
    """Whatever is done, a step costs 4 in a with a probability of 1/4, and 2 in b with 1/2.

    So the discounted mean of the costs ahead, as a share of the largest, is (1 - .5^n) / 4 and
    / 2 with n steps left. The environment's own cost is 0, and an accident in every step.
    """
    rng, layout, n = np.random.default_rng(0), Layout(1, 1, ("a", "b")), 20
    ones = torch.ones(200 * n)
    column = torch.from_numpy(rng.uniform(-1.0, 1.0, (200 * n, 1))).float()
    left = torch.from_numpy(np.tile(1.0 - np.arange(n) / n, 200)).float()
    a = torch.from_numpy(4.0 * (rng.random(200 * n) < 0.25)).float()
    b = torch.from_numpy(2.0 * (rng.random(200 * n) < 0.5)).float()
    signals = torch.stack([a, b], -1)
    nothing = 0.0 * ones
    batch = Batch(column, column, ones, ones, nothing, column, nothing, left, ones, signals)
    starts = np.arange(0, 200 * n + 1, n)
    data = Dataset(layout.pack(batch), layout, starts, left.numpy() < 1.5 / n, n, "x")
    config = PretrainConfig(
        batch_size=128,
        networks=NetworkConfig((8,), (8,), 2),
        critic=SafetyCriticConfig(
            *(5, 2, (32, 32)), learning_rate=3e-3, tau=0.05, cost_discount=0.5, cost_steps=3
        ),
        safety=SafetySpec(limits={"a": 20.0, "b": 20.0}, signals=SOURCES),
    )
    loop = Pretraining(config, data)
    states = layout.unpack(data.rows[:n])  # type: ignore[index]
    for i, truth in enumerate((0.25, 0.5)):
        start = torch.sigmoid(loop.constraints[i].critic.net.output.bias)
        assert start.mean().item() == pytest.approx(truth, abs=0.02)  # as the log's steps are
        for _ in range(400):
            loop.offline.update(i, loop.networks.actor, states)
        critic = loop.constraints[i].critic
        at = torch.zeros(2, 1)
        found = critic.plain_risk(at, torch.tensor([1.0, 0.5]), at)
        assert found.tolist() == pytest.approx([truth, truth], abs=0.04)  # .5^10 is next to nothing
        # Over an episode: 20 steps of 1 (4 / 4 and 2 / 2).
        estimate = loop.offline.estimate(i, loop.networks.actor)
        assert estimate.reference == pytest.approx(truth, abs=0.05)


# --- what acted ---


def test_a_monitor_counts_its_own_signal() -> None:
    """30 of at most 60 is a half; the environment's cost and the other signal are other numbers."""
    right, never = (SafetyMonitor(Limit(name, 0.25, 60.0)) for name in ("a", "b"))
    for _ in range(12):
        for monitor in (right, never):
            monitor.update(True, 2.0, 0, {"a": 30.0, "b": 0.0})
    assert right.recent == [0.5] * 10
    assert (right.total, never.total, never.recent_mean) == (6.0, 0.0, 0.0)
    assert right.cost_mean == never.cost_mean == 2.0
    for _ in range(40):
        right.update(True, 0.0, 0, {"a": 60.0, "b": 0.0})
        never.update(True, 60.0, 0, {"a": 60.0, "b": 0.0})
    assert (right.alarm, never.alarm) == (True, False)
    with pytest.raises(ConfigError, match='what it cost in "a"'):
        right.update(True, 2.0, 0)


def test_what_an_episode_counts_as_is_of_the_limit() -> None:
    """30 of at most 32 in a, nothing in b, 2 of 8 in all, and an accident."""
    limits = A, B, Limit("cost", 0.5, 8.0), Limit("accident", 0.1, 1.0)
    assert [limit.outcome_of(episode()) for limit in limits] == [30 / 32, 0.0, 0.25, 1.0]
    assert A.outcome_of(episode(signal_costs={"a": 64.0})) == 1.0


def test_curves_and_the_progress_line_are_of_the_signal() -> None:
    monitors = [SafetyMonitor(Limit("a", 0.5, 60.0)), SafetyMonitor(Limit("cost", 0.5, 20.0))]
    curves = OnlineCurves(monitors, 1000)
    played = episode()
    for monitor in monitors:
        monitor.update(played.accident, played.cost, played.version, played.signal_costs)
    curves.add_episode(played)
    values = curves.values()
    assert (values["safety/a_mean"], values["safety/cost_mean"]) == (30.0, 2.0)
    assert (values["safety/a_limit"], values["safety/cost_limit"]) == (30.0, 10.0)
    assert values["safety/a_mean_lower"] <= 30.0 <= values["safety/a_mean_upper"] <= 60.0
    assert curves.line().startswith("a cost 30.0 an episode | last 10: 30.0 (limit 30) | ")


def test_the_guard_adds_what_was_spent_of_each_limit() -> None:
    """Ten of each are ahead: 15 are left of the limit of a, and 5 of that of b."""
    watches = [Watch(k, x, net_of(0.0), 20.0, spends=True) for k, x in (("a", 25.0), ("b", 15.0))]
    guard = guard_of(*watches)

    def instead(a: float, b: float) -> bool:
        return guard.take_over(v(0.0), 0.5, v(0.0), {"cost": 99.0, "a": a, "b": b}) is not None

    assert not instead(14.0, 4.0)
    assert instead(15.5, 4.0)
    assert instead(4.0, 5.5)
    assert not instead(5.5, 4.0)  # which would be too much of b
    assert guard.spends == ("a", "b")
    assert guard.take_over(v(0.0), 0.5, v(0.0), None) is None
    # Another signal is another guard.
    other = guard_of(watches[0]._replace(constraint="c"), watches[1])
    assert other.sha256 != guard.sha256


def test_an_episode_adds_up_what_each_limit_is_told_of() -> None:
    """To the right every step costs 3: after four 10 are spent. Of never nothing ever is."""
    spec = SafetySpec(signals=SIGNALS)
    with contextlib.closing(make_env(ENV, spec)) as env:
        for name, limit in (("right", 10.0), ("never", 1e-6)):
            watch = Watch(name, limit, net_of(-30.0), 1.0, spends=True)
            guard = Guard([fallback(0.25)], [watch])
            played = play_episode(env, acting(guard), 3, np.random.default_rng(0))
            tolls = env.signals.index("right")
            costs = Layout(1, 1, env.signals).unpack(played.rows).signals
            assert costs is not None
            before = costs[:, tolls].cumsum(0) - costs[:, tolls]
            wanted = (before >= 10.0).tolist() if name == "right" else [False] * HORIZON
            assert list(played.handed_over) == wanted
            assert 0 < sum(played.handed_over) < HORIZON or name == "never"


def acting(guard: Guard) -> DeployedPolicy:
    """A policy whose mean action is a quarter, behind this guard."""
    normalizer = Normalizer(np.zeros(1, np.float32), np.ones(1, np.float32))
    return DeployedPolicy.from_actor(fallback(0.25), Shield.abstaining(), normalizer, 0, guard)


def test_a_graph_is_told_of_each_limit_that_spends() -> None:
    watches = [
        Watch("accident", 0.9, net_of(-3.0), 1.0, spends=False),
        *(Watch(k, x, net_of(0.0), 20.0, spends=True) for k, x in (("a", 25.0), ("b", 15.0))),
    ]
    guard = Guard([fallback(LEFT)], watches)
    policy = acting(guard)
    graph = PolicyGraph(policy, spaces.Box(-1.0, 1.0, (1,), np.float32))
    assert graph.spent == ("a", "b")
    spent = torch.tensor([[14.0, 4.0], [15.5, 4.0], [4.0, 5.5], [5.5, 4.0], [4.0, math.nan]])
    inputs = Inputs(torch.zeros(5, 1), torch.full((5,), 0.5), torch.zeros(5, 1, 1), spent)
    result = Outputs(*graph(*inputs))
    assert result.handed_over is not None
    assert result.handed_over.tolist() == [False, True, True, False, True]
    assert result.action.isnan().flatten().tolist() == [False] * 4 + [True]
    for row in range(4):
        told = dict(zip(graph.spent, spent[row].tolist(), strict=True))
        act = policy.act(v(0.0), 0.5, np.random.default_rng(0), told, mean_action=True)
        assert act.handed_over == bool(result.handed_over[row])
    assert export._zeros(graph, 3)[3].shape == (3, 2)
    assert export._examples(graph, policy)["spent"].shape == (export.EXAMPLES, 2)


def test_a_claim_of_a_signal_is_of_its_costs() -> None:
    claim = Claim("a", 20.0, 60.0, 0.95, "anytime", 100, 0)
    assert contribution(claim, episode()) == 0.5
    assert contribution(replace(claim, quantity="b"), episode()) == 0.0
    with pytest.raises(ConfigError, match="Episode 0 cost 61, but the log"):
        contribution(claim, episode(signal_costs={"a": 61.0}))
    with pytest.raises(ConfigError, match="means nothing"):
        replace(claim, quantity="no name")
    with pytest.raises(ConfigError, match="not a cost"):
        replace(claim, method="one look")


def test_a_learner_is_penalised_by_what_is_limited() -> None:
    spec = SafetySpec(limits={"right": 40.0}, signals=SIGNALS)
    for name, size in (("right", 3.0), ("never", 0.0)):
        env = Penalised(make_env(ENV, spec), Account(penalty=1.0), quantity_named(name))
        env.reset(seed=0)
        reward = [env.step(np.ones(1, np.float32)) for _ in range(4)][-1][1]
        env.close()
        assert reward == pytest.approx((1.0 - size) / 2.0)
    arrays = {
        "terminals": np.array([False, True, False, True]),
        "timeouts": np.zeros(4, bool),
        "accidents": np.zeros(4, bool),
        "costs": np.full(4, 99.0),
        "costs_right": np.array([30.0, 30.0, 0.0, 3.0]),
    }
    assert _unsafe_episodes(arrays, spec).tolist() == [True, False]


# --- whole runs ---


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tolls")


@pytest.fixture(scope="module")
def log(root: Path) -> Path:
    return logged_tolls(root)


def config_of(log: Path, *overrides: str, limits: dict[str, float]) -> PretrainConfig:
    given = [f"{name}={value}" for name, value in limits.items()]
    overrides = (*TINY, *overrides)
    return commands.pretrain_config(dataset=str(log), steps=30, limit=given, overrides=overrides)


@pytest.fixture(scope="module")
def pretrained(log: Path, root: Path) -> RunDir:
    """Behind a guard, as if the log showed that it helps."""
    config = config_of(log, "safety.signals.never=tolls.never", limits=LIMITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fallback, "refusals", lambda self, *_: [() for _ in self.constraints])
        plan = commands.plan_pretrain(config, say=silent)
        assert "expected right cost of 20 steps < 40 (limits.right)" in plan.header
        return commands.pretrain_run(plan, name="off", runs=root, say=silent)


def online_plan(pretrained: RunDir, **settings: Any) -> commands.FinetunePlan:
    config = commands.finetune_config(pretrained, budget=400, overrides=ONLINE, **settings)
    return commands.plan_finetune(pretrained, config, accept_risk=True, say=silent)


@pytest.fixture(scope="module")
def online(pretrained: RunDir, root: Path) -> RunDir:
    plan = online_plan(pretrained, keep_versions=True)
    return commands.finetune_run(plan, name="on", runs=root, say=silent)


def test_where_a_signal_is_found_is_known_from_the_log(log: Path) -> None:
    config = config_of(log, limits=LIMITS)
    assert config.safety.signals == {"right": "tolls.right"}
    assert config.safety.bounds == LIMITS
    assert (config.lagrangian.init, config.extraction.relative_risk) == (100.0, True)
    by_key = config_of(log, "safety.limits.never=3", limits={"accident": 0.5})
    assert by_key.safety.signals == {"never": "tolls.never"}
    said = config_of(log, "safety.signals.right=elsewhere", limits=LIMITS)
    assert said.safety.signals == {"right": "elsewhere"}
    with pytest.raises(ConfigError, match=r"safety\.signals\.up=cost_up"):
        config_of(log, limits={"up": 3.0})
    plan = config_of(log, "safety.signals.up=cost_up", limits={"up": 3.0})
    with pytest.raises(DataError, match='no column "costs_up" for the signal "up"'):
        commands.plan_pretrain(plan, say=silent)
    with pytest.raises(DataError, match="has the never cost 0, so never cost cannot be learnt"):
        commands.plan_pretrain(config_of(log, limits={"never": 3.0}), say=silent)
    with pytest.raises(ConfigError, match=r"safety\.limits\.right is 60, but 20 steps"):
        commands.plan_pretrain(config_of(log, limits={"right": 60.0}), say=silent)


def test_a_foreign_logs_function_is_not_imported() -> None:
    stated = {"signals": {"a": "evil:function", "b": 3}}
    with pytest.raises(ConfigError, match=r"say safety\.signals\.a=evil:function"):
        logged_signals(stated, [], ["a"])
    assert logged_signals(stated, ["safety.signals.a=mine"], ["a", "b"]) == {}
    found = logged_signals(stated, ["safety.limits.a=3"], imports=False)
    assert found == {"safety.signals.a": "evil:function"}
    assert logged_signals({"signals": ["a"]}, [], ["a"]) == {}


def test_the_record_is_of_the_limited_signal(online: RunDir) -> None:
    """Right and never are in the ledger; the monitors of right and cost have their own sums."""
    episodes = online.episodes()
    info = online.load_checkpoint().info
    assert len(episodes) == 20
    assert all(e.signal_costs.keys() == {"never", "right"} for e in episodes)
    right = sum(e.signal_costs["right"] for e in episodes)
    assert right > 0.0
    assert all(e.signal_costs["never"] == 0.0 for e in episodes)
    total = sum(k for _, k, _ in info["monitor"]["versions"])
    assert total == pytest.approx(right / 60.0)
    (further,) = info["further_monitors"]
    assert sum(k for _, k, _ in further["versions"]) == pytest.approx(
        sum(e.cost for e in episodes) / 20.0
    )
    for line in map(json.loads, (online.path / "iterations.jsonl").read_text().splitlines()):
        assert (line["constraint"], line["limit"]) == ("right", 40.0)
        assert [x["constraint"] for x in line["further"]] == ["cost"]
    assert info["worst_signals"] == {"never": 0.0, "right": 60.0}


@pytest.mark.parametrize(("method", "call"), [("append_episode", 13), ("save_checkpoint", 3)])
def test_it_is_resumed_bitwise(
    root: Path,
    pretrained: RunDir,
    online: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    call: int,
) -> None:
    name = f"on-{method}"
    plan = online_plan(pretrained, keep_versions=True)
    killed(monkeypatch, plan, root / name, method, call)
    again = commands.resume_finetune(name, runs=root, say=silent)
    assert record(again) == record(online)


def test_its_certificate_is_of_the_signal(online: RunDir) -> None:
    said: list[str] = []
    certificate = commands.certify_run(online.path, limit=["right=50", "cost=19"], say=said.append)
    assert "expected right cost of an episode < 50 and expected cost of an episode < 19" in said[0]
    assert certificate["environment"]["signals"] == {"right": "tolls.right"}
    (other,) = certificate["further"]
    assert (certificate["claim"]["quantity"], other["claim"]["quantity"]) == ("right", "cost")
    (folder,) = (online.path / "certificates").iterdir()
    played = parse_ledger((folder / "episodes.jsonl").read_bytes(), "it").counted
    rights = [e.signal_costs["right"] for e in played]
    assert certificate["total_outcome"] == pytest.approx(sum(rights) / 60.0)
    assert other["total_outcome"] == pytest.approx(sum(e.cost for e in played) / 20.0)
    checks = commands.verify_certificate(folder / "certificate.json", say=silent)
    assert all(check.passed for check in checks)
    # Of what is claimed of another signal the record says something else.
    record_of = (folder / "episodes.jsonl").read_bytes()
    content = {key: value for key, value in certificate.items() if key != "sha256"}
    forged = sealed(content | {"claim": content["claim"] | {"quantity": "never"}})
    assert "counts" in {c.name for c in recheck(forged, record_of, "it") if not c.passed}
    unknown = sealed(content | {"claim": content["claim"] | {"quantity": "unknown"}})
    with pytest.raises(ConfigError, match='what it cost in "unknown"'):
        recheck(unknown, record_of, "it")
    with pytest.raises(ConfigError, match="limits of the same"):
        commands.certify_run(online.path, limit=["never=5"], say=silent)


def test_the_online_critics_learn_from_their_own_costs(pretrained: RunDir) -> None:
    loop = commands.online.start_loop(online_plan(pretrained))
    for _, event in zip(range(3), loop.run(), strict=False):
        assert isinstance(event, Episode)
    right = loop.foundation.layout.signals.index("right")
    generator = torch.Generator().manual_seed(0)
    for index, limited in enumerate((True, False)):
        batch, _, _ = loop.experience.stratified_batch(64, 0.1, generator, index)
        assert batch.signals is not None
        assert torch.equal(batch.costs, batch.signals[:, right]) == limited
        assert batch.costs.any()


def test_shield_and_guard_are_judged_by_the_signal(
    pretrained: RunDir, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(log, limits=LIMITS)
    _, held_out = load_dataset(log, discount=0.99, spec=config.safety).split(config.held_out, 0)
    report = pretrained.read_json("calibration.json")
    assert report["constraint"] == "right"
    assert report["behaviour_cost"] == pytest.approx(held_out.signal_costs["right"].mean())
    other = pretrained.read_json("calibration_cost.json")
    assert other["behaviour_cost"] == pytest.approx(held_out.episode_costs.mean())
    seen: list[str] = []

    def watched(critic: Any, actor: Any, data: Dataset, *_: Any) -> tuple[str, ...]:
        seen.append(data.layout.limited)
        return ()

    monkeypatch.setattr("safe_offrl.train.fallback.guard_refusals", watched)
    plan = commands.plan_pretrain(config, say=silent)
    loop = Pretraining(config, plan.dataset)
    assert loop._fallback is not None
    loop._fallback.refusals(loop.held_out, 60)
    assert seen == ["right", ""]


def test_what_never_costs_anything_is_estimated_at_nothing(pretrained: RunDir, log: Path) -> None:
    data = load_dataset(log, discount=0.99, spec=SafetySpec(signals=SIGNALS))
    data = replace(data, behaviour_log_probs=np.full(len(data.rows), -0.7, np.float32))
    config, actor = FittedConfig(steps=50, replicates=10), stored_actor(pretrained)
    never, right = (
        assess_policy(data, actor, Limit(name, 0.5, 60.0), config) for name in ("never", "right")
    )
    assert (never.risk.value, never.risk.error) == (0.0, 0.0)
    assert right.risk.value > 0.01
    assert never.weighted_risk is not None
    assert never.weighted_risk.wis == 0.0


def stored_actor(run: RunDir) -> Actor:
    return stored_policy(run, run.load_checkpoint()).actor


def test_assess_and_the_gate_speak_of_the_signal(
    pretrained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safe_offrl.commands.assess.CONFIG", FittedConfig(steps=200, replicates=20))
    said: list[str] = []
    answer = commands.assess_runs([pretrained.path], limit=["right=59"], say=said.append)
    (found,) = answer["runs"].values()
    assert (found["limit"], found["further"]["cost"]["limit"]) == (59.0, 15.0)
    assert found["estimates"]["constraint"] == "right"
    assert found["estimates"]["scale"] == 60.0
    assert any("right cost per episode" in text for text in said)
    with pytest.raises(ConfigError, match='no limit of "never"'):
        commands.assess_runs([pretrained.path], limit=["never=5"], say=silent)
    plan = online_plan(pretrained)
    assert "right cost per episode" in str(plan.inputs.risk)


def test_what_is_played_afterwards_is_of_the_signal(online: RunDir, root: Path) -> None:
    said: list[str] = []
    evaluated = commands.evaluate_run(online.path, episodes=4, say=said.append)
    mean, error = evaluated["signals"]["right"]
    assert f"right cost {mean:.2f} +- {error:.2f}" in said[-1]
    replayed = commands.replay_run(online.path, episodes=3, say=silent)
    assert (replayed["constraint"], replayed["further"]) == ("right", {"cost": 15.0})
    final = final_policy(online)
    with contextlib.closing(final.env):
        played = list(evaluate(final.env, final.policy, 3, 0, worst_cost=0.0))
    truth = sum(e.signal_costs["right"] for e in played) / 3
    assert replayed["versions"][-1]["truth"] == pytest.approx(truth)
    data = read_run(online.path)
    assert (data.constraint, data.limit, data.limits) == ("right", 40.0, LIMITS)
    rights = [e.signal_costs["right"] for e in online.episodes()]
    assert harm(data, quantity_named("right")) == pytest.approx(sum(rights) / len(rights))
    page = root / "page.html"
    commands.compare_runs([online.path], html=page, runs=root, say=silent)
    assert "right cost per episode" in page.read_text()


def test_a_finished_policy_is_told_both_costs(
    online: RunDir, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(online.path)
    observation = np.zeros(1, np.float32)
    with pytest.raises(ConfigError, match="must be told"):
        policy.predict(observation)
    with pytest.raises(ConfigError, match="of each of right, cost"):
        policy.predict(observation, episode_cost=3.0)
    with pytest.raises(ConfigError, match="cost in right"):
        policy.predict(observation, episode_cost={"cost": 3.0})
    guard = policy._policy.guard
    assert guard is not None
    assert guard.spends == ("right", "cost")
    for costs in ({"right": 1e9, "cost": 0.0}, {"right": 0.0, "cost": 1e9}):
        action, _ = policy.predict(observation, episode_cost=costs)
        wanted = guard.fallback_action(policy._policy.normalizer(observation), 1.0)
        assert action.tolist() == pytest.approx(wanted.tolist())
    # What it sees of the cost itself, where its rule is about that, is by its name too.
    shown: list[float] = []

    def observe(one: Any, cost: float) -> Any:
        shown.append(cost)
        return one

    with monkeypatch.context() as patch:
        patch.setattr(policy._env, "observe", observe)
        policy.predict(observation, episode_cost={"right": 1.0, "cost": 3.0})
    assert shown == [3.0]
    with pytest.raises(ConfigError, match="2 costs for 1 observations"):
        policy.predict(observation, episode_cost={"right": [0.0, 1.0], "cost": 0.0})
    # Where the policy sees a share of the cost, it must be told of that too.
    monkeypatch.setattr(policy._env, "sums_cost", True)
    with pytest.raises(ConfigError, match="of each of cost, right"):
        policy._costs(3.0, ("right",), 1)
    told = policy._costs({"cost": 3.0, "right": [4.0]}, ("right",), 1)
    assert told == {"cost": [3.0], "right": [4.0]}
    manifest = commands.export_run(
        online.path, file_format="torchscript", out=root / "p.pt", say=silent
    )
    spent = manifest["inputs"][3]
    assert (spent["name"], spent["shape"]) == ("spent", ["batch", 2])
    assert "in right, cost, in this order" in spent["meaning"]


@pytest.fixture
def final(online: RunDir) -> Iterator[Any]:
    found = final_policy(online)
    with contextlib.closing(found.env):
        yield found


def test_an_episode_that_fails_costs_all_that_it_can(final: Any, monkeypatch: Any) -> None:
    """In the limited signal, in a certificate as online."""
    claim = Claim("right", 40.0, 60.0, 0.95, "anytime", 100, 0)
    about = claim, 0, final.env, final.policy, 0, final.worst_cost, final.worst_signals
    assert reserve(*about).worst.signal_costs == {"never": 0.0, "right": 60.0}

    def failing(action: Any) -> Any:
        raise EnvFault("It broke.")

    monkeypatch.setattr(final.env, "step", failing)
    played, fault = play(*about)
    assert fault
    assert contribution(claim, played) == 1.0


def test_an_evaluation_counts_it_so_too(
    online: RunDir, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = final_policy(online)
    situations = find_situations(final.env)
    final.env.close()

    def failing(self: AccidentEnv, action: Any) -> Any:
        raise EnvFault("It broke.")

    monkeypatch.setattr("safe_offrl.commands.evaluate.find_situations", lambda env: situations)
    monkeypatch.setattr(AccidentEnv, "step", failing)
    found = commands.evaluate_run(online.path, episodes=2, out=root / "e.json", say=silent)
    assert found["signals"] == {"never": (0.0, 0.0), "right": (60.0, 0.0)}


def test_inspect_says_whether_the_signal_is_kept(log: Path) -> None:
    said: list[str] = []
    overrides = ["safety.limits.right=30"]
    found = commands.inspect_dataset(log, overrides=overrides, say=said.append)
    data = load_dataset(log, discount=0.9, spec=SafetySpec(signals=SIGNALS))
    share = float((data.signal_costs["right"] < 30.0).mean())
    assert found["within_limit"] == pytest.approx(share)
    assert f"of the steps; {share:.0%} of the episodes below 30" in said[0]
    assert "identified    expected right cost < 30" in said[0]
    assert "left" in {signal["name"] for signal in found["signals"]}
    assert len(said[0].split("of the episodes below 30")) == 2
    assert not found["identification"]["identified"]  # of the cost it would be: 10 an episode
