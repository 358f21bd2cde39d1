"""The baselines: their formulas by hand, and what they do in the online loop."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from safe_offrl.agents import AgentConfigs, online_agent
from safe_offrl.agents.bc import BC, BCConfig, safe_episodes
from safe_offrl.agents.iql import IQL, IQLConfig, OnlineIQL
from safe_offrl.agents.steering import Steering
from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, DataError
from safe_offrl.limits import Limit
from safe_offrl.policies.acting import NumpyActor, UniformActor
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks
from safe_offrl.safety.critic import SafetyCriticConfig
from safe_offrl.safety.multiplier import LagrangianConfig, PIDConfig
from safe_offrl.spec import SafetySpec
from safe_offrl.train.baselines import BaselineConfig
from safe_offrl.train.finetune import Finetuning
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.iteration import Iteration
from safe_offrl.train.pretrain import Pretraining
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Batch, Episode
from tests.agents.setups import setup_of

ENV, HORIZON = "HazardLine-v0", 20
NETWORKS = NetworkConfig((16,), (16,), 3)
CRITIC = SafetyCriticConfig(members=3, reference=1, hidden=(16,))
OFF = {"kl": False, "safety_constraint": False, "shield": False, "guard": False}
LAGRANGIAN = {"kl": False, "shield": False, "guard": False}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- formulas ---


def state(**fields: list[float]) -> Batch:
    """Transitions at the one-number observation 0."""
    n = len(next(iter(fields.values())))
    zero = torch.zeros(n)
    batch = Batch(
        torch.zeros(n, 1), torch.zeros(n, 1), zero, zero, zero, torch.zeros(n, 1), zero, zero, zero
    )
    columns = {k: torch.tensor(v) for k, v in fields.items()}
    columns |= {k: v.unsqueeze(1) for k, v in columns.items() if k == "actions"}
    return batch._replace(**columns)


def gaussian_actor(mean: float, std_share: float = 0.0) -> Actor:
    """mean and log std everywhere; the log std is -1.5 + 3.5 tanh(std_share)."""
    actor = Actor(1, 1, (), seeded())
    with torch.no_grad():
        weight, bias = actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor([mean, std_share]))
    return actor


def log_density(action: float, mean: float) -> float:
    """Of a tanh-Gaussian with log std -1.5, by hand."""
    u = math.atanh(action)
    z = (u - mean) / math.exp(-1.5)
    return -0.5 * z * z + 1.5 - 0.5 * math.log(2 * math.pi) - math.log(1 - action**2)


def test_behaviour_cloning_is_the_mean_negative_log_likelihood() -> None:
    networks = Networks(1, 1, NETWORKS, seeded())
    networks.actor = gaussian_actor(0.2)
    agent = BC(setup_of(networks, seeded()), BCConfig())
    (loss,) = agent.loss(state(actions=[0.5, -0.3]))
    expected = -(log_density(0.5, 0.2) + log_density(-0.3, 0.2)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def constant(network: torch.nn.Module, value: float) -> None:
    with torch.no_grad():
        network.output.weight.zero_()  # type: ignore[union-attr, operator]
        network.output.bias.fill_(value)  # type: ignore[union-attr, operator]


def test_online_iql_weighs_actions_by_their_advantage() -> None:
    """Q = 1.5, V = 1: each of the two actions weighs exp(3 x .5), below the limit; then above."""
    sizes = NetworkConfig((), (4,), 2)
    networks = Networks(1, 1, sizes, seeded())
    networks.actor = gaussian_actor(0.2)
    for limit, weight in ((100.0, math.exp(1.5)), (2.0, 2.0)):
        config = IQLConfig(inverse_temperature=3.0, weight_limit=limit)
        agent = OnlineIQL(setup_of(networks, seeded()), config)
        constant(networks.target_critics, 1.5)
        constant(agent.values.value, 1.0)
        (loss,) = agent.actor_loss(state(actions=[0.5, -0.3]))
        expected = -weight * (log_density(0.5, 0.2) + log_density(-0.3, 0.2)) / 2
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_categorical_policy_has_the_log_probability_of_the_action_taken() -> None:
    actor = Actor(1, 3, (), seeded(), kind_for(discrete=True))
    with torch.no_grad():
        weight, bias = actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor([0.5, 0.3, 0.2]).log())
    taken = torch.eye(3)[[2, 0]]
    log_probs = actor.density(torch.zeros(2, 1)).log_prob(taken)
    torch.testing.assert_close(log_probs, torch.tensor([0.2, 0.5]).log())


@pytest.mark.parametrize("name", ["rlpd", "iql", "calql"])
def test_online_learners_move_actor_and_critics(name: str) -> None:
    networks = Networks(1, 1, NETWORKS, seeded())
    learner = online_agent(name, setup_of(networks, seeded()), AgentConfigs())
    batch = state(actions=[0.5, -0.3, 0.1, 0.0], rewards=[1.0, 0.0, 2.0, 1.0])

    def copies(module: torch.nn.Module) -> list[Tensor]:
        return [p.detach().clone() for p in module.parameters()]

    actor, critics = copies(networks.actor), copies(networks.critics)
    learner.update_critics(batch)
    assert all(map(torch.equal, actor, copies(networks.actor)))
    assert not all(map(torch.equal, critics, copies(networks.critics)))
    critics = copies(networks.critics)
    learner.update_actor(batch, Steering())
    assert not all(map(torch.equal, actor, copies(networks.actor)))
    assert all(map(torch.equal, critics, copies(networks.critics)))


def test_uniform_actions_fill_the_box_evenly_and_take_every_choice() -> None:
    rng = np.random.default_rng(0)
    box = UniformActor(kind_for(discrete=False), 2)
    drawn = box.draw(np.zeros(3, np.float32), 4000, rng)
    assert drawn.dtype == np.float32
    assert np.abs(drawn).max() <= 1.0
    np.testing.assert_allclose(drawn.mean(0), 0.0, atol=0.05)
    np.testing.assert_allclose(drawn.var(0), 1 / 3, atol=0.02)  # of a uniform law on [-1, 1]
    choice = UniformActor(kind_for(discrete=True), 3)
    counts = choice.draw(np.zeros(3, np.float32), 3000, rng).sum(0)
    np.testing.assert_allclose(counts, 1000, atol=100)


# --- in the loop ---


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    env = make_env(ENV, SafetySpec())
    arrays = log_episodes(
        env, behaviours=[random_behaviour(1)], shares=[1.0], transitions=1500, seed=0
    )
    path = tmp_path_factory.mktemp("line") / "line.hdf5"
    metadata = {"env_id": ENV, "accident": "cost", "cost_threshold": 0.0, "horizon": HORIZON}
    write_dataset(path, arrays, metadata | {"behaviours": [{"name": "random"}]})
    return load_dataset(path, discount=0.99, spec=SafetySpec())


def pretrained(dataset: Dataset, agent: str, **settings: Any) -> Pretraining:
    defaults: dict[str, Any] = {"steps": 40, "alignment_steps": 10, "batch_size": 32}
    defaults |= {"networks": NETWORKS, "critic": CRITIC, "log_every": 50, "env": ENV}
    result = Pretraining(PretrainConfig(agent=agent, **{**defaults, **settings}), dataset)
    list(result.run())
    return result


@pytest.fixture(scope="module")
def by_iql(dataset: Dataset) -> Pretraining:
    return pretrained(dataset, "iql")


def config_of(baseline: dict[str, Any], **settings: Any) -> FinetuneConfig:
    defaults: dict[str, Any] = {"budget": 400, "warmup_steps": 100, "update_every": 3, "utd": 2}
    defaults |= {"batch_size": 32, "networks": NETWORKS, "critic": CRITIC}
    defaults |= {"safety": SafetySpec(epsilon=0.3)}
    return FinetuneConfig(baseline=BaselineConfig(**baseline), **{**defaults, **settings})


def tuning_of(config: FinetuneConfig, dataset: Dataset, source: Pretraining) -> Finetuning:
    env = make_env(ENV, config.safety)
    return Finetuning(config, env, dataset, source.state_dict(), source.info())


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "iql": ({"learner": "iql"}, OFF),
    "calql": ({"learner": "calql"}, OFF),
    "scratch": ({"from_scratch": True}, OFF),
    "dual": ({"multiplier": "dual"}, LAGRANGIAN),
    "adaptive pid": ({"multiplier": "pid", "pid": PIDConfig(adaptive=True)}, LAGRANGIAN),
}


@pytest.mark.parametrize("case", list(CASES))
def test_resume_is_bitwise(case: str, dataset: Dataset, by_iql: Pretraining) -> None:
    config = config_of(CASES[case][0], **CASES[case][1])
    whole = tuning_of(config, dataset, by_iql)
    events, kept = [], None
    for event in whole.run():
        events.append(event)
        if isinstance(event, Iteration) and event.index == 3:
            kept = len(events), whole.state_dict(), json.dumps(whole.info())
    assert kept is not None
    rest = tuning_of(config, dataset, by_iql)
    rest.load(kept[1], json.loads(kept[2]))
    assert list(map(repr, rest.run())) == list(map(repr, events[kept[0] :]))
    ends = rest.state_dict(), whole.state_dict()
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


@pytest.mark.parametrize("case", list(CASES))
def test_the_learner_acts_after_every_episode_untested(
    case: str, dataset: Dataset, by_iql: Pretraining
) -> None:
    tuning = tuning_of(config_of(CASES[case][0], **CASES[case][1]), dataset, by_iql)
    events = list(tuning.run())
    online = [e for e in events if isinstance(e, Episode) and e.phase == "online"]
    iterations = [e for e in events if isinstance(e, Iteration)]
    assert len(iterations) == len(online) > 3
    assert [e.version for e in online] == list(range(len(online)))
    assert all(i.accepted and math.isnan(i.v_candidate) for i in iterations)
    assert not tuning.deployment.shield.acts


def test_from_scratch_forgets_the_policy_and_begins_at_random(
    dataset: Dataset, by_iql: Pretraining
) -> None:
    tuning = tuning_of(config_of({"from_scratch": True}, **OFF), dataset, by_iql)
    same = zip(tuning.networks.actor.parameters(), by_iql.networks.actor.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in same)
    critics = [p.detach().clone() for p in tuning.networks.critics.parameters()]
    for event in tuning.run():
        assert isinstance(event, Episode)
        if tuning.steps >= 100:
            break
    now = tuning.networks.critics.parameters()
    assert all(torch.equal(a, b) for a, b in zip(critics, now, strict=True))  # no update yet
    sent = tuning.experience.buffer.recent_transitions(tuning.steps).actions.squeeze(1)
    assert sent.abs().max() <= 1.0
    assert sent.var().item() == pytest.approx(1 / 3, abs=0.08)


def test_only_the_warm_up_is_random(
    dataset: Dataset, by_iql: Pretraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = tuning_of(config_of({"from_scratch": True}, **OFF), dataset, by_iql)
    drawn_at = []
    draw = UniformActor.draw

    def watched(self: UniformActor, *arguments: Any) -> Any:
        drawn_at.append(tuning.steps)
        return draw(self, *arguments)

    monkeypatch.setattr(UniformActor, "draw", watched)
    episodes = [event for event in tuning.run() if isinstance(event, Episode)]
    warm = [e for e in episodes if e.phase == "warmup"]
    assert len(drawn_at) == sum(e.steps for e in warm)
    assert max(drawn_at) < 100 <= warm[-1].total_steps


def test_iql_goes_on_with_the_values_it_was_pretrained_with(
    dataset: Dataset, by_iql: Pretraining
) -> None:
    tuning = tuning_of(config_of({"learner": "iql"}, **OFF), dataset, by_iql)
    assert isinstance(tuning.learner, OnlineIQL)
    assert isinstance(by_iql.agent, IQL)
    mine, theirs = tuning.learner.values.value, by_iql.agent.values.value
    assert all(
        torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True)
    )


def test_cal_ql_has_a_reference_return_online_too(dataset: Dataset, by_iql: Pretraining) -> None:
    tuning = tuning_of(config_of({"learner": "calql"}, **OFF), dataset, by_iql)
    events = (event for event in tuning.run() if isinstance(event, Episode))
    event = next(event for event in events if event.episode_return > 0)
    lived = tuning.experience.buffer.recent_transitions(
        event.steps
    )  # HazardLine pays 1 at the goal, at the end
    unit = tuning.normalizer.reward_scale  # learnt from is a reward in the log's own size
    assert lived.rewards[-1].item() == pytest.approx(unit)
    expected = unit * 0.99 ** torch.arange(event.steps - 1, -1, -1)
    torch.testing.assert_close(lived.return_to_go, expected)


@pytest.mark.parametrize("init", [None, 0.0, 2.5])
def test_lambda_begins_where_it_is_told(
    dataset: Dataset, by_iql: Pretraining, init: float | None
) -> None:
    offline = by_iql.constraints[0].multiplier.value.item()
    for kind in ("dual", "pid"):
        baseline = {"multiplier": kind, "multiplier_init": init}
        tuning = tuning_of(config_of(baseline, **LAGRANGIAN), dataset, by_iql)
        assert tuning.constraints[0].multiplier.value.item() == pytest.approx(
            offline if init is None else init
        )


def test_lambda_of_a_lagrangian_method_follows_what_episodes_showed(
    dataset: Dataset, by_iql: Pretraining
) -> None:
    """HazardLine is dangerous: with a limit of 1 % lambda rises by its step in every update."""
    baseline = {"multiplier": "dual", "multiplier_init": 0.0}
    lagrangian = LagrangianConfig(learning_rate=0.01, maximum=100.0)
    config = config_of(
        baseline, **LAGRANGIAN, safety=SafetySpec(epsilon=0.01), lagrangian=lagrangian
    )
    tuning = tuning_of(config, dataset, by_iql)
    warm = 0
    for event in tuning.run():
        if isinstance(event, Episode) and event.phase == "warmup":
            warm = event.total_steps
    updates = tuning.steps // 3 - warm // 3
    assert tuning.monitor.recent_mean > 0.02
    assert tuning.constraints[0].multiplier.value.item() == pytest.approx(0.01 * updates, rel=1e-4)


@pytest.mark.parametrize(
    ("baseline", "settings", "message"),
    [
        ({"multiplier": "dual"}, {}, "Switch kl, shield and guard off"),
        ({"multiplier": "pid"}, OFF, "Switch kl, shield and guard off, safety_constraint on"),
        ({"from_scratch": True}, {}, "no safe policy to begin with"),
        ({"sooper": True}, OFF, "baseline.sooper is a guard, but guard is off"),
        ({"multiplier_init": 1.0}, {}, "needs baseline.multiplier dual or pid"),
        ({"multiplier": "dual", "multiplier_init": -1.0}, LAGRANGIAN, "at least 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    baseline: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(baseline, **settings)


# --- BC-Safe ---


def test_only_safe_episodes_are_imitated(dataset: Dataset) -> None:
    safe = safe_episodes(dataset, [Limit("accident", 0.1, 1.0)])
    assert 0 < safe.episodes == int((~dataset.episode_accidents).sum()) < dataset.episodes
    assert not safe.episode_accidents.any()
    by_cost = safe_episodes(dataset, [Limit("cost", 0.5 / HORIZON, HORIZON)])  # within .5: none
    assert by_cost.episodes == safe.episodes
    everything = safe_episodes(dataset, [Limit("cost", 1.0, HORIZON)])
    assert everything.episodes == dataset.episodes
    bad = dataset.subset(np.flatnonzero(dataset.episode_accidents))
    with pytest.raises(DataError, match="nothing to imitate"):
        safe_episodes(bad, [Limit("accident", 0.1, 1.0)])


def test_bc_safe_does_what_safe_episodes_did_and_is_resumed_bitwise(dataset: Dataset) -> None:
    """Two behaviours that differ: where accidents were, right of the middle; else left."""
    accidents = np.repeat(dataset.episode_accidents, dataset.episode_lengths)
    actions = torch.where(torch.from_numpy(accidents), 0.6, -0.6).unsqueeze(1)
    rows = dataset.layout.pack(dataset.transitions._replace(actions=actions))
    marked = Dataset(**{**vars(dataset), "rows": rows})
    settings: dict[str, Any] = {"steps": 400, "alignment_steps": 5, "log_every": 200}
    settings["agents"] = AgentConfigs(bc=BCConfig(learning_rate=0.01))
    whole = pretrained(marked, "bc_safe", **settings)
    acting = NumpyActor(whole.networks.actor)
    starts = whole.train.initial_observations.numpy()[:20]
    mean = np.stack([acting.mean_action(x) for x in starts])
    np.testing.assert_allclose(mean, -0.6, atol=0.1)
    config = PretrainConfig(**vars(whole.config))
    first = Pretraining(config, marked)
    for record in first.run():
        if record.step == 200:
            break
    rest = Pretraining(config, marked)
    rest.load(first.state_dict(), first.info())
    list(rest.run())
    ends = rest.state_dict(), whole.state_dict()
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
