"""Named cost signals of an environment: where they are found, and each way to be none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safe_offrl.config import from_dict, load_config, to_dict
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.signals import Signals
from safe_offrl.errors import ConfigError, EnvError, EnvFault
from safe_offrl.spec import SafetySpec
from safe_offrl.train.pretrain_config import PretrainConfig
from tests.env.test_env import Script, step_of


def signals_of(info: dict[str, Any], **signals: str) -> dict[str, float]:
    """What one step of an environment that gives this info costs, by the signals' names."""
    spec = SafetySpec(horizon=9, signals=signals)
    env = AccidentEnv(Script([step_of(info={"cost": 0.0, **info})]), spec, env_id="Two-v0")
    env.reset(seed=0)
    found: dict[str, float] = env.step(np.zeros(1, np.float32))[4]["signals"]
    return found


# --- settings ---------------------------------------------------------------------------------


def test_signals_are_settings_in_the_order_of_their_names() -> None:
    overrides = ["safety.signals.vases=cost_vases", "safety.signals.hazards=constraints.hazards"]
    config = load_config(PretrainConfig, section="pretrain", env_id="", overrides=overrides)
    assert list(config.safety.signals.items()) == [
        ("hazards", "constraints.hazards"),
        ("vases", "cost_vases"),
    ]
    assert from_dict(SafetySpec, to_dict(config.safety)) == config.safety
    assert SafetySpec().signals == {}
    assert len({SafetySpec(), SafetySpec(signals={"a": "b"})}) == 2


@pytest.mark.parametrize("name", ["cost", "accident", "1st", "a-b", "a.b", "", "hazärds", "a b"])
def test_a_name_that_is_taken_or_is_no_word_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"a name is one word of letters.*cost_hazards\.$"):
        SafetySpec(signals={name: "cost_hazards"})


@pytest.mark.parametrize("source", ["", ":", "a:", ":b", "a:b:c", 3, None])
def test_a_source_that_says_nothing_is_refused(source: Any) -> None:
    with pytest.raises(ConfigError, match=r"safety\.signals\.hazards is .* a path"):
        SafetySpec(signals={"hazards": source})


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [2, 2.0, np.float32(2.0), np.int64(2), np.array(2.0), np.array([2]), [2.0]]
)
def test_what_is_one_number_is_a_signal(given: Any) -> None:
    found = signals_of({"cost_hazards": given}, hazards="cost_hazards")
    assert found == {"hazards": 2.0}
    assert type(found["hazards"]) is float
    assert signals_of({"hit": np.bool_(True), "off": False}, a="hit", b="off") == {"a": 1, "b": 0}


def test_a_path_leads_into_dicts_lists_and_arrays() -> None:
    info = {"constraints": {"vases": 3.0, "parts": [{"x": 4.0}]}, "all": np.array([5.0, 6.0])}
    paths = {"a": "constraints.vases", "b": "constraints.parts.0.x", "c": "all.1", "d": "x.y"}
    expected = {"a": 3.0, "b": 4.0, "c": 6.0, "d": 7.0}
    assert signals_of({**info, "x.y": 7.0, "x": {"y": 8.0}}, **paths) == expected


def test_the_cost_may_be_a_signal_too_and_nothing_else_changes() -> None:
    infos = [{"cost": c, "cost_vases": 10.0 * c} for c in (0.0, 0.5, 2.0)]
    plain = AccidentEnv(Script([step_of(info=i) for i in infos]), SafetySpec(horizon=9))
    spec = SafetySpec(horizon=9, signals={"same": "cost", "vases": "cost_vases"})
    named = AccidentEnv(Script([step_of(info=i) for i in infos]), spec)
    for env in (plain, named):
        env.reset(seed=0)
    for info in infos:
        one, other = (env.step(np.zeros(1, np.float32))[4] for env in (plain, named))
        assert other.pop("signals") == {"same": info["cost"], "vases": info["cost_vases"]}
        assert one == other
    assert plain.signals == ()
    assert named.signals == ("same", "vases")
    assert "signals" not in plain.identity()
    assert named.identity()["signals"]["signals"] == spec.signals


@pytest.mark.parametrize(
    ("info", "path", "said"),
    [
        ({}, "cost_hazards", r"cost_hazards of info.*info is a dict with the keys cost at step 1"),
        ({"a": {"b": 1.0}}, "a.c", r"info\['a'\] is a dict with the keys b"),
        ({"a": 1.0}, "a.b", r"info\['a'\] is 1\.0"),
        ({"a": [1.0]}, "a.1", r"info\['a'\] is a list of 1 value"),
        ({"a": np.array(1.0)}, "a.0", r"info\['a'\] is an array of shape \(\)"),
        ({"a": None}, "a", r"is None in .* must be one number"),
        ({"a": "1"}, "a", r"is '1' in"),
        ({"a": {"b": 1.0}}, "a", r"is a dict with the keys b in"),
        ({"a": [1.0, 2.0]}, "a", r"is a list of 2 values in"),
    ],
)
def test_a_signal_that_is_not_there_or_no_number_stops_all(
    info: dict[str, Any], path: str, said: str
) -> None:
    with pytest.raises(EnvError, match=f'(?s)"x".*{said}.*safety.signals.x') as raised:
        signals_of(info, x=path)
    assert not isinstance(raised.value, EnvFault)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, -0.5])
def test_a_signal_that_is_not_finite_or_below_0_is_a_fault(value: float) -> None:
    with pytest.raises(EnvFault, match=r'gave the signal "x" \(a\) as .* finite numbers of 0 or'):
        signals_of({"a": value}, x="a")


def test_a_signal_can_be_a_users_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "signals_of_test.py").write_text(
        "def far(observation, action, next_observation, reward, terminated, truncated, info):\n"
        "    return abs(next_observation[0] - observation[0]) + info['more']\n"
        "def broken(*told):\n"
        "    raise ValueError('no')\n"
        "def words(*told):\n"
        "    return 'far'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    place = np.zeros(2)
    steps = [step_of(place, info={"cost": 0.0, "more": 10.0}) for _ in range(3)]
    spec = SafetySpec(horizon=9, signals={"way": "signals_of_test:far"})
    env = AccidentEnv(Script(steps, first=place), spec, env_id="Two-v0")
    env.reset(seed=0)
    found = []
    for x in (1.0, 1.5, 4.0):  # the environment writes into the observation that it has given
        place[0] = x
        found.append(env.step(np.zeros(1, np.float32))[4]["signals"]["way"])
    assert found == [11.0, 10.5, 12.5]
    identity = env.identity()["signals"]
    assert identity["signals"] == spec.signals
    assert set(identity["sources"]) == {"signals_of_test"}
    with pytest.raises(EnvFault, match=r'signal "signals_of_test:broken" raised ValueError: no'):
        signals_of({}, x="signals_of_test:broken")
    with pytest.raises(EnvError, match="is 'far' in"):
        signals_of({}, x="signals_of_test:words")
    with pytest.raises(EnvError, match=r'has no function "near".*safety\.signals\.x=package'):
        Signals("Two-v0", {"x": "signals_of_test:near"})
    with pytest.raises(EnvError, match="could not be imported"):
        Signals("Two-v0", {"x": "no_such_module:far"})
