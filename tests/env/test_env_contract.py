"""What an environment may answer: every oddity is read as it is meant, or is one sentence."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import TransformAction

from safe_offrl.data_formats.complete import complete
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.env.action_bounds import placeholder
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.values import scalar
from safe_offrl.errors import DataError, EnvError, EnvFault
from safe_offrl.spec import SafetySpec

COST = SafetySpec(horizon=9)
LARGEST = float(np.finfo(np.float32).max)


class Answers(gymnasium.Env[Any, Any]):
    """Gives these answers of step(), one after the other; keeps and then spoils its actions."""

    observation_space: spaces.Space[Any] = spaces.Box(-9.0, 9.0, (2,))

    def __init__(self, *answers: Any, first: Any = None, actions: Any = None) -> None:
        self.answers, self.first = iter(answers), first
        self.action_space = spaces.Box(-1.0, 1.0, (1,)) if actions is None else actions
        self.position = np.zeros(2, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.position[:] = 0.0
        return (self.position, {}) if self.first is None else self.first

    def step(self, action: Any) -> Any:
        action *= 0.0
        answer = next(self.answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def answer(info: Any = None, *, reward: Any = 0.0, ends: tuple[Any, Any] = (False, False)) -> Any:
    return np.zeros(2), reward, *ends, {"cost": 0.0} if info is None else info


def adapted(*answers: Any, spec: SafetySpec = COST, **made: Any) -> AccidentEnv:
    env = AccidentEnv(Answers(*answers, **made), spec, env_id="Answers-v0")
    env.reset(seed=0)
    return env


def act(env: AccidentEnv) -> Any:
    return env.step(np.full(env.action_size, 0.5, np.float32))


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of accident rules."""
    (tmp_path / "rules_of_contract.py").write_text(
        "import numpy as np\n"
        "seen = []\n"
        "def parts(o, a, n, r, te, tr, info): return bool(np.sum(info['cost']) > 0)\n"
        "def array(o, a, n, r, te, tr, info): return np.array([info['cost'] > 0])\n"
        "def zero_d(o, a, n, r, te, tr, info): return np.array(info['cost'] > 0)\n"
        "def two(o, a, n, r, te, tr, info): return np.array([True, False])\n"
        "def number(o, a, n, r, te, tr, info): return 1\n"
        "def nothing(o, a, n, r, te, tr, info): return None\n"
        "def key(o, a, n, r, te, tr, info): return info['cost_of_nothing'] > 0\n"
        "def watch(o, a, n, r, te, tr, info):\n"
        "    seen.append((o.copy(), a.copy(), n.copy()))\n"
        "    return False\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return "rules_of_contract"


# --- costs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "number"),
    [
        (1, 1.0),
        (True, 1.0),
        (np.bool_(True), 1.0),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3.0),
        (np.array(0.25), 0.25),
        (np.array([0.25]), 0.25),
        (np.array([[2]], np.uint8), 2.0),
        (np.array([True]), 1.0),
        ([0.75], 0.75),
    ],
)
def test_what_is_one_number_is_a_cost(given: Any, number: float) -> None:
    info = act(adapted(answer({"cost": given})))[4]
    assert (info["cost"], info["accident"]) == (number, True)
    assert type(info["cost"]) is float


NO_NUMBERS: list[tuple[Any, str]] = [
    (np.array([1.0, 0.0]), "an array of shape (2,) and type float64"),
    (np.zeros(0), "an array of shape (0,)"),
    ([1.0, 0.0], "a list of 2 values"),
    ({"hazards": 1.0, "vases": 0.0}, "a dict with the keys hazards, vases"),
    ("1", "is '1'"),
    (b"1", "an object of type bytes"),
    (np.array(["1"]), "an array of shape (1,)"),
    (None, 'info["cost"] is None'),
    (object(), "an object of type object"),
]


@pytest.mark.parametrize(("given", "words"), NO_NUMBERS)
def test_what_is_no_number_is_one_sentence_under_the_rule_cost(given: Any, words: str) -> None:
    for rule in (COST, replace(COST, accident="episode_cost", cost_threshold=1.0)):
        env = adapted(answer(), answer({"cost": given}), spec=rule)
        act(env)
        with pytest.raises(EnvError, match=r"no accident signal.*at step 2\. Put one") as caught:
            act(env)
        assert words in str(caught.value)
        assert "safety.accident=package.module:function" in str(caught.value)
        assert not isinstance(caught.value, EnvFault)  # no episode will mend it


