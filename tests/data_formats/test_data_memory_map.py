"""A memory map behaves like the dataset in memory, to the bit, and reads no more than it must."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safe_offrl.data.dataset import Dataset
from safe_offrl.data.experience import Experience
from safe_offrl.data.sampling import Reach, uniform_batches
from safe_offrl.data_formats import memory_map
from safe_offrl.data_formats.conversion import convert, file_sha256
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.data_formats.memory_map import _header_sha256, verify_memory_map
from safe_offrl.data_formats.stored import dataset_sha256
from safe_offrl.errors import DataError
from safe_offrl.policies.networks import NetworkConfig
from safe_offrl.safety.critic import SafetyCriticConfig
from safe_offrl.spec import SafetySpec
from safe_offrl.train.pretrain import Pretraining
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Batch

HORIZON = 20
RULES = [
    SafetySpec(),
    SafetySpec(accident="terminated"),
    SafetySpec(accident="cost", cost_threshold=0.8),
    SafetySpec(accident="episode_cost", cost_threshold=2.0),
    SafetySpec(signals={"vases": "cost_vases"}),
    SafetySpec(accident="episode_cost", cost_threshold=2.0, signals={"hazards": "x", "vases": "y"}),
]


def random_arrays(episodes: int = 60, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, HORIZON + 1, episodes)
    n, last = int(lengths.sum()), np.cumsum(lengths) - 1
    terminals = np.zeros(n, bool)
    terminals[last[rng.random(episodes) < 0.4]] = True
    timeouts = np.zeros(n, bool)
    timeouts[last] = ~terminals[last]
    observations = rng.normal(3.0, 5.0, (n, 3)).astype(np.float32)
    return {
        "observations": observations,
        "next_observations": np.roll(observations, -1, axis=0),
        "actions": rng.uniform(-1.0 - 5e-7, 1.0 + 5e-7, (n, 2)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "costs": (rng.random(n) * (rng.random(n) < 0.3)).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
        "episode_behaviours": rng.integers(0, 2, episodes).astype(np.int32),
        "costs_hazards": rng.integers(0, 3, n).astype(np.float32),
        "costs_vases": rng.random(n).astype(np.float32),
    }


METADATA: dict[str, Any] = {"horizon": HORIZON, "behaviours": [{"name": "a"}, {"name": "b"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """log.hdf5 and log.mmap with the same content."""
    path = tmp_path_factory.mktemp("maps")
    write_dataset(path / "log.hdf5", random_arrays(), METADATA)
    convert(path / "log.hdf5", path / "log.mmap")
    return path


def both(folder: Path, spec: SafetySpec = RULES[0]) -> tuple[Dataset, Dataset]:
    in_memory, mapped = (
        load_dataset(folder / name, discount=0.97, spec=spec) for name in ("log.hdf5", "log.mmap")
    )
    assert not isinstance(mapped.rows, torch.Tensor)
    return in_memory, mapped


def assert_equal(one: Dataset, other: Dataset) -> None:
    assert one.layout == other.layout
    assert torch.equal(one.layout.pack(one.transitions), other.layout.pack(other.transitions))
    assert np.array_equal(one.episode_starts, other.episode_starts)
    assert np.array_equal(one.truncated, other.truncated)
    for name in one.layout.scalars:
        assert torch.equal(one.column(name), other.column(name)), name
    assert torch.equal(one.initial_observations, other.initial_observations)
    for name in ("episode_accidents", "episode_returns", "episode_costs", "episode_lengths"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert (one.cost_max, one.horizon, one.sha256) == (other.cost_max, other.horizon, other.sha256)
    for name, sums in one.signal_costs.items():
        assert np.array_equal(sums, other.signal_costs[name]), name
    assert one.metadata == other.metadata


@pytest.mark.parametrize("spec", RULES, ids=lambda s: f"{s.accident} {len(s.signals)}")
def test_it_equals_the_dataset_in_memory(spec: SafetySpec, folder: Path) -> None:
    one, other = both(folder, spec)
    assert_equal(one, other)
    episodes = np.array([5, 0, 17, 58])
    assert_equal(one.subset(episodes), other.subset(episodes))
    assert_equal(one.subset(episodes).subset(np.array([2, 1])), other.subset(np.array([17, 0])))
    for mine, theirs in zip(one.split(0.3, 1), other.split(0.3, 1), strict=True):
        assert_equal(mine, theirs)
    assert_equal(one.sample(100, 3), other.sample(100, 3))
    empty = other.subset(np.array([], dtype=np.int64))
    assert len(empty.rows) == len(empty.column("rewards")) == 0


@pytest.mark.parametrize("spec", [RULES[0], *RULES[3:]], ids=lambda s: f"{s.accident} {s.signals}")
def test_it_is_standardised_as_it_is_drawn(
    spec: SafetySpec, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safe_offrl.data.content.CHUNK_ROWS", 37)
    (one, _), (other, _) = (dataset.split(0.2, 0) for dataset in both(folder, spec))
    mine, theirs = one.normalizer(), other.normalizer()
    assert np.array_equal(mine.mean, theirs.mean)
    assert np.array_equal(mine.std, theirs.std)
    assert mine[2:] == theirs[2:]
    one, other = one.normalised(one.normalizer()), other.normalised(other.normalizer())
    assert_equal(one, other)
    drawn = [
        uniform_batches(d.rows, d.layout, 3, 16, torch.Generator().manual_seed(0))[2]
        for d in (one, other)
    ]
    fields = zip(*(batch.tensors for batch in drawn), strict=True)
    assert all(torch.equal(x, y) for x, y in fields)


def test_nothing_but_the_drawn_rows_is_copied(folder: Path) -> None:
    _, mapped = both(folder)
    train, _ = mapped.split(0.2, 0)
    view = train.normalised(train.normalizer())
    tables = mapped.rows._tables  # type: ignore[union-attr]
    for dataset in (train, view):
        assert dataset.rows._tables.data_ptr() == tables.data_ptr()  # type: ignore[union-attr]


def test_pretraining_on_a_map_is_bitwise_that_in_memory(folder: Path) -> None:
    config = PretrainConfig(
        agent="iql",
        steps=12,
        alignment_steps=6,
        batch_size=32,
        log_every=6,
        held_out=0.3,
        networks=NetworkConfig((8,), (8,), 2),
        critic=SafetyCriticConfig(members=2, reference=1, hidden=(8,)),
    )
    runs = [Pretraining(config, dataset) for dataset in both(folder)]
    records = [list(run.run()) for run in runs]
    assert records[0] == records[1]
    states = [run.state_dict() for run in runs]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert repr(runs[0].calibrations()[0]) == repr(runs[1].calibrations()[0])


def test_the_online_phase_draws_the_same_rows(folder: Path) -> None:
    drawn: list[list[Batch]] = []
    for dataset in both(folder):
        data = Experience(dataset, 50, 0.5, reaches=[Reach(3, 0.9)])
        data.buffer.append(torch.zeros(5, dataset.layout.width))
        generator = torch.Generator().manual_seed(0)
        drawn.append(data.batches(2, 8, generator))
        drawn[-1].append(data.stratified_batch(8, 0.25, generator)[0])
        assert data.draw_start_observations(6, generator).shape == (6, 3)
    for one, other in zip(*drawn, strict=True):
        fields = zip(one.tensors, other.tensors, strict=True)
        assert all(torch.equal(x, y) for x, y in fields)


def test_what_a_rule_needs_is_computed_in_whole_episodes_and_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "log.mmap", tmp_path / "log.mmap")
    for file in (tmp_path / "log.mmap").glob("scalars-*"):
        file.unlink()
    monkeypatch.setattr(memory_map, "ROWS_AT_ONCE", 15)  # less than some episodes
    shutil.copy(folder / "log.hdf5", tmp_path / "log.hdf5")
    for spec in RULES:
        assert_equal(*both(tmp_path, spec))
    cached = sorted((tmp_path / "log.mmap").glob("scalars-*"))
    assert len(cached) == len(RULES)
    before = [file.stat().st_mtime_ns for file in cached]
    assert_equal(*both(tmp_path, RULES[3]))
    assert [file.stat().st_mtime_ns for file in cached] == before
    # Another discount is another file; a damaged one is made again.
    path = tmp_path / "log.mmap"
    load_dataset(path, discount=0.5, spec=RULES[0])
    load_dataset(path, discount=0.25, spec=RULES[0])
    assert len(list(path.glob("scalars-*"))) == len(RULES) + 2
    cached[0].write_bytes(b"half")
    for spec in RULES:
        assert_equal(*both(tmp_path, spec))


def test_a_folder_that_cannot_be_written_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "log.mmap", tmp_path / "log.mmap")

    def full(*arguments: Any, **settings: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DataError, match="cannot be written into"):
        load_dataset(tmp_path / "log.mmap", discount=0.123, spec=RULES[0])
    assert not list((tmp_path / "log.mmap").glob("*.tmp"))


def test_a_rule_that_cannot_be_derived_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="cannot be applied to logged data"):
        load_dataset(folder / "log.mmap", discount=0.9, spec=SafetySpec(accident="m:f"))
    with pytest.raises(DataError, match="at most 20 steps"):
        load_dataset(folder / "log.mmap", discount=0.9, spec=RULES[0], horizon=5)


def test_the_header_names_content_and_source(folder: Path) -> None:
    header = json.loads((folder / "log.mmap" / "dataset.json").read_bytes())
    assert header["sha256"] == dataset_sha256(random_arrays(), METADATA)
    assert header["source"]["sha256"] == file_sha256(folder / "log.hdf5")
    assert header["transitions"] == len(random_arrays()["rewards"])
    assert verify_memory_map(folder / "log.mmap") == header["sha256"]


def test_damage_is_found(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "log.mmap"

    def refused(match: str = "is damaged") -> None:
        with pytest.raises(DataError, match=match):
            load_dataset(path, discount=0.97, spec=RULES[0])

    def fresh() -> None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folder / "log.mmap", path)

    for name in ("tables.f32", "rewards.f32", "terminals.u1", "episode_behaviours.i32"):
        fresh()
        with (path / name).open("ab") as file:
            file.write(b"\0")
        refused()
        (path / name).unlink()
        refused()
        (path / name).symlink_to(folder / "log.mmap" / name)  # may point anywhere
        refused()
    for text in ("", "[]", "{}", '{"version": 1}', "[" * 20_000):
        fresh()
        (path / "dataset.json").write_text(text)
        refused()
    fresh()
    header = json.loads((path / "dataset.json").read_bytes())
    (path / "dataset.json").write_text(json.dumps(header | {"observation_size": 1}))
    refused()
    # Whoever changes the header can sign it again, so it is not believed.
    for key, value in {
        "metadata": None,
        "sha256": None,
        "transitions": float(header["transitions"]),
        "action_size": -1,
    }.items():
        fresh()
        forged = {k: v for k, v in {**header, key: value}.items() if v is not None}
        forged["header_sha256"] = _header_sha256(forged)
        (path / "dataset.json").write_text(json.dumps(forged))
        refused()
    # A changed number is found where everything is read, not at each load.
    fresh()
    with (path / "tables.f32").open("rb+") as tables:
        tables.write(np.float32(1.5).tobytes())
    load_dataset(path, discount=0.97, spec=RULES[0])
    with pytest.raises(DataError, match="has the sha256"):
        verify_memory_map(path)
    with pytest.raises(DataError, match="has the sha256"):
        convert(path, tmp_path / "copy.hdf5")


def test_a_failed_conversion_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    arrays = random_arrays()
    arrays["rewards"][-1] = np.nan

    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(DataError, match="NaN"):
        memory_map.write_memory_map(tmp_path / "log.mmap", arrays, {})
    with pytest.raises(KeyboardInterrupt):
        convert(folder / "log.hdf5", tmp_path / "log.mmap", progress=interrupted)
    assert not list(tmp_path.iterdir())


def test_conversion_streams_whatever_the_size(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safe_offrl.data_formats.stored.MAX_DATASET_BYTES", 1000)
    monkeypatch.setattr("safe_offrl.data.content.CHUNK_ROWS", 50)
    with pytest.raises(DataError, match="safe-offrl convert"):
        load_dataset(folder / "log.hdf5", discount=0.97, spec=RULES[0])
    seen: list[int] = []
    convert(
        folder / "log.hdf5", tmp_path / "log.mmap", progress=lambda done, total: seen.append(done)
    )
    n = len(random_arrays()["rewards"])
    assert seen == [*range(50, n, 50), n]
    mapped = load_dataset(tmp_path / "log.mmap", discount=0.97, spec=RULES[0])
    assert mapped.sha256 == dataset_sha256(random_arrays(), METADATA)


def test_all_of_a_huge_map_is_not_copied_by_accident(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, mapped = both(folder)
    monkeypatch.setattr("safe_offrl.data.dataset.MAX_DATASET_BYTES", 1000)
    with pytest.raises(DataError, match="Work on a part"):
        _ = mapped.transitions
    assert mapped.cost_max > 0
    assert dataclasses.replace(mapped).episode_returns.shape == (60,)


def test_discrete_actions_are_one_hot_or_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not one-hot"):
        memory_map.write_memory_map(tmp_path / "log.mmap", random_arrays(), {"action_count": 2})
    assert not list(tmp_path.iterdir())
