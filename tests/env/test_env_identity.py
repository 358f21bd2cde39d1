"""The identity of an environment: what changes it, what does not, and what is said of it."""

import enum
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import WrapperSpec
from gymnasium.wrappers import RescaleAction

from safe_offrl.env.identity import KEY, environment_identity
from safe_offrl.env.make import make_env
from safe_offrl.record.environment_changes import differences, log_differences
from safe_offrl.spec import SafetySpec
from tests.changing_task import CHANGES, Change, enter, task, write_task


@pytest.fixture
def identity_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """``identity_in(change)`` of the task, written and imported anew."""
    count = 0

    def identity(change: Change | None = None) -> dict[str, Any]:
        nonlocal count
        count += 1
        folder = write_task(tmp_path / f"{count}", "id_", change)
        with monkeypatch.context() as patch:
            enter(folder, "id_", patch)
            return task("id_").identity()

    return identity


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_behind_an_id_changes_the_identity_and_is_named(
    identity_in: Callable[..., dict[str, Any]], name: str
) -> None:
    change = CHANGES[name]
    before, now = identity_in(), identity_in(change)
    assert differences(before, now) == [text.replace("{p}", "id_") for text in change.said]
    assert differences(before, identity_in()) == []  # another folder, the same files


def test_an_identity_by_hand(identity_in: Callable[..., dict[str, Any]]) -> None:
    found = identity_in()
    environment, rule = found["environment"], found["rule"]
    assert set(found) == {"environment", "rule", "horizon"}
    assert found["horizon"] == environment["max_episode_steps"] == 40
    assert environment["id"] == "id_Track-v0"
    assert environment["entry_point"] == "id_cliff:Cliff"
    assert environment["kwargs"] == {"gain": 0.03, "edge": 1.0}
    assert environment["wrappers"] == environment["additional_wrappers"] == []
    assert set(environment["sources"]) == {"id_track", "id_cliff", "id_winds"}
    # printf 'GUST = 0.01\n' | sha256sum
    assert environment["sources"]["id_winds"] == (
        "002e6aa34187876b774da0c0c0b1436014e346441e4a978dad2aaee4f8c7d225"
    )
    assert environment["packages"] == {}  # numpy and gymnasium are no part of it
    assert (rule["accident"], set(rule["sources"])) == ("id_rules:fast", {"id_rules"})
    assert "cost_threshold" not in rule  # which this rule does not look at


def test_a_description_from_another_process_and_for_pictures_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(write_task(tmp_path / "a", "id_"), "id_", monkeypatch)
    plain = task("id_")
    apart = task("id_", timeout=60.0)
    try:
        assert apart.identity() == plain.identity()
    finally:
        apart.close()
    assert task("id_", render_mode="rgb_array").identity() == plain.identity()


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import gymnasium, pathlib
import id_cliff
from safe_offrl.env.make import make_env
from safe_offrl.spec import SafetySpec

class Settings:  # its repr is its address
    def __init__(self, edge): self.edge, self.names = edge, {"c", "a", "b"}

class Odd(id_cliff.Cliff):
    def __init__(self, **given): super().__init__(0.03, 1.0)

