"""A controller of the environment as a teacher: who is asked, in what units, what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from safe_offrl.agents import AgentConfigs
from safe_offrl.agents.dagger import DAggerConfig
from safe_offrl.agents.protocol import Labeller
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.controllers import offered_controllers
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, EnvError
from safe_offrl.spec import EnvironmentConfig, SafetySpec
from safe_offrl.train.baselines import BaselineConfig
from safe_offrl.train.controllers import controller_for
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.types import Normalizer

PLAIN = Normalizer(np.zeros(2, np.float32), np.ones(2, np.float32))


class Task(gymnasium.Env[Any, Any]):
    """Two numbers, which never change."""

    observation_space = gymnasium.spaces.Box(-9.0, 9.0, (2,), np.float32)

    def __init__(self, actions: gymnasium.spaces.Space[Any]) -> None:
        self.action_space = actions

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(2, np.float32), {}


NUMBERS = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)


def env_with(
    monkeypatch: pytest.MonkeyPatch,
    controllers: dict[str, Any],
    actions: gymnasium.spaces.Space[Any] = NUMBERS,
    spec: SafetySpec | None = None,
) -> AccidentEnv:
    """Of a module that offers these controllers."""
    module = ModuleType("a_task")
    module.scripted_behaviours = lambda: {  # type: ignore[attr-defined]
        name: (lambda rng, act=act: act) for name, act in controllers.items()
    }
    monkeypatch.setitem(sys.modules, "a_task", module)
    own = type("Own", (Task,), {"__module__": "a_task"})
    return AccidentEnv(own(actions), spec or SafetySpec(horizon=5))


def config_of(controller: str = "", learner: str = "dagger", **settings: Any) -> FinetuneConfig:
    agents = AgentConfigs(dagger=DAggerConfig(controller=controller))
    return FinetuneConfig(baseline=BaselineConfig(learner=learner, agents=agents), **settings)


def label_of(env: AccidentEnv, normalizer: Normalizer = PLAIN, controller: str = "") -> Labeller:
    found = controller_for(config_of(controller), env, normalizer)
    assert found is not None
    return found


def test_a_controller_sees_the_environment_s_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """(o std + mean) + offset: (1 2 + 3) + 10 and (-1 .5 + 1) - 20; actions are cut off at 1."""
    seen = []

    def act(observation: Any) -> Any:
        seen.append(observation.tolist())
        return np.array([0.1 * observation[0]], np.float32)

    offset = np.array([10.0, -20.0])
    normalizer = Normalizer(
        np.array([3.0, 1.0], np.float32), np.array([2.0, 0.5], np.float32), 1.0, offset
    )
    label = label_of(env_with(monkeypatch, {"only": act}), normalizer)
    labels = label(torch.tensor([[1.0, -1.0], [-6.0, 0.0]]))
    assert seen == [[15.0, -19.5], [1.0, -19.0]]
    assert labels.flatten().tolist() == pytest.approx([1.0, 0.1])
    assert labels.dtype == torch.float32


def test_discrete_actions_are_one_hot_by_their_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    env = env_with(
        monkeypatch, {"only": lambda o: int(o[0])}, gymnasium.spaces.Discrete(3, start=4)
    )
    labels = label_of(env)(torch.tensor([[4.0, 0.0], [6.0, 0.0]]))
    assert labels.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_the_share_of_the_threshold_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SafetySpec(horizon=5, accident="episode_cost", cost_threshold=3.0)
    env = env_with(monkeypatch, {"only": lambda o: np.array([float(len(o))])}, spec=spec)
    normalizer = Normalizer(np.zeros(3, np.float32), np.full(3, 0.1, np.float32))
    (factory,) = offered_controllers(env).values()
    assert factory(np.random.default_rng(0))(np.zeros(3, np.float32)) == [2.0]
    assert label_of(env, normalizer)(torch.zeros(1, 3)).tolist() == [[1.0]]


def test_the_one_that_is_named_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    env = env_with(monkeypatch, {"left": lambda o: [-0.5], "right": lambda o: [0.5]})
    assert label_of(env, controller="right")(torch.zeros(2, 2)).tolist() == [[0.5], [0.5]]
    assert label_of(env, controller="left")(torch.zeros(1, 2)).tolist() == [[-0.5]]


def test_a_manner_is_drawn_once_by_the_seed() -> None:
    env = make_env("PointHazard-v0", SafetySpec())
    here = Normalizer(np.zeros(9, np.float32), np.ones(9, np.float32))
    observations = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) - 0.5
    labels = []
    for seed in (0, 0, 1):
        label = controller_for(config_of("cautious", seed=seed), env, here)
        assert label is not None
        labels.append(label(observations))
        assert torch.equal(label(observations), labels[-1])
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


def test_whoever_names_none_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the environment's module is not asked."""
    env = env_with(monkeypatch, {})
    sys.modules["a_task"].scripted_behaviours = lambda: pytest.fail("asked")  # type: ignore[attr-defined]
    for learner in ("rlpd", "calql"):
        assert controller_for(config_of(learner=learner), env, PLAIN) is None


@pytest.mark.parametrize("action", [[0.1, 0.2], [float("nan")], 0.5])
def test_what_is_no_action_is_said(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    env = env_with(monkeypatch, {"only": lambda o: action})
    with pytest.raises(EnvError, match=r'"only" of .* gave .* has 1 finite numbers\. Fix'):
        label_of(env)(torch.zeros(3, 2))


def test_what_cannot_be_asked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pendulum = make_env("Pendulum-v1", SafetySpec(accident="terminated"))
    with pytest.raises(ConfigError, match=r"offers none\. Define scripted_behaviours.*, or set"):
        controller_for(config_of(), pendulum, PLAIN)
    elsewhere = replace(config_of(), env=EnvironmentConfig(timeout=5.0))
    with pytest.raises(ConfigError, match=r"custom_environments\.md\), or leave env\.timeout out"):
        controller_for(elsewhere, pendulum, PLAIN)
    env = env_with(monkeypatch, {"left": None, "right": None})
    with pytest.raises(ConfigError, match=r"must be told which of .* offers, left, right"):
        controller_for(config_of(), env, PLAIN)
    with pytest.raises(ConfigError, match=r'"up" is not among .*, left, right. Set .*dagger.cont'):
        controller_for(config_of("up"), env, PLAIN)


def test_a_module_that_imports_our_function_of_that_name_offers_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from safe_offrl.collect.behaviours import scripted_behaviours

    env = env_with(monkeypatch, {})
    monkeypatch.setitem(
        sys.modules, "a_task", SimpleNamespace(scripted_behaviours=scripted_behaviours)
    )
    assert offered_controllers(env) == {}
