import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from safe_offrl.env.adapter import AccidentEnv, episode_seed
from safe_offrl.env.make import make_env
from safe_offrl.errors import EnvError, EnvFault
from safe_offrl.spec import SafetySpec

COST = SafetySpec(horizon=5)


class Script(gymnasium.Env[Any, Any]):
    """Plays back (observation, reward, terminated, truncated, info); records the actions."""

    def __init__(
        self,
        steps: list[tuple[Any, float, bool, bool, dict[str, Any]]],
        first: Any = None,
        observation_space: spaces.Space[Any] | None = None,
        action_space: spaces.Space[Any] | None = None,
    ) -> None:
        self.steps = iter(steps)
        self.first = np.zeros(2) if first is None else first
        self.observation_space = observation_space or spaces.Box(-np.inf, np.inf, (2,))
        self.action_space = action_space or spaces.Box(-1.0, 1.0, (1,))
        self.actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self.first, {}

    def step(self, action: Any) -> Any:
        self.actions.append(action)
        return next(self.steps)


def step_of(
    observation: Any = None,
    *,
    reward: float = 0.0,
    terminated: bool = False,
    truncated: bool = False,
    info: dict[str, Any] | None = None,
) -> tuple[Any, float, bool, bool, dict[str, Any]]:
    observation = np.zeros(2) if observation is None else observation
    return observation, reward, terminated, truncated, {"cost": 0.0} if info is None else info


def act(env: AccidentEnv, value: float = 0.0) -> Any:
    return env.step(np.full(env.action_size, value, dtype=np.float32))


def test_the_accident_is_a_cost_above_the_threshold() -> None:
    costs = [0.0, 0.5, 0.6, 2.0]
    spec = SafetySpec(horizon=9, cost_threshold=0.5)
    env = AccidentEnv(Script([step_of(info={"cost": c, "other": 1}) for c in costs]), spec)
    env.reset(seed=0)
    infos = [act(env)[4] for _ in costs]
    assert [i["accident"] for i in infos] == [False, False, True, True]
    assert [i["cost"] for i in infos] == costs
    assert all(type(i["accident"]) is bool and i["other"] == 1 for i in infos)


def test_the_accident_can_be_a_termination() -> None:
    steps = [step_of(info={}), step_of(info={}, terminated=True)]
    env = AccidentEnv(Script(steps), SafetySpec(horizon=9, accident="terminated"))
    env.reset(seed=0)
    infos = [act(env)[4] for _ in steps]
    assert [(i["accident"], i["cost"]) for i in infos] == [(False, 0.0), (True, 1.0)]


def test_the_accident_can_be_a_users_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rule_of_test_env.py").write_text(
        "def fast(observation, action, next_observation, reward, terminated, truncated, info):\n"
        "    return abs(next_observation['x'] - observation['x'])[0] > 1.0 and action[0] > 5.0\n"
        "def wrong(*arguments):\n"
        "    return 'yes'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    space = spaces.Dict({"x": spaces.Box(-9.0, 9.0, (1,))})
    positions = [np.array([x]) for x in (0.5, 3.0, 5.5, 6.0)]

    def script() -> Script:
        return Script(
            [step_of({"x": x}, info={"cost": 7.0}) for x in positions],
            first={"x": np.zeros(1)},
            observation_space=space,
            action_space=spaces.Box(0.0, 10.0, (1,)),
        )

    env = AccidentEnv(script(), SafetySpec(horizon=9, accident="rule_of_test_env:fast"))
    env.reset(seed=0)
    # Moves of .5, 2.5, 2.5 and .5; actions of 10, 10, 0 and 10 in the environment's own units.
    infos = [act(env, value)[4] for value in (1.0, 1.0, -1.0, 1.0)]
    assert [i["accident"] for i in infos] == [False, True, False, False]
    assert infos[1]["cost"] == 7.0
    wrong = AccidentEnv(script(), SafetySpec(horizon=9, accident="rule_of_test_env:wrong"))
    wrong.reset(seed=0)
    with pytest.raises(EnvError, match="returned 'yes'"):
        act(wrong)
    with pytest.raises(EnvError, match='has no function "slow"'):
        AccidentEnv(script(), SafetySpec(horizon=9, accident="rule_of_test_env:slow"))
    with pytest.raises(EnvError, match="could not be imported"):
        AccidentEnv(script(), SafetySpec(horizon=9, accident="no_such_module:fast"))


def test_no_accident_signal_is_an_error_with_its_remedy() -> None:
    env = AccidentEnv(Script([step_of(info={})]), COST)
    env.reset(seed=0)
    with pytest.raises(EnvError, match=r"no accident signal.*safety\.accident"):
        act(env)


def test_truncates_at_the_horizon_and_a_termination_is_no_truncation() -> None:
    env = AccidentEnv(Script([step_of()] * 6), SafetySpec(horizon=3))
    env.reset(seed=0)
    assert [act(env)[3] for _ in range(3)] == [False, False, True]
    env.reset(seed=1)  # the count starts again
    assert [act(env)[3] for _ in range(3)] == [False, False, True]
    last = AccidentEnv(Script([step_of(terminated=True, truncated=True)]), SafetySpec(horizon=1))
    last.reset(seed=0)
    assert act(last)[2:4] == (True, False)


