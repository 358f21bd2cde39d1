"""Fourteen kinds of bad dataset in every format that can hold them: a sentence before training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest

from safe_offrl import commands
from safe_offrl.data_formats.conversion import convert
from safe_offrl.env.make import make_env
from safe_offrl.errors import DataError
from safe_offrl.spec import SafetySpec
from tests.promises import Record

ENV = "HazardLine-v0"
Arrays = dict[str, Any]


def good() -> Arrays:
    """Two episodes of three steps that fit the environment; the second has an accident."""
    with make_env(ENV, SafetySpec()) as env:
        observations = np.zeros((6, env.observation_size), np.float32)
        actions = np.zeros((6, env.action_size), np.float32)
    return {
        "observations": observations,
        "next_observations": observations.copy(),
        "actions": actions,
        "rewards": np.ones(6, np.float32),
        "costs": np.array([0, 0, 0, 0, 0, 1], np.float32),
        "terminals": np.array([0, 0, 0, 0, 0, 1], bool),
        "timeouts": np.array([0, 0, 1, 0, 0, 0], bool),
    }


METADATA = {"env_id": ENV, "accident": "cost", "cost_threshold": 0.0, "horizon": 20}


def put(name: str, index: Any, value: Any, kind: Any = np.float32) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        arrays[name] = arrays[name].astype(kind)
        arrays[name][index] = value
        return arrays

    return change


def replace(**changed: Any) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {k: v for k, v in (arrays | changed).items() if v is not None}


# What is wrong, how it is made from good arrays, and a word of each sentence.
KINDS: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "shape": (replace(rewards=np.zeros((6, 2), np.float32)), "shape|same number"),
    "type": (replace(rewards=np.zeros(6, np.complex64)), "real numbers|not numbers"),
    "NaN": (put("observations", (2, 0), np.nan), "NaN"),
    "infinity": (put("rewards", 3, -np.inf), "infinite"),
    "action outside": (put("actions", (0, 0), 1.5), "outside"),
    "empty": (lambda arrays: {k: v[:0] for k, v in arrays.items()}, "empty"),
    "unequal lengths": (replace(rewards=np.zeros(5, np.float32)), "rows|same number|has 2 steps"),
    "no end": (
        lambda a: a | {"terminals": np.zeros(6, bool), "timeouts": np.zeros(6, bool)},
        "ever ends",
    ),
    "wrong environment": (
        replace(observations=np.zeros((6, 9)), next_observations=np.zeros((6, 9))),
        "observations of 9",
    ),
    "no accident": (put("costs", slice(None), 0.0), "no accident"),
    "nothing but accidents": (put("costs", slice(None), 1.0), "nothing but accidents"),
    "duplicate keys": (lambda arrays: arrays, "distinct keys|named once"),
    "missing array": (replace(rewards=None), "no array"),
    "flag": (put("timeouts", 1, 2.0), "other than 0 and 1"),
}
# A text table has one column of text for each number, and Minari's groups end their own episode.
NOT_IN = {("csv", "shape"), ("csv", "type"), ("csv", "unequal lengths"), ("minari", "no end")}
FORMATS = ("hdf5", "npz", "csv", "minari", "mmap")
CASES = [(form, kind) for form in FORMATS for kind in KINDS if (form, kind) not in NOT_IN]


def text_of(kind: str) -> str:
    """The metadata as a file holds them."""
    text = json.dumps(METADATA)
    return text[:-1] + ', "horizon": 11}' if kind == "duplicate keys" else text


def write_hdf5(folder: Path, arrays: Arrays, kind: str) -> Path:
    with h5py.File(folder / "log.hdf5", "w") as file:
        for key, value in arrays.items():
            file[key] = value
        file.attrs["safe_offrl"] = text_of(kind)
    return folder / "log.hdf5"


def write_npz(folder: Path, arrays: Arrays, kind: str) -> Path:
    np.savez(folder / "log.npz", metadata=np.array(text_of(kind)), **arrays)
    return folder / "log.npz"


def write_csv(folder: Path, arrays: Arrays, kind: str) -> Path:
    columns = {
        f"{key}_{k}" if value.ndim == 2 else key: column
        for key, value in arrays.items()
        for k, column in enumerate(value.T if value.ndim == 2 else [value])
    }
    names, rows = list(columns), np.stack(list(columns.values()), axis=1)
    if kind == "duplicate keys":
        names = [name.replace("costs", "rewards") for name in names]
    lines = [names, *([f"{x:g}" for x in row] for row in rows.astype(float))]
    (folder / "log.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    return folder / "log.csv"


def write_minari(folder: Path, arrays: Arrays, kind: str) -> Path:
    data = folder / "log" / "data"
    data.mkdir(parents=True)
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for k in range(2 if len(arrays["observations"]) else 0):
            part = {key: value[3 * k : 3 * k + 3] for key, value in arrays.items()}
            group = file.create_group(f"episode_{k}")
            group["observations"] = np.concatenate(
                [part["observations"], part["next_observations"][-1:]]
            )
            group["infos/cost"] = np.concatenate([[0.0], part["costs"]])
            names = {"terminals": "terminations", "timeouts": "truncations"}
            for key in ("actions", "rewards", "terminals", "timeouts"):
                if key in part:
                    group[names.get(key, key)] = part[key]
    (data / "metadata.json").write_text(json.dumps({"safe_offrl": text_of(kind)}))
    return folder / "log"


def write_mmap(folder: Path, arrays: Arrays, kind: str) -> Path:
    """Nobody writes one but `convert`, which refuses what is bad."""
    convert(write_hdf5(folder, arrays, kind), folder / "log.mmap")
    return folder / "log.mmap"


WRITERS = {
    "hdf5": write_hdf5,
    "npz": write_npz,
    "csv": write_csv,
    "minari": write_minari,
    "mmap": write_mmap,
}


def plan(path: Path, env: str = ENV, *overrides: str) -> commands.PretrainPlan:
    """What `pretrain` does before its first gradient step."""
    config = commands.pretrain_config(env=env, dataset=str(path), overrides=overrides)
    return commands.plan_pretrain(config)


@pytest.fixture(scope="module")
def refused(figure: Record) -> Iterator[list[str]]:
    """The cases that were refused; their number is reported."""
    found: list[str] = []
    yield found
    many = f"{len(KINDS)} kinds of bad dataset x {len(FORMATS)} formats"
    figure("R10", f"{many}: {len(found)}/{len(CASES)} refused, {len(NOT_IN)} cannot be written")


@pytest.mark.promise("R10")
@pytest.mark.parametrize(("form", "kind"), CASES)
def test_a_bad_dataset_is_one_sentence_before_training(
    tmp_path: Path, refused: list[str], form: str, kind: str
) -> None:
    change, words = KINDS[kind]
    with pytest.raises(DataError, match=words) as caught:
        plan(WRITERS[form](tmp_path, change(good()), kind))
    assert "\n" not in str(caught.value)
    refused.append(f"{form} {kind}")


@pytest.mark.parametrize("form", FORMATS)
def test_the_good_dataset_passes(tmp_path: Path, form: str) -> None:
    plan(WRITERS[form](tmp_path, good(), ""))


def test_one_episode_and_costs_below_0_are_refused(tmp_path: Path) -> None:
    whole = replace(timeouts=np.zeros(6, bool))(good())
    with pytest.raises(DataError, match="holds a single episode"):
        plan(write_hdf5(tmp_path, whole, ""))
    path = write_hdf5(tmp_path, put("costs", 0, -0.5)(good()), "")
    plan(path)
    with pytest.raises(DataError, match="1 steps a cost below 0"):
        plan(path, ENV, "safety.constraint=cost", "safety.cost_limit=0.5")


class Throttle(gymnasium.Env[Any, Any]):
    """Only its spaces are looked at."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space: gymnasium.Space[Any] = gymnasium.spaces.Box(0.0, 1.0, (2,), np.float32)


