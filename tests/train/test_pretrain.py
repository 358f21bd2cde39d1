"""The offline loop: resumable, aligned with the policy it ends with, and judged at its end."""

import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from safe_offrl.agents import AGENTS, AgentConfigs
from safe_offrl.agents.rlpd import RLPDConfig
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.errors import ConfigError
from safe_offrl.policies.networks import NetworkConfig
from safe_offrl.safety.critic import SafetyCriticConfig
from safe_offrl.safety.multiplier import LagrangianConfig
from safe_offrl.spec import SafetySpec
from safe_offrl.train.finetune import Finetuning
from safe_offrl.train.pretrain import Pretraining
from safe_offrl.train.pretrain_config import FallbackConfig, PretrainConfig, discount_of
from tests.agents.setups import agents_for, configs_with


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> Dataset:
    return load_dataset(tiny_dataset, discount=0.99, spec=SafetySpec())


def config_of(agent: str = "iql", **settings: object) -> PretrainConfig:
    defaults: dict[str, object] = {
        "agent": agent,
        "steps": 30,
        "alignment_steps": 20,
        "batch_size": 32,
        "log_every": 10,
        "networks": NetworkConfig((16,), (16,), 3),
        "critic": SafetyCriticConfig(members=3, reference=1, hidden=(16,)),
    }
    return PretrainConfig(**{**defaults, **settings})  # type: ignore[arg-type]


def different(one: dict[str, Tensor], other: dict[str, Tensor], start: str) -> list[str]:
    return [k for k in one if k.startswith(start) and not torch.equal(one[k], other[k])]