def test_near_names_of_a_missing_cost_are_named() -> None:
    env = adapted(answer({"cost_hazards": 1.0, "cost_sum": 1.0, "speed": 2.0}))
    with pytest.raises(EnvError, match=r'info has no "cost" \(it has cost_hazards, cost_sum\)'):
        act(env)


@pytest.mark.parametrize(("given", "_words"), NO_NUMBERS)
def test_an_own_rule_is_enough(given: Any, _words: str) -> None:
    """Where the environment's cost is no number an accident costs 1, as where there is none."""
    spec = replace(COST, accident="terminated")
    env = adapted(answer({"cost": given}), answer({"cost": given}, ends=(True, False)), spec=spec)
    infos = [act(env)[4] for _ in range(2)]
    assert [(i["accident"], i["cost"]) for i in infos] == [(False, 0.0), (True, 1.0)]


def test_an_own_rule_reads_the_cost_as_it_is(rules: str) -> None:
    spec = replace(COST, accident=f"{rules}:parts")
    env = adapted(*[answer({"cost": np.array(c)}) for c in ([0.0, 0.0], [0.0, 2.0])], spec=spec)
    infos = [act(env)[4] for _ in range(2)]
    assert [(i["accident"], i["cost"]) for i in infos] == [(False, 0.0), (True, 1.0)]


def test_a_limited_cost_must_be_a_number() -> None:
    spec = SafetySpec(horizon=9, accident="terminated", constraint="cost", cost_limit=3.0)
    env = adapted(answer({"cost": {"a": 1.0}}), spec=spec)
    with pytest.raises(EnvError, match=r"cost is limited.*dict with the keys a.*Put one number"):
        act(env)
    assert act(adapted(answer({}), spec=spec))[4]["cost"] == 0.0


# --- rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["array", "zero_d"])
def test_a_verdict_may_be_an_array_of_one(rules: str, name: str) -> None:
    spec = replace(COST, accident=f"{rules}:{name}")
    env = adapted(answer(), answer({"cost": 1.0}), spec=spec)
    accidents = [act(env)[4]["accident"] for _ in range(2)]
    assert accidents == [False, True]
    assert all(type(a) is bool for a in accidents)


@pytest.mark.parametrize("name", ["two", "number", "nothing"])
def test_other_verdicts_are_refused(rules: str, name: str) -> None:
    with pytest.raises(EnvError, match=r"returned .*True or False"):
        act(adapted(answer(), spec=replace(COST, accident=f"{rules}:{name}")))


def test_a_rule_that_raises_is_named(rules: str) -> None:
    env = adapted(answer(), spec=replace(COST, accident=f"{rules}:key"))
    words = r'rule "rules_of_contract:key" raised KeyError: .*\(rules_of_contract\.py, line 9\)'
    with pytest.raises(EnvFault, match=words):
        act(env)


def test_a_rule_sees_what_was_there_whatever_the_environment_writes_into(rules: str) -> None:
    """Its observation is changed in place by the environment, and so is its action."""

    class Moving(Answers):
        def step(self, action: Any) -> Any:
            self.position += np.float32(1.0)
            action *= 0.0
            return self.position, 0.0, False, False, {}

    env = AccidentEnv(Moving(), replace(COST, accident=f"{rules}:watch"), env_id="Moving-v0")
    env.reset(seed=0)
    act(env)
    act(env)
    found = [[float(x[0]) for x in step] for step in sys.modules[rules].seen]
    assert found == [[0.0, 0.5, 1.0], [1.0, 0.5, 2.0]]


# --- answers of the wrong form -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((np.zeros(2), 0.0, 0.0, False, False, {}), "returned a tuple of 6 values"),
        ((np.zeros(2), 0.0, False, {}), "returned a tuple of 4 values"),
        (np.zeros(2), r"returned an array of shape \(2,\)"),
        (None, "returned None"),
        ((np.zeros(2), 0.0, 0.0, {}, False), "truncated as a dict"),
        ((np.zeros(2), 0.0, "no", False, {}), "terminated as 'no'"),
        ((np.zeros(2), 0.0, np.zeros(2, bool), False, {}), "terminated as an array of shape"),
        ((np.zeros(2), 0.0, False, False, None), "info as None"),
        (
            answer(reward=np.zeros(2)),
            r"the reward an array of shape \(2,\) and type float64 at step 1",
        ),
        (answer(reward=None), "the reward None at step 1"),
        (KeyError("motor"), r"raised KeyError: 'motor' \(test_env_contract\.py, line"),
        # What would end the command as if all were well.
        (SystemExit(0), "raised SystemExit: 0"),
        (GeneratorExit(), "raised GeneratorExit"),
    ],
)
def test_a_wrong_answer_of_step_is_one_sentence(given: Any, words: str) -> None:
    with pytest.raises(EnvFault, match=words):
        act(adapted(given))