class TwoUnits(Throttle):
    action_space = gymnasium.spaces.Box(
        np.array([0.0, -1.0], np.float32), np.array([2.0, 1.0], np.float32)
    )


class Switch(Throttle):
    action_space = gymnasium.spaces.Discrete(2)


for _class in (Throttle, TwoUnits, Switch):
    gymnasium.register(
        f"{_class.__name__}-v0",
        entry_point=f"{__name__}:{_class.__name__}",
        max_episode_steps=3,
    )


def throttle_log(folder: Path, actions: Any, **metadata: Any) -> Path:
    arrays = good() | {"observations": np.zeros((6, 1)), "next_observations": np.zeros((6, 1))}
    with h5py.File(folder / "log.hdf5", "w") as file:
        for key, value in (arrays | {"actions": actions}).items():
            file[key] = value
        file.attrs["safe_offrl"] = json.dumps(metadata)
    return folder / "log.hdf5"


def test_the_header_says_in_which_units_actions_are_taken(tmp_path: Path) -> None:
    log = throttle_log(tmp_path, np.full((6, 2), 0.2))
    (line,) = [x for x in plan(log, "Throttle-v0").header.splitlines() if x.startswith("actions")]
    assert "[-1, 1] is taken as the environment's [0, 1]" in line
    assert "action_low and action_high" in line
    (line,) = [x for x in plan(log, "TwoUnits-v0").header.splitlines() if x.startswith("actions")]
    assert "the environment's bounds of each number" in line
    log = throttle_log(tmp_path, np.full((6, 2), 0.2), action_low=0.0, action_high=1.0)
    assert "\nactions " not in plan(log, "Throttle-v0").header
    log = throttle_log(tmp_path, np.array([0, 1, 0, 1, 0, 1]))
    assert "\nactions " not in plan(log, "Switch-v0").header
    assert "\nactions " not in plan(write_hdf5(tmp_path, good(), "")).header  # its Box is [-1, 1]


def test_the_environments_own_limit_is_not_circumvented_by_a_setting(tmp_path: Path) -> None:
    uncut = replace(timeouts=np.zeros(6, bool))(good())
    log = throttle_log(tmp_path, np.zeros((6, 2)))
    with h5py.File(log, "a") as file:
        file["timeouts"][:] = uncut["timeouts"]
    with pytest.raises(DataError, match="max_episode_steps=6 or more"):
        plan(log, "Throttle-v0")