@pytest.mark.promise("R9")
def test_actions_are_clipped_and_rescaled_to_the_environments_bounds() -> None:
    box = spaces.Box(np.array([0.0, -2.0]), np.array([10.0, 4.0]), dtype=np.float64)
    script = Script([step_of()] * 4, action_space=box)
    env = AccidentEnv(script, COST)
    env.reset(seed=0)
    for action in ([-1.0, -1.0], [1.0, 1.0], [0.0, 0.5], [3.0, -3.0]):
        env.step(np.array(action, dtype=np.float32))
    expected = [[0.0, -2.0], [10.0, 4.0], [5.0, 2.5], [10.0, -2.0]]
    np.testing.assert_allclose(np.array(script.actions), expected)
    assert script.actions[0].dtype == np.float64
    single = Script([step_of()])
    one = AccidentEnv(single, COST)
    one.reset(seed=0)
    act(one)
    assert single.actions[0].dtype == np.float32
    assert (env.action_size, env.action_space.shape) == (2, (2,))
    with pytest.raises(EnvError, match="was not sent"):
        env.step(np.array([np.nan, 0.0], dtype=np.float32))
    assert len(script.actions) == 4
    with pytest.raises(ValueError, match="shape"):
        env.step(np.zeros((1, 2), dtype=np.float32))


def test_observations_are_flattened_in_the_order_of_the_space() -> None:
    space = spaces.Dict(
        {
            "b": spaces.Box(-1.0, 1.0, (2, 2), np.float64),
            "a": spaces.Tuple([spaces.Box(0, 255, (1,), np.uint8), spaces.Box(-3.0, 3.0, ())]),
        }
    )
    assert list(space.spaces) == ["a", "b"]  # Gymnasium sorts the keys of a plain dict
    value = {"b": np.array([[0.1, 0.2], [0.3, 0.4]]), "a": (np.array([7], np.uint8), 1.5)}
    env = AccidentEnv(Script([step_of(value)], first=value, observation_space=space), COST)
    for observation in (env.reset(seed=0)[0], act(env)[0]):
        assert observation.dtype == np.float32
        np.testing.assert_allclose(observation, [7.0, 1.5, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    assert env.observation_size == 6
    assert env.observation_space.contains(np.array([7.0, 1.5, 0.1, 0.2, 0.3, 0.4], np.float32))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (step_of(np.array([0.0, np.nan])), "NaN or infinity"),
        (step_of(np.array([0.0, 1e300])), "NaN or infinity"),
        (step_of(np.zeros(3)), "observation of 3 numbers"),
        (step_of(reward=float("inf")), "reward inf"),
        (step_of(info={"cost": float("nan")}), "cost nan"),
    ],
)
def test_faults_of_the_environment_are_named(step: Any, message: str) -> None:
    env = AccidentEnv(Script([step]), COST)
    env.reset(seed=0)
    with pytest.raises(EnvError, match=message):
        act(env)


@pytest.mark.parametrize(
    "limits",
    [{"constraint": "cost", "cost_limit": 1.0}, {"limits": {"accident": 0.1, "cost": 1.0}}],
    ids=["alone", "second"],
)
def test_where_cost_is_limited_it_cannot_be_negative(limits: dict[str, Any]) -> None:
    step = step_of(info={"cost": -0.5})
    plain = AccidentEnv(Script([step]), COST)
    plain.reset(seed=0)
    assert act(plain)[4]["cost"] == -0.5
    limited = AccidentEnv(Script([step]), replace(COST, **limits))
    limited.reset(seed=0)
    with pytest.raises(EnvFault, match=r"cost -0\.5 at step 1.*0 or more"):
        act(limited)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (None, spaces.Discrete(1), "at least 2 actions"),
        (None, spaces.MultiDiscrete([2, 2]), "cannot be used"),
        (None, spaces.Box(0, 5, (1,), np.int64), "integer Box"),
        (None, spaces.Box(-np.inf, np.inf, (1,)), "infinite action bounds"),
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), None, "image observations"),
        (spaces.Discrete(4), None, "observations of type Discrete"),
        (spaces.Dict({"x": spaces.Discrete(4)}), None, "observations of type Discrete"),
    ],
)
def test_spaces_that_cannot_be_used_are_refused(
    observation_space: Any, action_space: Any, message: str
) -> None:
    script = Script([], observation_space=observation_space, action_space=action_space)
    with pytest.raises(EnvError, match=message):
        AccidentEnv(script, COST)


def test_the_horizon_is_the_specs_or_the_environments() -> None:
    assert make_env("PointHazard-v0", SafetySpec()).horizon == 100
    assert make_env("PointHazard-v0", SafetySpec(horizon=30)).horizon == 30
    with pytest.raises(EnvError, match=r"after 100 steps"):
        make_env("PointHazard-v0", SafetySpec(horizon=101))
    with pytest.raises(EnvError, match=r"no time limit.*safety\.horizon"):
        AccidentEnv(Script([]), SafetySpec())


