"""Round trips through every format, and the command that makes them."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from safe_offrl.cli import app
from safe_offrl.commands import convert_dataset
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.conversion import convert
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import FILE_FORMATS, find_dataset, format_of, load_dataset
from safe_offrl.errors import ConfigError, DataError
from safe_offrl.spec import SafetySpec

NAMES = {"hdf5": "log.h5", "npz": "log.npz", "csv": "log.csv", "minari": "log", "mmap": "log.mmap"}
METADATA: dict[str, Any] = {
    "env_id": "PointHazard-v0",
    "accident": "cost",
    "cost_threshold": 0.0,
    "horizon": 4,
    "behaviours": [{"name": "calm"}, {"name": "wild"}],
    "action_low": -1.0,
    "action_high": 1.0,
}
DISCRETE = {k: v for k, v in METADATA.items() if not k.startswith("action_")} | {"action_count": 3}


def make_arrays() -> dict[str, np.ndarray]:
    """Three episodes of 2, 4 and 1 steps, with numbers that need every digit of float32."""
    rng = np.random.default_rng(0)
    observations = rng.normal(0.0, 1e3, (7, 2)).astype(np.float32)
    following = np.concatenate([observations[1:], observations[:1]])
    following[[1, 5, 6]] = rng.normal(size=(3, 2))
    costs = np.array([0, 1, 0, 0.1, 0, 2, 0], np.float32)
    return {
        "observations": observations,
        "next_observations": following,
        "actions": rng.uniform(-1, 1, (7, 3)).astype(np.float32),
        "rewards": np.array([1e-30, -1, 3.1415927, 1e30, 0, 1 / 3, 7], np.float32),
        "costs": costs,
        "terminals": np.array([0, 1, 0, 0, 0, 0, 1], bool),
        "timeouts": np.array([0, 1, 0, 0, 0, 1, 0], bool),
        "accidents": costs > 0,
        "episode_behaviours": np.array([1, 0, 1], np.int32),
        "behaviour_log_probs": np.array([0, -1, 1 / 3, -1e3, 2, 0.1, -7], np.float32),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "log.hdf5", make_arrays(), METADATA)
    return tmp_path / "log.hdf5"


def load(path: Path) -> Dataset:
    return load_dataset(path, discount=0.9, spec=SafetySpec(horizon=4))


def assert_same_transitions(one: Dataset, other: Dataset) -> None:
    for mine, theirs in zip(one.transitions.tensors, other.transitions.tensors, strict=True):
        assert torch.equal(mine, theirs)
    assert np.array_equal(one.episode_starts, other.episode_starts)
    assert np.array_equal(one.truncated, other.truncated)
    known = one.behaviour_log_probs, other.behaviour_log_probs
    if known[0] is None or known[1] is None:
        assert known == (None, None)
    else:
        assert np.array_equal(known[0], known[1])


def test_every_format_has_a_name() -> None:
    assert set(NAMES) == set(FILE_FORMATS)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    result = convert(source, folder / NAMES[name])
    assert (result.source, result.target, result.transitions) == ("hdf5", name, 7)
    assert format_of(find_dataset(folder / NAMES[name])) == name
    there = load(folder / NAMES[name])
    assert there.behaviour_log_probs is not None
    assert_same_transitions(there, load(source))
    convert(folder / NAMES[name], tmp_path / "back.hdf5")
    back = load(tmp_path / "back.hdf5")
    assert_same_transitions(back, load(source))
    if name == "csv":
        assert result.lost == [
            "the metadata (environment, accident rule, horizon, behaviours)",
            "which behaviour logged which episode",
        ]
        assert back.metadata == {}
    else:
        assert result.lost == []
        assert back.sha256 == there.sha256 == load(source).sha256
        assert back.metadata == load(source).metadata


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_every_pair(first: str, second: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, other = tmp_path / "a" / NAMES[first], tmp_path / "b" / NAMES[second]
    convert(source, one)
    convert(one, other)
    assert_same_transitions(load(other), load(source))


def test_a_csv_keeps_a_verdict_only_where_it_cannot_be_derived(
    source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "log.csv")
    strict = load_dataset(
        tmp_path / "log.csv", discount=0.9, spec=SafetySpec(cost_threshold=1.0), horizon=4
    )
    assert strict.column("accidents").tolist() == [0, 0, 0, 0, 0, 1, 0]
    write_dataset(source, make_arrays(), METADATA | {"accident": "mine:rule"})
    convert(source, tmp_path / "own.csv")
    assert "accidents" in (tmp_path / "own.csv").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_discrete_actions_stay_discrete(name: str, source: Path, tmp_path: Path) -> None:
    actions = np.eye(3, dtype=np.float32)[[0, 2, 1, 1, 0, 2, 0]]
    write_dataset(source, make_arrays() | {"actions": actions}, DISCRETE)
    (tmp_path / "there").mkdir()
    convert(source, tmp_path / "there" / NAMES[name])
    there = load(tmp_path / "there" / NAMES[name])
    assert there.transitions.actions.tolist() == actions.tolist()
    assert there.discrete
    if name == "minari":
        path = tmp_path / "there" / "log" / "data"
        space = json.loads(json.loads((path / "metadata.json").read_bytes())["action_space"])
        assert (space["type"], space["n"]) == ("Discrete", 3)
        with h5py.File(path / "main_data.hdf5") as file:
            assert file["episode_0/actions"][()].tolist() == [0, 2]


def test_minari_says_which_next_observations_it_cannot_hold(source: Path, tmp_path: Path) -> None:
    arrays = make_arrays()
    arrays["next_observations"][2:4] += 1.0
    write_dataset(source, arrays, METADATA)
    result = convert(source, tmp_path / "log")
    assert result.lost == ["the next observation of 2 steps, which is not the following row's"]


def test_a_foreign_file_is_completed_as_it_is_converted(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d4rl.hdf5", "w") as file:
        file["observations"] = np.arange(4.0)[:, None]
        file["actions"] = np.array([0, 2, 1, 0])
        file["rewards"] = np.ones((4, 1))
        file["terminals"] = np.zeros(4)
    with pytest.raises(DataError, match=r"safety\.horizon"):
        convert(tmp_path / "d4rl.hdf5", tmp_path / "log.npz")
    convert(tmp_path / "d4rl.hdf5", tmp_path / "log.npz", horizon=2)
    # What was given is now in the file.
    spec = SafetySpec(accident="terminated")
    dataset = load_dataset(tmp_path / "log.npz", discount=0.9, spec=spec)
    assert dataset.horizon == 2
    assert dataset.episode_starts.tolist() == [0, 2, 4]
    assert dataset.metadata["action_count"] == 3
    assert dataset.metadata["no_costs"]


def test_a_dsrl_file_that_needs_completing_also_becomes_a_map(tmp_path: Path) -> None:
    arrays: dict[str, Any] = make_arrays() | {"actions": np.array([0, 1, 1, 0, 2, 0, 1])}
    arrays["rewards"] = arrays["rewards"][:, None]
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        for key in ("observations", "next_observations", "actions", "rewards", "costs"):
            file[key] = arrays[key]
        file["terminals"], file["timeouts"] = arrays["terminals"], arrays["timeouts"]
    convert(tmp_path / "log.hdf5", tmp_path / "log.mmap", horizon=4)
    assert_same_transitions(load(tmp_path / "log.mmap"), load(tmp_path / "log.hdf5"))
    assert load(tmp_path / "log.mmap").layout.action_size == 3


def test_nothing_is_overwritten_and_names_must_say_the_format(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exists already"):
        convert(source, source)
    with pytest.raises(DataError, match="which format"):
        convert(source, tmp_path / "log.parquet")
    with pytest.raises(DataError, match="There is no dataset"):
        convert(tmp_path / "nothing.hdf5", tmp_path / "log.npz")
    with pytest.raises(ConfigError, match="means nothing here"):
        convert_dataset(source, tmp_path / "log.npz", overrides=["steps=5"])


def test_damage_met_while_streaming_is_a_sentence(source: Path, tmp_path: Path) -> None:
    with h5py.File(source, "r") as file:
        offset = file["rewards"].id.get_offset()
    with h5py.File(source, "a") as file:
        values = file["rewards"][()]
        del file["rewards"]
        file.create_dataset("rewards", data=values, chunks=(7,), fletcher32=True)
        offset = file["rewards"].id.get_chunk_info(0).byte_offset
    content = bytearray(source.read_bytes())
    content[offset] ^= 1
    source.write_bytes(bytes(content))
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        convert(source, tmp_path / "log.mmap")
    assert not (tmp_path / "log.mmap").exists()


def test_the_command_says_what_is_lost(source: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "log.csv")])
    assert result.exit_code == 0
    assert "converted   7 transitions, hdf5 to csv" in result.output
    assert "lost        the metadata" in result.output
    arguments = ["convert", str(source), str(tmp_path / "log.mmap"), "--json", "safety.horizon=9"]
    result = CliRunner().invoke(app, arguments)
    assert json.loads(result.stdout)["lost"] == []
    assert load_dataset(tmp_path / "log.mmap", discount=0.9, spec=SafetySpec()).horizon == 9


def test_long_conversions_show_their_progress(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safe_offrl.commands.convert.LONG_TRANSITIONS", 1)
    monkeypatch.setattr("safe_offrl.data.content.CHUNK_ROWS", 2)
    said: list[str] = []
    convert_dataset(source, tmp_path / "log.mmap", say=said.append)
    assert [line.split()[0] for line in said] == [
        "2/7", "4/7", "6/7", "7/7", "warning", "converted", "dataset"
    ]  # fmt: skip