@pytest.mark.parametrize("agent", agents_for(discrete=False))
def test_resume_equals_uninterrupted_bitwise(dataset: Dataset, agent: str) -> None:
    whole = Pretraining(config_of(agent), dataset)
    records, kept = [], {}
    for record in whole.run():
        records.append(record)
        kept[record.step] = whole.state_dict(), json.dumps(whole.info())
    assert [r.step for r in records] == [10, 20, 30, 40, 50, 60, 70, 80]
    for step in (20, 40, 60):  # while learning, while aligning, and while learning to fall back
        rest = Pretraining(config_of(agent), dataset)
        rest.load(kept[step][0], json.loads(kept[step][1]))
        assert list(rest.run()) == records[step // 10 :]
        assert not different(rest.state_dict(), whole.state_dict(), "")
        assert rest.info() == whole.info()
        assert repr(rest.calibrations()[0]) == repr(whole.calibrations()[0])


def test_alignment_freezes_the_actor_and_moves_the_critics(dataset: Dataset) -> None:
    pretraining = Pretraining(config_of(), dataset)
    states = {record.step: pretraining.state_dict() for record in pretraining.run()}
    assert not different(states[30], states[50], "learner.actor/")
    assert not different(states[30], states[50], "multiplier")
    assert different(states[30], states[50], "learner.critics/")
    assert different(states[30], states[50], "learner.target_critics/")
    assert different(states[30], states[50], "safety_critic/")
    assert different(states[20], states[30], "learner.actor/")
    assert different(states[20], states[30], "multiplier")


def test_the_fallback_comes_last_and_moves_by_itself(dataset: Dataset) -> None:
    pretraining = Pretraining(config_of(), dataset)
    assert pretraining.begins == (0, 30, 50)
    begins = pretraining.state_dict()
    states = {record.step: pretraining.state_dict() for record in pretraining.run()}
    assert not different(begins, states[50], "fallback.")
    for part in ("actor", "mixture", "safety_critic", "generator"):
        assert different(states[50], states[80], f"fallback.{part}/")
    others = {k: v for k, v in states[50].items() if not k.startswith("fallback.")}
    assert not different(others, states[80], "")


@pytest.mark.parametrize("agent", agents_for(discrete=False))
def test_nothing_else_changes_with_the_fallback(dataset: Dataset, agent: str) -> None:
    """What it draws it draws from a generator of its own."""
    whole = Pretraining(config_of(agent), dataset)
    alone = Pretraining(config_of(agent, fallback=FallbackConfig(steps=0)), dataset)
    records = list(alone.run())
    assert [r.step for r in records] == [10, 20, 30, 40, 50]
    assert list(whole.run())[:5] == records
    tensors = alone.state_dict()
    assert not any(name.startswith("fallback.") for name in tensors)
    assert not different(tensors, whole.state_dict(), "")
    own = {k for k in whole.state_dict() if k.startswith(("fallback.", "guard/"))}
    assert set(whole.state_dict()) - own == set(tensors)
    assert alone.info() == whole.info() | {"step": 50, "guard": None}
    (report,), (other,) = alone.reports, whole.reports
    refused = other.guard_refusals
    assert repr(dataclasses.replace(report, guard_refusals=refused)) == repr(other)


def test_the_curves_of_the_fallback_have_its_name(dataset: Dataset) -> None:
    *earlier, _, _, last = Pretraining(config_of(), dataset).run()
    assert all(name.startswith("offline/fallback/") for name in last.values)
    assert {"offline/fallback/actor/kl_to_log", "offline/fallback/csc/estimate"} <= set(last.values)
    assert not any("fallback" in name for record in earlier[:5] for name in record.values)


def test_the_held_out_episodes_are_not_learnt_from(dataset: Dataset) -> None:
    pretraining = Pretraining(config_of(held_out=0.25), dataset)
    train, held_out = pretraining.train.rows, pretraining.held_out.rows
    assert isinstance(train, Tensor)
    assert isinstance(held_out, Tensor)
    rows = {tuple(row) for row in train.tolist()}
    assert rows.isdisjoint(tuple(row) for row in held_out.tolist())
    assert pretraining.train.episodes + pretraining.held_out.episodes == dataset.episodes
    assert pretraining.held_out.episodes == pytest.approx(0.25 * dataset.episodes, abs=1)
    mean = pretraining.train.transitions.observations.mean(0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)


def test_the_report_is_made_at_the_end(dataset: Dataset) -> None:
    pretraining = Pretraining(config_of(), dataset)
    assert not pretraining.reports
    list(pretraining.run())
    (report,) = pretraining.reports
    assert report is pretraining.calibrations()[0]
    assert report.episodes == pretraining.held_out.episodes
    # Fifty steps make no critic that may shield, and thirty none that may be watched by.
    assert not report.shield_acts
    assert report.guard_refusals
    info = pretraining.info()
    assert (info["step"], info["shield_acts"], info["guard"]) == (80, False, None)


@pytest.mark.parametrize(
    "settings",
    [{"agent": "sac"}, {"steps": 0}, {"batch_size": 1}, {"held_out": 0.0}, {"held_out": 0.95}],
    ids=str,
)
def test_settings_that_cannot_run_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        config_of(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("constraint", ["accident", "cost"])
@pytest.mark.parametrize("episodes", [2, 3])
def test_the_fewest_episodes_that_can_be_split_are_learnt_from(
    dataset: Dataset, constraint: str, episodes: int
) -> None:
    accidents = np.flatnonzero(dataset.episode_accidents)
    others = np.flatnonzero(~dataset.episode_accidents)
    few = dataset.subset(np.concatenate([accidents[:1], others[: episodes - 1]]))
    for seed in range(3):  # whichever episode is held out
        safety = SafetySpec(constraint=constraint, cost_limit=0.5)
        pretraining = Pretraining(config_of(held_out=0.15, safety=safety, seed=seed), few)
        list(pretraining.run())
        assert pretraining.calibrations()[0].episodes == 1


def test_the_upper_estimate_is_as_sure_as_was_asked(dataset: Dataset) -> None:
    def upper(confidence: float) -> float:
        safety = SafetySpec(confidence=confidence)
        return Pretraining(config_of(safety=safety), dataset).estimate().upper

    mean = upper(0.5)
    assert (upper(0.99) - mean) / (upper(0.95) - mean) == pytest.approx(2.326 / 1.645, rel=1e-3)


@pytest.mark.parametrize("agent", list(AGENTS))
def test_values_are_discounted_by_whoever_learns_them(agent: str) -> None:
    """Who learns none has the discount of the alignment, by which values are learnt after it."""
    key = AgentConfigs().key(AGENTS[agent])
    learns = AGENTS[agent].Config().discount is not None
    agents = configs_with({key: {"discount": 0.9}} if learns else {})
    config = PretrainConfig(agent=agent, agents=agents, alignment=RLPDConfig(discount=0.9))
    assert discount_of(config) == 0.9
    if learns:
        with pytest.raises(ConfigError, match=r"discounted by 0\.9"):
            dataclasses.replace(config, alignment=RLPDConfig(discount=0.94))


def test_an_agent_of_ones_own_has_the_discount_of_its_settings() -> None:
    """Also where nobody has imported it, as in a process that reads a stored run."""
    own = AgentConfigs(own={"discount": 0.9})
    config = PretrainConfig(agent="nowhere:toy", agents=own, alignment=RLPDConfig(discount=0.9))
    assert discount_of(config) == 0.9
    with pytest.raises(ConfigError, match=r"discounted by 0\.9"):
        PretrainConfig(agent="nowhere:toy", agents=own)


def test_settings_of_an_agent_that_is_not_ones_own_are_named_as_such() -> None:
    own = AgentConfigs(own={"learning_rate": 0.1})
    with pytest.raises(ConfigError, match=r"agent is calql.*set agents\.cql"):
        PretrainConfig(agent="calql", agents=own)


@pytest.mark.parametrize("agent", ["iql", "crr", "td3bc"])
def test_without_the_constraint_an_actor_knows_nothing_of_safety(
    dataset: Dataset, agent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the safety critic says of actions, the actor is the same; lambda stays put."""

    def actor(offset: float, *, constraint: bool) -> tuple[list[Tensor], float]:
        config = config_of(
            agent, steps=8, safety_constraint=constraint, fallback=FallbackConfig(steps=0)
        )
        loop = Pretraining(config, dataset)
        ((_, critic, multiplier),) = loop.constraints
        for name in ("risk", "plain_risk"):
            monkeypatch.setattr(critic, name, lambda o, t, a: (offset * a[:, 0]).sigmoid())
        list(loop.run())
        return list(loop.networks.actor.parameters()), float(multiplier.value)

    (one, before), (other, after) = (actor(sign, constraint=False) for sign in (5.0, -5.0))
    assert all(map(torch.equal, one, other))
    assert before == after == LagrangianConfig().init
    (one, _), (other, _) = (actor(sign, constraint=True) for sign in (5.0, -5.0))
    assert not all(map(torch.equal, one, other))


@pytest.mark.parametrize("loop", [Pretraining, Finetuning])
def test_a_loop_names_no_agent(loop: type) -> None:
    source = inspect.getsource(loop)
    assert not [name for name in (*AGENTS, "rlpd") if f'"{name}"' in source]
    assert "isinstance(self.agent" not in source
    assert "isinstance(self.learner" not in source