def test_discrete_actions_are_one_hot_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rule_of_discrete.py").write_text(
        "def seven(observation, action, *rest):\n    return bool(action == 7)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = Script([step_of()] * 4, action_space=spaces.Discrete(3, start=5))
    env = AccidentEnv(script, SafetySpec(horizon=9, accident="rule_of_discrete:seven"))
    assert env.discrete
    assert env.action_size == 3
    assert env.action_space == spaces.Box(0.0, 1.0, (3,), np.float32)
    env.reset(seed=0)
    rows = np.array([[1, 0, 0], [0, 0, 1], [0.2, 0.5, 0.3]], np.float32)
    infos = [env.step(row)[4] for row in rows]
    # The environment and the user's function get the environment's own number.
    assert script.actions == [5, 7, 6]
    assert all(script.action_space.contains(action) for action in script.actions)
    assert [info["accident"] for info in infos] == [False, True, False]
    assert [env.executed(row).tolist() for row in rows] == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert env.one_hot(7).tolist() == [0, 0, 1]
    for bad in (np.array([0.0, np.nan, 1.0]), np.array([0.0, np.inf, 0.0])):
        with pytest.raises(EnvError, match="not sent"):
            env.step(bad)
        with pytest.raises(EnvError, match="not sent"):
            env.executed(bad)


def test_continuous_actions_are_executed_within_their_bounds() -> None:
    env = AccidentEnv(Script([]), COST)
    assert not env.discrete
    assert env.executed(np.array([1.5], np.float32)).tolist() == [1.0]


def test_a_discrete_environment_of_gymnasium() -> None:
    env = make_env("CartPole-v1", SafetySpec(accident="terminated"))
    env.reset(seed=0)
    assert (env.discrete, env.action_size) == (True, 2)
    *_, info = env.step(np.array([0.0, 1.0], np.float32))
    assert info["accident"] is False


def test_an_unknown_environment_is_one_sentence_and_a_remedy() -> None:
    with pytest.raises(EnvError, match=r'no environment "PointHazzard-v0".*package\.module'):
        make_env("PointHazzard-v0", SafetySpec())
    with pytest.raises(EnvError, match=r"no_such_module .* could not be imported"):
        make_env("no_such_module:Env-v0", SafetySpec())


def test_an_environment_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "env_of_test_env.py").write_text(
        "import gymnasium\n"
        "from safe_offrl.envs.hazard_line import HazardLineEnv\n"
        "class Mine(HazardLineEnv):\n"
        "    def __init__(self):\n"  # takes no render_mode
        "        super().__init__()\n"
        "gymnasium.register('Mine-v0', entry_point=Mine, max_episode_steps=7)\n"
    )
    (tmp_path / "broken_of_test_env.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    env = make_env("env_of_test_env:Mine-v0", SafetySpec())
    assert (env.env_id, env.horizon) == ("env_of_test_env:Mine-v0", 7)
    with pytest.raises(EnvError, match="division by zero"):
        make_env("broken_of_test_env:Mine-v0", SafetySpec())


def test_versions_identify_the_environments_source() -> None:
    point, line = (
        make_env(i, SafetySpec()).versions() for i in ("PointHazard-v0", "HazardLine-v0")
    )
    assert point["environment"].startswith("safe_offrl ")
    assert len(point["environment_source"]) == 64
    assert point["environment_source"] != line["environment_source"]
    assert set(point) == {"python", "numpy", "gymnasium", "environment", "environment_source"}


def test_episode_seeds_differ_between_runs_episodes_and_streams() -> None:
    seeds = {
        episode_seed(run, index, stream)
        for run in range(5)
        for index in range(100)
        for stream in ("collect", "finetune", "evaluate")
    }
    assert len(seeds) == 5 * 100 * 3
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert episode_seed(1, 2, "collect") == 2103728727  # a change would change every run


def test_episode_cost_is_an_accident_from_where_it_is_exceeded_and_is_observed() -> None:
    costs = [0.5, 0.0, 1.0, 0.5, 3.0]
    spec = SafetySpec(accident="episode_cost", cost_threshold=1.5, horizon=5)
    script = [(np.zeros(2), 0.0, False, False, {"cost": cost}) for cost in costs]
    env = AccidentEnv(Script(script * 2), spec)
    assert env.observation_size == 3
    for _ in range(2):  # a new episode starts from nothing
        assert env.reset(seed=0)[0][-1] == 0.0
        steps = [env.step(np.zeros(1, np.float32)) for _ in costs]
        # 0.5, 0.5, 1.5 (not above), 2.0, 5.0 of 1.5; the share is cut off at 2
        assert [s[4]["accident"] for s in steps] == [False, False, False, True, True]
        assert [float(s[0][-1]) for s in steps] == pytest.approx([1 / 3, 1 / 3, 1.0, 4 / 3, 2.0])
        assert [s[4]["cost"] for s in steps] == costs
        assert env.observation_space.contains(steps[-1][0])
