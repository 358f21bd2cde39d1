"""Named cost signals in files: every format holds them, and what is wrong with one is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from safe_offrl.data.content import signals_in
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.conversion import convert
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.data_formats.replay_buffer import from_replay_buffer
from safe_offrl.data_formats.stored import dataset_sha256
from safe_offrl.errors import ConfigError, DataError
from safe_offrl.spec import SafetySpec

SIGNALS = {"hazards": "cost_hazards", "vases": "cost_vases"}
SPEC = SafetySpec(signals=SIGNALS)
METADATA: dict[str, Any] = {"horizon": 3, "action_low": -1.0, "action_high": 1.0}
# Two episodes of three steps and one of two, which terminates.
HAZARDS, VASES = [0, 1, 0, 2, 0.1, 0, 0, 3], [0, 0, 0, 0.5, 0.5, 0, 0, 4]


def log(**others: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    n, ends = 8, np.isin(np.arange(8), (2, 5, 7))
    observations = rng.normal(size=(n, 2)).astype(np.float32)
    following = np.roll(observations, -1, axis=0)
    following[ends] = rng.normal(size=(3, 2))
    arrays = {
        "observations": observations,
        "next_observations": following,
        "actions": rng.uniform(-1.0, 1.0, (n, 1)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "costs": np.array([0, 1, 0, 1, 0, 0, 0, 1], np.float32),
        "terminals": np.arange(n) == 7,
        "timeouts": ends & (np.arange(n) < 7),
        "costs_hazards": np.array(HAZARDS, np.float32),
        "costs_vases": np.array(VASES, np.float32),
    }
    return arrays | {key: np.asarray(value) for key, value in others.items()}


def load(path: Path, spec: SafetySpec = SPEC, **options: Any) -> Dataset:
    return load_dataset(path, discount=1.0, spec=spec, horizon=3, **options)


def assert_holds_them(dataset: Dataset) -> None:
    """By hand: the columns, and their sums of the three episodes."""
    assert dataset.layout.signals == ("hazards", "vases")
    assert dataset.column("costs_hazards").tolist() == np.array(HAZARDS, np.float32).tolist()
    assert dataset.column("costs_vases").tolist() == VASES
    signals = dataset.transitions.signals
    assert signals is not None
    assert signals.tolist() == np.array([HAZARDS, VASES], np.float32).T.tolist()
    sums = dataset.signal_costs
    assert sums["hazards"] == pytest.approx([1.0, 2.1, 3.0])
    assert sums["vases"].tolist() == [0.0, 1.0, 4.0]
    # Two steps of the dearest that ended no episode, and the dearest of all.
    assert dataset.worst_signals == {"hazards": 2 + 2 + 3, "vases": 0.5 + 0.5 + 4}
    assert dataset.subset(np.array([2])).signal_costs["hazards"].tolist() == [3.0]


@pytest.mark.parametrize("name", ["log.npz", "log.csv", "log.mmap", "log", "log.hdf5"])
def test_every_format_holds_signals_and_gives_them_on(name: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "first.hdf5", log(), METADATA)
    convert(tmp_path / "first.hdf5", tmp_path / name)
    if name.endswith(".csv"):
        (tmp_path / "log.csv.json").write_text(json.dumps(METADATA))
    convert(tmp_path / name, tmp_path / "last.hdf5")
    first, middle, last = (load(tmp_path / file) for file in ("first.hdf5", name, "last.hdf5"))
    for dataset in (first, middle, last):
        assert_holds_them(dataset)
    assert first.sha256 == last.sha256
    # Standardising leaves costs alone.
    normalised = middle.normalised(middle.normalizer())
    assert torch.equal(normalised.column("costs_vases"), first.column("costs_vases"))
    rows = normalised.layout.unpack(normalised.rows[torch.tensor([7])]).signals
    assert rows is not None
    assert rows.tolist() == [[3.0, 4.0]]


def test_the_names_in_files(tmp_path: Path) -> None:
    for name in ("log.csv", "log.npz", "log.mmap", "log"):
        write_dataset(tmp_path / "log.hdf5", log(), METADATA)
        convert(tmp_path / "log.hdf5", tmp_path / name)
    header = (tmp_path / "log.csv").read_text().splitlines()[0]
    assert header.endswith(",timeouts,costs_hazards,costs_vases")
    with np.load(tmp_path / "log.npz") as archive:
        assert archive["costs_hazards"].dtype == np.float32
    assert (tmp_path / "log.mmap" / "costs_vases.f32").stat().st_size == 8 * 4
    with h5py.File(tmp_path / "log.hdf5") as file:
        assert file["costs_vases"][:].tolist() == VASES
    with h5py.File(tmp_path / "log" / "data" / "main_data.hdf5") as file:
        # Of the reset, then of each step.
        assert file["episode_2/infos/cost_vases"][:].tolist() == [0.0, 0.0, 4.0]


def test_without_signals_a_log_is_what_it_was(tmp_path: Path) -> None:
    plain = {key: array for key, array in log().items() if not signals_in([key])}
    write_dataset(tmp_path / "plain.hdf5", plain, METADATA)
    write_dataset(tmp_path / "named.hdf5", log(), METADATA)
    one, other = (load(tmp_path / name, SafetySpec()) for name in ("plain.hdf5", "named.hdf5"))
    assert isinstance(one.rows, torch.Tensor)
    assert isinstance(other.rows, torch.Tensor)
    assert torch.equal(one.rows, other.rows)
    assert one.transitions.signals is None
    assert (one.signal_costs, one.worst_signals) == ({}, {})
    # The content is what the file holds, used or not.
    assert dataset_sha256(plain, METADATA) == one.sha256 != other.sha256
    assert one.remarks == ()
    assert other.remarks == (
        "the log's signals hazards, vases are not used: name in safety.signals those that are "
        "wanted.",
    )
    assert_holds_them(load(tmp_path / "named.hdf5", SafetySpec(), every_signal=True))
    assert load(tmp_path / "plain.hdf5", SPEC, every_signal=True).layout.signals == ()


@pytest.mark.parametrize("kind", ["hdf5", "mmap", "csv"])
def test_a_signal_that_is_missing_is_refused_with_what_there_is(kind: str, tmp_path: Path) -> None:
    arrays = log()
    del arrays["costs_vases"]
    write_dataset(tmp_path / "log.hdf5", arrays, METADATA)
    path = tmp_path / f"log.{kind}"
    if kind != "hdf5":
        convert(tmp_path / "log.hdf5", path)
    with pytest.raises(
        DataError,
        match=r'no column "costs_vases" for the signal "vases" .* it has .*costs.*costs_hazards\. ',
    ):
        load(path)
    load(path, SafetySpec(signals={"hazards": "anything"}))


def test_a_signal_that_the_log_found_elsewhere_is_named(tmp_path: Path) -> None:
    metadata = {**METADATA, "signals": {"hazards": "constraints.hazards", "vases": "cost_vases"}}
    write_dataset(tmp_path / "log.hdf5", log(), metadata)
    assert load(tmp_path / "log.hdf5").remarks == (
        'the log\'s signal hazards is "constraints.hazards", that of the settings "cost_hazards": '
        "they are taken for the same.",
    )
    assert load(tmp_path / "log.hdf5", SafetySpec(), every_signal=True).remarks == ()
    for nonsense in ({"hazards": "a:b:c"}, {"hazards": 3}, ["hazards"], "hazards"):
        write_dataset(tmp_path / "log.hdf5", log(), {**METADATA, "signals": nonsense})
        assert_holds_them(load(tmp_path / "log.hdf5", SafetySpec(), every_signal=True))


# --- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "csv"])
def test_cost_name_is_read_as_costs_name_and_said(kind: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "log.hdf5", log(), METADATA)
    convert(tmp_path / "log.hdf5", path := tmp_path / f"log.{kind}")
    if kind == "csv":
        path.write_text(path.read_text().replace("costs_", "cost_", 1))
    else:
        with np.load(path) as archive:
            arrays = {key.replace("costs_h", "cost_h"): archive[key] for key in archive.files}
        np.savez(path, **arrays)
    dataset = load(path)
    assert_holds_them(dataset)
    assert '"cost_hazards" is read as "costs_hazards".' in dataset.remarks


def test_names_that_end_in_a_number_are_their_own_in_a_table(tmp_path: Path) -> None:
    arrays = log(costs_room_1=np.ones(8), costs_room_2=2.0 * np.ones(8))
    write_dataset(tmp_path / "log.hdf5", arrays, METADATA)
    convert(tmp_path / "log.hdf5", tmp_path / "log.csv")
    dataset = load(tmp_path / "log.csv", SafetySpec(signals={"room_2": "x", "room_1": "y"}))
    assert {name: sums.tolist() for name, sums in dataset.signal_costs.items()} == {
        "room_1": [3.0, 3.0, 2.0],
        "room_2": [6.0, 6.0, 4.0],
    }


@pytest.mark.parametrize("name", ["costs_1", "costs_", "costs_cost", "costs_accident", "costs_a-b"])
def test_a_name_that_no_signal_can_have_is_another_array(name: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "log.npz", **log(), **{name: np.full(8, -1.0)})  # type: ignore[arg-type]
    dataset = load(tmp_path / "log.npz")
    assert_holds_them(dataset)
    assert f'of the dataset\'s arrays these are not used: "{name}".' in dataset.remarks


def test_a_file_without_costs_is_asked_whether_a_signal_is_meant(tmp_path: Path) -> None:
    arrays = log()
    del arrays["costs"]
    np.savez(tmp_path / "log.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match='no array "costs", but one called "costs_hazards"'):
        load(tmp_path / "log.npz")


# --- values -----------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, str]] = {
    "nan": (np.r_[VASES[:7], np.nan], r'"costs_vases" has 1 values that are not finite .* row 7,'),
    "infinite": (np.r_[np.inf, VASES[1:]], r"1 values that are not finite .* row 0,"),
    "negative": (-np.array(VASES), r"3 values that are not finite or below 0, the first in row 3,"),
    "short": (VASES[:7], r'"costs_vases" has 7 rows, but "observations" has 8'),
    "two": (np.zeros((8, 2)), r'"costs_vases" has the shape \[8, 2\], expected \[N\]'),
    "single": (3.0, r'"costs_vases" is a single number'),
}


@pytest.mark.parametrize("case", BAD)
def test_a_signal_that_is_none_is_refused_by_its_name(case: str, tmp_path: Path) -> None:
    values, said = BAD[case]
    np.savez(tmp_path / "log.npz", **log(costs_vases=values))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=said):
        load(tmp_path / "log.npz")
    if case != "single":
        with pytest.raises(DataError, match="costs_vases"):
            write_dataset(tmp_path / "log.hdf5", log(costs_vases=values), METADATA)


def test_a_map_whose_signal_was_cut_is_damaged(tmp_path: Path) -> None:
    write_dataset(tmp_path / "log.hdf5", log(), METADATA)
    convert(tmp_path / "log.hdf5", tmp_path / "log.mmap")
    file = tmp_path / "log.mmap" / "costs_vases.f32"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match="is damaged"):
        load(tmp_path / "log.mmap")


# --- Minari -----------------------------------------------------------------------------------


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Callable[[h5py.File], None]], Path]:
    """A Minari folder whose file was changed."""

    def change(with_file: Callable[[h5py.File], None]) -> Path:
        write_dataset(tmp_path / "log.hdf5", log(), METADATA)
        convert(tmp_path / "log.hdf5", tmp_path / "log")
        with h5py.File(tmp_path / "log" / "data" / "main_data.hdf5", "r+") as file:
            with_file(file)
        return tmp_path / "log"

    return change


def test_infos_of_words_groups_and_links_are_no_signals(
    changed: Callable[[Callable[[h5py.File], None]], Path],
) -> None:
    def add(file: h5py.File) -> None:
        for group in file.values():
            infos = group["infos"]
            infos["cost_words"] = np.array([b"a"] * len(infos["cost"]))
            infos.create_group("cost_parts")["x"] = np.zeros(len(infos["cost"]))
            infos["cost_elsewhere"] = h5py.ExternalLink("/etc/hosts", "/x")

    dataset = load(changed(add), SafetySpec(), every_signal=True)
    assert_holds_them(dataset)
    (said,) = dataset.remarks
    assert all(f'"infos/cost_{name}"' in said for name in ("words", "parts", "elsewhere"))


def test_a_signal_of_some_episodes_only_is_refused(
    changed: Callable[[Callable[[h5py.File], None]], Path],
) -> None:
    def remove(file: h5py.File) -> None:
        del file["episode_1/infos/cost_vases"]

    with pytest.raises(DataError, match=r"Only some episodes .*costs_vases in their infos"):
        load(changed(remove))


# --- Stable-Baselines3 ------------------------------------------------------------------------


class Buffer:
    """A ReplayBuffer of two environments and four slots, as far as it is looked at."""

    buffer_size, n_envs, pos, full = 4, 2, 4, False
    optimize_memory_usage, handle_timeout_termination = False, True
    action_space = None

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.observations = rng.normal(size=(4, 2, 3)).astype(np.float32)
        self.next_observations = rng.normal(size=(4, 2, 3)).astype(np.float32)
        self.next_observations[:-1] = self.observations[1:]
        self.actions = rng.uniform(-1.0, 1.0, (4, 2, 1)).astype(np.float32)
        self.rewards = np.ones((4, 2), np.float32)
        self.dones = np.zeros((4, 2), np.float32)
        self.dones[-1] = 1.0
        self.timeouts = np.zeros((4, 2), np.float32)
        self.timeouts[-1] = 1.0


def test_a_replay_buffer_takes_signals_in_its_own_slots() -> None:
    costs, vases = np.zeros((4, 2)), np.arange(8.0).reshape(4, 2)
    arrays, _ = from_replay_buffer(Buffer(), costs=costs, signals={"vases": vases}, horizon=4)
    # The first environment's steps, then the second's.
    assert arrays["costs_vases"].tolist() == [0.0, 2.0, 4.0, 6.0, 1.0, 3.0, 5.0, 7.0]
    plain, _ = from_replay_buffer(Buffer(), costs=costs, horizon=4)
    assert set(arrays) - set(plain) == {"costs_vases"}
    with pytest.raises(DataError, match=r"`costs_vases` is \[3, 1\], but the replay buffer"):
        from_replay_buffer(Buffer(), costs=costs, signals={"vases": np.zeros(3)}, horizon=4)
    with pytest.raises(ConfigError, match='has the name "a-b"'):
        from_replay_buffer(Buffer(), costs=costs, signals={"a-b": vases}, horizon=4)
    with pytest.raises(DataError, match="below 0"):
        from_replay_buffer(Buffer(), costs=costs, signals={"vases": -vases}, horizon=4)
