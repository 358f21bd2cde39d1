"""The second kind of safety, expected cost per episode < limit, from the target to the run."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from safe_offrl.agents.extraction import Extraction, ExtractionConfig
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.commands.offline_plan import pretrain_config
from safe_offrl.commands.online_plan import finetune_config
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError
from safe_offrl.limits import COST, Limit
from safe_offrl.nn.losses import cost_rate_target
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import RunInputs, run_yaml
from safe_offrl.safety.acceptance import AcceptanceConfig, Judge, decide, risk_change
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.monitor import SafetyMonitor, certifiable
from safe_offrl.safety.outlook import CostAhead
from safe_offrl.spec import SafetySpec
from safe_offrl.train.baselines import BaselineConfig
from safe_offrl.train.finetune import Finetuning
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.iteration import Iteration
from safe_offrl.train.pretrain import Pretraining
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Batch, Episode, Layout, Visited

HORIZON = 20
NETWORKS = NetworkConfig((16,), (16,), 3)
CRITIC = SafetyCriticConfig(members=3, reference=1, hidden=(16,), cost_discount=0.9)
SPEC = SafetySpec(constraint="cost", cost_limit=0.5)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def critic_of(discount: float = 0.9, horizon: int = HORIZON, cost_max: float = 2.0) -> SafetyCritic:
    config = replace(CRITIC, hidden=(32,), learning_rate=3e-3, cost_discount=discount, tau=0.1)
    outlook = CostAhead(horizon, cost_max, discount, config.cost_steps)
    return SafetyCritic(1, 1, outlook, config, torch.Generator().manual_seed(0))


def policy() -> Actor:
    """Almost always the logged action, 0: standard deviation e^-5 before tanh."""
    actor = Actor(1, 1, (), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.zero_()
        parameter.copy_(t(0.0, -10.0))
    return actor


# --- the value ---


def test_cost_rate_target_by_hand() -> None:
    #         costs  terminated left  rho(s_n)  n   .1 costs + .9^n rho(s_n)
    cases = [
        (0.0, 0, 0.5, 0.3, 1, 0.27),
        (1.0, 0, 0.5, 0.3, 1, 0.37),  # a cost does not end anything
        (0.5, 0, 0.5, 0.0, 1, 0.05),
        (1.0, 1, 0.5, 0.3, 1, 0.10),  # nothing follows a termination
        (1.0, 0, 0.0, 0.3, 1, 0.10),  # ... nor the horizon
        (1.9, 0, 0.5, 0.3, 2, 0.433),  # 1 + .9 * 1, then .81 * .3
        (7.0, 0, 0.5, 1.0, 2, 1.00),  # more than the largest cost of a step is cut off
        (-1.0, 0, 0.5, 0.0, 1, 0.00),
    ]
    columns = [t(*column) for column in zip(*cases, strict=True)]
    costs, terminated, left, following, steps, expected = columns
    target = cost_rate_target(costs, terminated, left, following, steps, 0.9)
    assert target.tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("length", [HORIZON, 7])
def test_estimate_states_give_the_cost_of_an_episode_exactly(length: int) -> None:
    # Whatever the costs: with true values at its states the weighted sum is the episode's cost.
    costs = np.random.default_rng(length).random(length) * 2.0
    values, following = np.zeros(length), 0.0
    for k in reversed(range(length)):
        values[k] = following = 0.1 * costs[k] / 2.0 + 0.9 * following
    zeros, column = torch.zeros(length), torch.arange(length, dtype=torch.float32).unsqueeze(-1)
    visited = Batch(column, column, zeros, zeros, zeros, column, zeros, zeros, zeros)
    states = critic_of().outlook.estimate_states(column[:1], visited, float(length))
    at = t(*values)[states.observations[:, 0].long()]
    assert float(states.total(at)) * HORIZON * 2.0 == pytest.approx(costs.sum(), rel=1e-5)


def loop_batch(cost: float, size: int = 64) -> Batch:
    """One state that never ends, cost 1 of at most 2 with probability ``cost`` at each step."""
    column, zeros = torch.zeros(size, 1), torch.zeros(size)
    hit = (torch.arange(size) < cost * size).float()
    return Batch(column, column, zeros, hit, hit, column, zeros, zeros + 0.9, zeros)


@pytest.mark.parametrize("steps", [1, 3])
def test_fixed_point_is_the_mean_cost_and_the_pushed_members_stand_above(steps: int) -> None:
    # E c = .25 of at most 2: rho = .125 for plain TD; with the push (y + a) / (1 + a), solved for
    # the fixed point of y = d .125 + (1 - d) rho: rho = (.125 d + a) / (d + a), d = 1 - .9^n.
    critic, batch, actor = critic_of(horizon=10_000), loop_batch(0.25), policy()
    d = 1.0 - 0.9**steps
    batch = batch._replace(costs=batch.costs * d / 0.1)  # the same cost at every step of a span
    spans = torch.full((64,), float(steps))
    generator = torch.Generator().manual_seed(0)
    states = critic.outlook.estimate_states(torch.zeros(4, 1), batch, 20.0)
    for _ in range(800):
        critic.log_alpha.fill_(math.log(0.01))
        critic.update(batch, torch.ones(64), actor, states, generator, spans=spans)
    logits = critic.logits(batch.observations[:1], batch.time_to_go[:1], batch.actions[:1])
    plain, *pushed = torch.sigmoid(logits[:, 0]).tolist()
    assert plain == pytest.approx(0.125, abs=0.02)
    assert np.mean(pushed) == pytest.approx((0.125 * d + 0.01) / (d + 0.01), abs=0.03)


def test_change_per_action_is_the_performance_difference() -> None:
    # Every step's action raises rho by .01: its cost to go by .01 * 2 / (1 - .9) = .2, an episode
    # of 20 steps by 4, of 20 * 2 possible: .1. An episode of 10 steps by half of that.
    assert critic_of().outlook.change_per_action(20.0) * 0.01 == pytest.approx(0.1)
    assert critic_of().outlook.change_per_action(10.0) * 0.01 == pytest.approx(0.05)


def test_window_cost_by_hand() -> None:
    costs = np.array([0.0, 2.0, 0.0, 1.0], dtype=np.float32)
    column, zeros = torch.zeros(4, 1), torch.zeros(4)
    batch = Batch(column, column, zeros, zeros, t(*costs), column, zeros, zeros, zeros)
    layout = Layout(1, 1)
    data = Dataset(layout.pack(batch), layout, np.array([0, 4]), zeros.bool().numpy(), 20, "x")
    outlook = CostAhead(20, 2.0, 0.9, 20)
    outcome, _ = outlook.within(data, np.full(4, 0.5, dtype=np.float32), 2)
    # .1 c/2 + .9 * .1 c'/2 + .81 * .5 while the window stays inside the episode.
    expected = [0.09 + 0.405, 0.1 + 0.405, 0.045, 0.05]
    assert outcome.tolist() == pytest.approx(expected, abs=1e-6)


# --- the limit and the monitor ---


def test_limit_in_the_critics_unit() -> None:
    limit = SafetySpec(constraint="cost", cost_limit=25.0).limit(1000, 2.0)
    assert limit == Limit("cost", 25.0 / 2000.0, 2000.0)
    assert limit.value == 25.0
    assert limit.outcome(accident=True, cost=500.0) == 0.25
    assert limit.alarm(accident=True, cost=50.0) == (0.5, 0.25)  # cut off at four limits
    assert limit.alarm(accident=True, cost=900.0) == (1.0, 0.25)
    accident = SafetySpec(epsilon=0.2).limit(1000, 2.0)
    assert (accident.value, accident.outcome(True, 7.0)) == (0.2, 1.0)
    assert accident.alarm(accident=False, cost=7.0) == (0.0, 0.2)


def test_a_limit_that_no_episode_can_exceed_is_refused() -> None:
    with pytest.raises(ConfigError, match="never exceed 20"):
        SafetySpec(constraint="cost", cost_limit=25.0).limit(20, 1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"constraint": "both"},
        {"constraint": "cost", "cost_limit": 0.0},
        {"constraint": "cost", "cost_limit": math.nan},
        {"accident": "episode_cost"},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SafetySpec(**settings)  # type: ignore[arg-type]


def run_of(costs: np.ndarray, limit: Limit) -> SafetyMonitor:
    monitor = SafetyMonitor(limit)
    for cost in costs:
        monitor.update(accident=bool(cost > 0), cost=float(cost), version=0)
    return monitor


def test_monitor_bounds_the_mean_cost_at_its_level_at_all_times() -> None:
    # Costs of 0 to 40 with mean 20, of at most 100; a miss is ANY moment at which a bound is wrong.
    limit, rng = Limit("cost", 0.2, 100.0), np.random.default_rng(0)
    missed = alarms = 0
    for _ in range(300):
        monitor, wrong = SafetyMonitor(limit), False
        for cost in rng.uniform(0.0, 40.0, 60):
            monitor.update(accident=True, cost=float(cost), version=0)
            low, high = monitor.version_interval()
            wrong |= not monitor.lower_mean <= 0.2 <= monitor.upper_mean
            wrong |= not low <= 0.2 <= high
        missed += wrong
        alarms += monitor.alarm
    assert missed / 300 <= 0.05
    assert alarms / 300 <= 0.05


def test_the_alarm_finds_a_policy_far_above_the_limit_in_a_dozen_episodes() -> None:
    limit, rng = Limit("cost", 0.025, 1000.0), np.random.default_rng(0)
    assert run_of(rng.uniform(30.0, 110.0, 14), limit).alarm  # mean 70, limit 25
    assert not run_of(rng.uniform(5.0, 35.0, 60), limit).alarm  # mean 20


def test_mean_cost_and_accidents_are_counted_side_by_side() -> None:
    monitor = run_of(np.array([0.0, 10.0, 30.0, 0.0]), Limit("cost", 0.025, 1000.0))
    assert (monitor.episodes, monitor.accidents, monitor.cost_mean) == (4, 2, 10.0)
    assert monitor.accident_rate == 0.5
    assert monitor.total == pytest.approx(0.04)


def test_what_fifty_episodes_can_certify_of_a_cost() -> None:
    best = certifiable(50_000, 1000, Limit("cost", 0.025, 1000.0))
    # Not one accident in 50 episodes: below 1 - share^(1/50), 6.7 %, of at most 1000; the share of
    # the first policy is .05 * 6 / pi^2.
    assert best.fixed == pytest.approx(1000.0 * (1.0 - (0.3 / math.pi**2) ** (1 / 50)))
    assert best.run_level == pytest.approx(1000.0 * 3.482 / 50, abs=0.05)
    assert "expected cost below 69.6 per episode" in str(best)
    assert "too few for the cost limit of 25" in str(best)


# --- both phases ---


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    env = make_env("HazardLine-v0", SPEC)
    arrays = log_episodes(
        env, behaviours=[random_behaviour(1)], shares=[1.0], transitions=1500, seed=0
    )
    path: Path = tmp_path_factory.mktemp("line") / "line.hdf5"
    write_dataset(
        path,
        arrays,
        {"env_id": "HazardLine-v0", "horizon": HORIZON, "behaviours": [{"name": "random"}]},
    )
    return load_dataset(path, discount=0.99, spec=SPEC)


@pytest.fixture(scope="module")
def pretraining(data: Dataset) -> Pretraining:
    config = PretrainConfig(
        env="HazardLine-v0",
        steps=40,
        alignment_steps=5,
        batch_size=32,
        networks=NETWORKS,
        critic=CRITIC,
        safety=SPEC,
    )
    loop = Pretraining(config, data)
    list(loop.run())
    return loop


def begin(data: Dataset, pretraining: Pretraining, **settings: object) -> Finetuning:
    config = FinetuneConfig(
        budget=200,
        warmup_steps=40,
        iteration_steps=40,
        batch_size=16,
        networks=NETWORKS,
        critic=CRITIC,
        safety=SPEC,
        **settings,  # type: ignore[arg-type]
    )
    env = make_env("HazardLine-v0", SPEC)
    return Finetuning(config, env, data, pretraining.state_dict(), pretraining.info())


def test_the_report_speaks_of_cost(pretraining: Pretraining, data: Dataset) -> None:
    report = pretraining.calibrations()[0]
    assert report.constraint == "cost"
    assert report.estimate == pytest.approx(pretraining.estimate().value * HORIZON * data.cost_max)
    assert "cost        " in str(report)
    # An untrained critic starts from the log's mean: not at zero and not at everything.
    assert 0.0 < report.estimate < HORIZON * data.cost_max


def test_decisions_are_in_costs_and_resume_is_bitwise(
    data: Dataset, pretraining: Pretraining
) -> None:
    whole = begin(data, pretraining)
    events = list(whole.run())
    iterations = [e for e in events if isinstance(e, Iteration)]
    assert iterations
    for iteration in iterations:
        assert iteration.constraint == "cost"
        assert iteration.limit == pytest.approx(0.5)
        assert 0.0 <= iteration.v_previous <= HORIZON * data.cost_max
        satisfied = iteration.v_candidate < 0.5
        if iteration.accepted and iteration.constraints_satisfied:
            assert satisfied
    episodes = [e for e in events if isinstance(e, Episode)]
    assert whole.monitor.cost == pytest.approx(sum(e.cost for e in episodes))
    recent = [min(e.cost / (HORIZON * data.cost_max), 1.0) for e in episodes[-10:]]
    assert whole.monitor.recent == pytest.approx(recent)

    first = begin(data, pretraining)
    for event in first.run():
        if isinstance(event, Iteration):
            break
    second = begin(data, pretraining)
    second.load(first.state_dict(), first.info())
    list(second.run())
    ours, theirs = second.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())


def test_what_was_seen_is_the_mean_cost_less_its_standard_error() -> None:
    assert COST.seen([0.2]) == 0.0  # one episode has no spread
    # Mean .25; variance (.0225 + .0025) * 2 / 3 = .01667, standard error sqrt(.01667 / 4) = .0645.
    assert COST.seen([0.1, 0.2, 0.3, 0.4]) == pytest.approx(0.25 - 0.0645, abs=1e-4)
    assert COST.seen([0.0] * 9 + [0.4]) == pytest.approx(0.0)  # mean .04, standard error .04


@pytest.mark.parametrize("multiplier", ["dual", "pid"])
def test_lambda_of_a_lagrangian_method_follows_the_mean_cost(
    data: Dataset, pretraining: Pretraining, multiplier: Literal["dual", "pid"]
) -> None:
    """Nine episodes without cost and one that costs 20 limits: twice the limit on average.

    Less its standard error that would be 0, and lambda would sink.
    """
    loop = begin(
        data,
        pretraining,
        kl=False,
        shield=False,
        guard=False,
        baseline=BaselineConfig(multiplier=multiplier, multiplier_init=5.0),
    )
    next(e for e in loop.run() if isinstance(e, Iteration))
    before = float(loop.constraints[0].multiplier.value)
    loop.monitor.recent = [0.0] * 9 + [20.0 * loop.limits[0].share]
    loop._update([COST.seen(loop.monitor.recent)], critics_only=False)
    assert float(loop.constraints[0].multiplier.value) > before


def test_a_candidate_above_the_cost_limit_is_refused_in_its_own_unit() -> None:
    critic, previous = critic_of(), policy()
    critic.start_from(-4.0)  # rho about .018 everywhere: a cost of .7 of at most 40
    with torch.no_grad():
        critic.net.output.weight.zero_()
        learner = policy()
        list(learner.parameters())[-1].add_(0.05)
    ones, column = torch.ones(50), torch.zeros(50, 1)
    batch = Batch(column, column, ones, ones, ones, column, ones, ones, ones)
    visited = Visited(batch, ones, 20.0)
    states = critic.outlook.estimate_states(column[:5], batch, 20.0)
    assert risk_change(learner, previous, critic, visited, column) == 0.0
    decisions = [
        decide(
            previous,
            learner,
            [Judge(Limit("cost", cost / 40.0, 40.0), critic, visited, states)],
            AcceptanceConfig(),
            kl_limit=None,
            constrain_safety=True,
            confidence=0.95,
            generator=torch.Generator().manual_seed(0),
        )[0]
        for cost in (1.2, 0.6)
    ]
    # J = ((10 - 1) + 20) / 20 * .018 * 40 = 1.04
    assert decisions[0].v_candidate * 40.0 == pytest.approx(1.04, abs=0.03)
    assert decisions[0].accepted
    assert not decisions[1].accepted
    assert decisions[1].reason == "expected cost 1.04 is not below 0.6"


def test_the_cost_constraint_has_defaults_of_its_own_beneath_what_is_given() -> None:
    plain = pretrain_config(env="HazardLine-v0")
    by_cost = pretrain_config(
        env="HazardLine-v0", overrides=["safety.constraint=cost", "safety.cost_limit=1"]
    )
    assert (plain.lagrangian.init, plain.extraction.relative_risk) == (3.0, False)
    assert (by_cost.lagrangian.init, by_cost.extraction.relative_risk) == (100.0, True)
    given = pretrain_config(
        env="HazardLine-v0", overrides=["safety.constraint=cost", "lagrangian.init=70"]
    )
    assert (given.lagrangian.init, given.lagrangian.maximum) == (70.0, 300.0)
    with pytest.raises(ConfigError, match=r"lagrangian\.init 70"):
        pretrain_config(env="HazardLine-v0", overrides=["lagrangian.init=70"])


def test_fine_tuning_follows_the_episodes_faster_than_the_log(
    data: Dataset, pretraining: Pretraining, tmp_path: Path
) -> None:
    inputs = RunInputs("HazardLine-v0", "log.hdf5", data.sha256)
    text = run_yaml(inputs, "pretrain", pretraining.config, tmp_path)
    with RunDir.create(tmp_path, kind="pretrain", config_text=text, name="p") as run:
        config = finetune_config(run)
    assert (config.critic.tau, config.lagrangian.maximum) == (0.05, 300.0)
    # The integral gain is that of dual ascent, the others are Stooke et al.'s ratios to it.
    pid = config.baseline.pid
    assert pid.integral == config.lagrangian.learning_rate == 0.03
    assert (pid.proportional, pid.derivative) == (0.3, 0.3)
    assert config.critic.cost_discount == CRITIC.cost_discount  # the rest is the pretrain run's


def test_relative_risk_leaves_what_every_action_shares_out_of_the_weights() -> None:
    # Risk that depends on the state alone: relative to the policy's own action it is 0, so the
    # mixture learns as without any aversion. Absolute, the risky states hardly count.
    generator = torch.Generator().manual_seed(1)
    observations = torch.randn(64, 1, generator=generator)
    actions = torch.tanh(torch.randn(64, 1, generator=generator) + observations)
    ones = torch.ones(64)
    batch = Batch(observations, actions, ones, ones, ones, observations, ones, ones, ones)

    def q(observations: Tensor, actions: Tensor) -> Tensor:
        return torch.zeros(2, len(observations)) + actions[:, 0]

    def mixture_after(**settings: object) -> list[Tensor]:
        config = ExtractionConfig(**settings)  # type: ignore[arg-type]
        sizes = NetworkConfig((8,), (), 1)
        networks = Networks(1, 1, sizes, torch.Generator().manual_seed(0))
        rng = torch.Generator().manual_seed(0)
        extraction = Extraction(networks, config, rng)
        networks.q = q  # type: ignore[method-assign]
        penalty = Penalty(lambda o, t, a: torch.sigmoid(3.0 * o[:, 0]), torch.tensor(1.0))
        extraction.update(batch, torch.zeros(64), Steering((penalty,)))
        return [p.detach().clone() for p in extraction.mixture.parameters()]

    indifferent = mixture_after(risk_aversion=0.0)
    relative = mixture_after(risk_aversion=50.0, relative_risk=True)
    absolute = mixture_after(risk_aversion=50.0)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(indifferent, relative, strict=True))
    assert not all(torch.allclose(a, b) for a, b in zip(indifferent, absolute, strict=True))