def test_numbers_are_truth_values_too() -> None:
    env = adapted((np.zeros(2), 1, np.array([0]), np.bool_(True), {"cost": 0}))
    assert act(env)[1:4] == (1.0, False, True)


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (np.zeros(2), "an array of shape"),  # would be taken for an observation and an info
        ((np.zeros(2), 0.0), "a tuple of 2 values"),
        ((np.zeros(2), {}, {}), "a tuple of 3 values"),
        ([np.zeros(2), {}], "a list"),
    ],
)
def test_a_wrong_answer_of_reset_is_one_sentence(first: Any, words: str) -> None:
    with pytest.raises(EnvFault, match=rf"reset\(\) of .*{words}.*\(observation, info\)"):
        adapted(first=first)


@pytest.mark.parametrize("key", ["final_obs", "final_observation", "terminal_observation"])
def test_an_episode_must_not_end_with_the_first_observation_of_the_next(key: str) -> None:
    last = np.array([0.5, 0.5])
    with pytest.raises(EnvError, match="resets itself within the step"):
        act(adapted(answer({"cost": 0.0, key: last}, ends=(True, False))))
    same = adapted(answer({"cost": 0.0, key: np.zeros(2)}, ends=(False, True)))
    assert act(same)[3]
    assert act(adapted(answer({"cost": 0.0, key: last})))[2:4] == (False, False)


def test_scalars() -> None:
    class Refuses:
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("on another device")

    assert scalar(np.array(1 + 0j)) is None
    assert scalar(Refuses()) is None
    assert scalar(float("inf")) == float("inf")


# --- bounds -----------------------------------------------------------------------------------

PLACEHOLDERS = [
    (-LARGEST, LARGEST),
    (0.0, LARGEST),
    (-1e10, 1e10),
    (-(2.0**31), 2.0**31),
    (-1.0, 2.0**31 - 1.0),
    (-1e38, 0.0),
]


@pytest.mark.parametrize(("low", "high"), PLACEHOLDERS)
def test_bounds_that_cannot_be_meant_are_refused(low: float, high: float) -> None:
    space = spaces.Box(np.array([-1.0, low]), np.array([1.0, high]), dtype=np.float64)
    with pytest.raises(EnvError, match=r"can only stand for .no bounds.*TransformAction"):
        AccidentEnv(Answers(actions=space), COST)
    metadata = {"action_low": [-1.0, low], "action_high": [1.0, high]}
    with pytest.raises(DataError, match=r"can only stand for .no bounds.*bounds that are meant"):
        complete(log(), metadata, horizon=4)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1e9), (-5e8, 5e8), (-1e-9, 1e-9)])
def test_large_and_small_units_are_bounds(low: float, high: float) -> None:
    assert placeholder(low, high) == ""
    space = spaces.Box(low, high, (2,), np.float64)
    env = AccidentEnv(Answers(actions=space), COST)
    np.testing.assert_allclose(env.own_action(np.array([-1.0, 1.0])), [low, high])
    found = complete(log(scale=high), {"action_low": low, "action_high": high}, horizon=4)[0]
    assert np.abs(found["actions"]).max() <= 1.0 + 1e-6


def test_the_remedy_for_bounds_works() -> None:
    env = Answers(actions=spaces.Box(-LARGEST, LARGEST, (1,)))
    meant = TransformAction(env, lambda action: action, spaces.Box(-2.0, 2.0, (1,)))
    adapter = AccidentEnv(meant, COST)
    assert adapter.own_action(np.array([1.0])).tolist() == [2.0]


def log(scale: float = 1.0) -> dict[str, Any]:
    """Two episodes of four steps with actions of two numbers."""
    n = 8
    return {
        "observations": np.arange(2.0 * n).reshape(n, 2).astype(np.float32),
        "actions": scale * np.linspace(0.0, 1.0, 2 * n).reshape(n, 2),
        "rewards": np.zeros(n, np.float32),
        "costs": (np.arange(n) == 3).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.arange(n) % 4 == 3,
    }


def test_a_log_in_a_file_with_placeholder_bounds_is_one_sentence(tmp_path: Path) -> None:
    arrays = complete(log(), {}, horizon=4)[0]
    metadata: Mapping[str, Any] = {"action_low": -LARGEST, "action_high": LARGEST, "horizon": 4}
    write_dataset(tmp_path / "log.hdf5", arrays, dict(metadata))
    with pytest.raises(DataError, match="no bounds"):
        load_dataset(tmp_path / "log.hdf5", discount=0.99, spec=SafetySpec())