gymnasium.register("Odd-v0", entry_point=Odd, max_episode_steps=9, kwargs={
    "settings": Settings(0.5), "names": {"x", "y", "z", "w"}, "rule": max, "any": object(),
    "model": str(pathlib.Path(sys.argv[1], "model.xml")),
    "folder": pathlib.Path(sys.argv[1]).absolute() / "meshes",
})
print(json.dumps(make_env("Odd-v0", SafetySpec()).identity()["environment"]))
"""


def test_the_identity_is_that_of_the_sources_wherever_they_are(tmp_path: Path) -> None:
    """Two processes, hash seeds and folders, and no word of the machine."""
    here = write_task(tmp_path / "first", "id_")
    (here / "model.xml").write_text("<mujoco/>\n")
    (here / "script.py").write_text(SCRIPT)
    there = tmp_path / "another" / "place"
    shutil.copytree(here, there)
    (there / "id_winds.py").write_bytes(b"GUST = 0.01\r\n")  # as Git writes lines on Windows

    def run(folder: Path, cwd: Path, seed: str) -> str:
        return subprocess.run(
            [sys.executable, str(folder / "script.py"), str(folder)],
            cwd=cwd,
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    first, second = run(here, here, "1"), run(there, tmp_path, "2")
    assert first == second
    assert str(tmp_path) not in first
    assert "0x" not in first
    kwargs = json.loads(first)["kwargs"]
    assert kwargs["settings"] == {"__main__.Settings": {"edge": 0.5, "names": ["a", "b", "c"]}}
    assert kwargs["names"] == ["w", "x", "y", "z"]
    assert kwargs["any"] == "builtins.object"
    assert kwargs["rule"] == "builtins.max"
    assert kwargs["folder"] == "meshes"
    assert kwargs["model"]["file"] == "model.xml"
    (there / "model.xml").write_text("<mujoco model='other'/>\n")
    changed = json.loads(run(there, there, "2"))
    assert differences({"environment": json.loads(first)}, {"environment": changed}) != []


class Colour(enum.Enum):
    RED = 1


@dataclass(frozen=True, slots=True)
class Slotted:
    edge: float


class Still(gymnasium.Env[Any, Any]):
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))


class Holding(gymnasium.Wrapper[Any, Any, Any, Any]):
    def __init__(self, env: Any, **given: Any) -> None:
        super().__init__(env)


def registered(*wrappers: WrapperSpec, around: Callable[[Any], Any] = lambda env: env) -> Any:
    """The identity of an environment that is registered with these wrappers."""
    gymnasium.register(
        "Still-v0",
        entry_point=f"{__name__}:Still",
        max_episode_steps=5,
        additional_wrappers=wrappers,
    )
    try:
        env = gymnasium.make("Still-v0", disable_env_checker=True)
        found = environment_identity(around(env), "Still-v0")
    finally:
        del gymnasium.registry["Still-v0"]
    json.dumps(found, allow_nan=False)
    return found


def arguments(**given: Any) -> Any:
    """How these keyword arguments, here of a wrapper, are described."""
    found = registered(WrapperSpec("Holding", f"{__name__}:Holding", given))
    (wrapper,) = found["additional_wrappers"]
    return wrapper["kwargs"]


@pytest.mark.parametrize(
    ("value", "described"),
    [
        (None, None),
        (True, True),
        (1, 1),
        (0.5, 0.5),
        (float("nan"), "nan"),
        (-np.inf, "-inf"),
        (np.float64(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        ("left", "left"),
        (Path("model.xml"), "model.xml"),
        ("/dev/ttyUSB0", "ttyUSB0"),
        ("/dev/zero", "zero"),  # reading it would not end
        (Colour.RED, f"{__name__}.Colour.RED"),
        ((1, {"b": 2}), [1, {"b": 2}]),
        (frozenset({"b", "a"}), ["a", "b"]),
        ({1: 2.0}, {"1": 2.0}),
        (Slotted(0.5), {f"{__name__}.Slotted": {"edge": 0.5}}),
        (Still, f"{__name__}.Still"),
        (functools.partial(round, ndigits=2), {"partial": ["builtins.round", [], {"ndigits": 2}]}),
        (b"ab", "b'ab'"),
        (1 + 2j, "(1+2j)"),
        (threading, "threading"),
    ],
    ids=str,
)
def test_every_kind_of_argument_has_one_description(value: Any, described: Any) -> None:
    assert arguments(value=value) == {"value": described}


def test_arguments_that_cannot_be_copied_are_large_or_hold_themselves() -> None:
    lock = threading.Lock()
    assert arguments(lock=lock) == {"lock": f"{type(lock).__module__}.{type(lock).__qualname__}"}
    ring: list[Any] = [1]
    ring.append(ring)
    assert arguments(ring=ring) == {"ring": [1, "builtins.list"]}
    tree: list[Any] = []
    for _ in range(60):  # 2^60 leaves, if each were looked at
        tree = [tree, tree]
    assert arguments(tree=tree).keys() == {"tree"}
    first, second = np.zeros(1000), np.zeros(1000)
    second[700] = 1e-9
    described = [arguments(table=table)["table"] for table in (first, first.copy(), second)]
    assert described[0] == described[1] != described[2]
    assert len(described[0]["sha256"]) == 64


def test_wrappers_count_by_what_they_were_made_with() -> None:
    def identity(*wrappers: WrapperSpec, by_hand: float | None = None) -> dict[str, Any]:
        def around(env: Any) -> Any:
            if by_hand is None:
                return env
            return RescaleAction(env, np.float32(-by_hand), np.float32(by_hand))

        return {"environment": registered(*wrappers, around=around)}

    def rescaled(most: float) -> WrapperSpec:
        given = {"min_action": np.float32(-most), "max_action": np.float32(most)}
        return WrapperSpec("Rescale", "gymnasium.wrappers:RescaleAction", given)

    assert differences(identity(rescaled(1.0)), identity(rescaled(1.0))) == []
    (said,) = differences(identity(rescaled(1.0)), identity(rescaled(2.0)))
    assert said.startswith("additional wrappers ")
    assert "1.0" in said
    assert "2.0" in said
    # One that is put around by hand, which says what it was made with.
    assert differences(identity(by_hand=1.0), identity(by_hand=1.0)) == []
    (said,) = differences(identity(), identity(by_hand=2.0))
    assert said.startswith("wrappers none -> gymnasium.wrappers.")
    assert differences(identity(by_hand=1.0), identity(by_hand=2.0)) != []
    # The order is part of it.
    both = [rescaled(1.0), rescaled(2.0)]
    assert differences(identity(*both), identity(*reversed(both))) != []


def test_environments_of_packages_are_known_by_their_versions() -> None:
    cart = make_env("CartPole-v1", SafetySpec(accident="terminated")).identity()["environment"]
    assert (cart["sources"], cart["packages"]) == ({}, {"gymnasium": gymnasium.__version__})
    # Ours by their source, whether installed or not, and not by the rest of this package.
    point = make_env("PointHazard-v0", SafetySpec()).identity()["environment"]
    assert set(point["sources"]) == {"safe_offrl.envs.point_hazard"}
    assert point["packages"] == {}


def test_the_threshold_is_part_of_a_rule_that_has_one() -> None:
    def rule(**settings: Any) -> Any:
        return make_env("PointHazard-v0", SafetySpec(**settings)).identity()

    assert differences(rule(), rule(cost_threshold=0.5)) == ["cost threshold 0.0 -> 0.5"]
    assert differences(rule(), rule(accident="terminated")) == ["accident rule cost -> terminated"]
    assert differences(rule(), rule(horizon=50)) == ["horizon 100 -> 50"]
    # What is allowed is no part of what an accident is.
    assert differences(rule(), rule(epsilon=0.3, constraint="cost", delta=1.0)) == []


def test_where_signals_are_found_is_part_of_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(**signals: str) -> Any:
        return make_env("PointHazard-v0", SafetySpec(signals=signals)).identity()

    one = identity(far="cost")
    assert differences(one, one) == []
    assert differences(one, identity(far="other")) == [
        'signals {"far": "cost"} -> {"far": "other"}'
    ]
    own = identity(far="tests.env.test_env_identity:far")
    sources = {**own["signals"]["sources"], "tests.env.test_env_identity": "0"}
    changed = {**own, "signals": {**own["signals"], "sources": sources}}
    assert differences(own, changed) == ["the source of tests.env.test_env_identity"]
    assert log_differences({KEY: own}, changed) == ["the source of tests.env.test_env_identity"]
    # A log that was made without them says nothing of them.
    assert log_differences({KEY: identity()}, one) == []


def far(*step: Any) -> float:
    """A signal."""
    return 0.0


@pytest.mark.parametrize("unknown", [None, 3, "text", [], {}, {"environment": 5, "rule": []}])
def test_what_is_not_known_does_not_differ(unknown: Any) -> None:
    known = make_env("PointHazard-v0", SafetySpec()).identity()
    assert differences(unknown, {**known, "horizon": None}) == []
    assert log_differences({KEY: unknown}, known) == []
    assert log_differences({}, known) == []


def test_phrases_are_short_and_printable() -> None:
    def identity(**kwargs: Any) -> dict[str, Any]:
        return {"environment": {"kwargs": kwargs}, "rule": {}}

    before, now = ("x" * 500 + end + "y" * 500 for end in "ab")
    (said,) = differences(identity(name=before), identity(name=now))
    assert len(said) < 200
    assert "xa" in said
    assert "xb" in said
    (said,) = differences(identity(name="\x1b[2J"), identity(name="a"))
    assert said.isprintable()


def test_a_log_read_under_another_rule_is_not_another_environment() -> None:
    """Which rule holds is decided where the log is read; that a rule's body changed is said."""

    def rule(name: str, source: str) -> dict[str, Any]:
        return {
            "environment": {"id": "A-v0", "sources": {}, "packages": {}},
            "rule": {"accident": name, "sources": {"rules": source}, "packages": {}},
            "horizon": 40,
        }

    logged = {KEY: rule("rules:fast", "1")}
    assert log_differences(logged, rule("cost", "2")) == []
    assert log_differences(logged, rule("rules:fast", "1") | {"horizon": 20}) == []
    assert log_differences(logged, rule("rules:fast", "2")) == ["the source of rules"]
