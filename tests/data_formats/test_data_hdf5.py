"""The file format: round trip, episodes and derived columns by hand, identity, hostile files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.errors import DataError
from safe_offrl.spec import SafetySpec

SPEC = SafetySpec()
METADATA: dict[str, Any] = {
    "env_id": "PointHazard-v0",
    "accident": "cost",
    "cost_threshold": 0.0,
    "horizon": 4,
    "behaviours": [{"name": "calm"}, {"name": "wild"}],
}


def make_arrays() -> dict[str, np.ndarray]:
    """Three episodes of 2, 3 and 1 steps: accident and termination, time limit, no end marked."""
    n = 6
    observations = np.arange(2.0 * n, dtype=np.float32).reshape(n, 2)
    return {
        "observations": observations,
        "next_observations": observations + 2,
        "actions": np.linspace(-1, 1, n, dtype=np.float32).reshape(n, 1),
        "rewards": np.array([1, 2, 4, 8, 16, 32], dtype=np.float32),
        "costs": np.array([0, 1, 0.5, 0, 0, 0], dtype=np.float32),
        "terminals": np.array([0, 1, 0, 0, 0, 0], dtype=bool),
        "timeouts": np.array([0, 0, 0, 0, 1, 0], dtype=bool),
        "episode_behaviours": np.array([1, 0, 0], dtype=np.int32),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.hdf5"


def test_episodes_and_derived_columns_by_hand(path: Path) -> None:
    write_dataset(path, make_arrays(), METADATA)
    dataset = load_dataset(path, discount=0.5, spec=SPEC)
    batch = dataset.transitions
    assert dataset.episode_starts.tolist() == [0, 2, 5, 6]
    assert dataset.truncated.tolist() == [False, False, False, False, True, True]
    assert batch.terminated.tolist() == [0, 1, 0, 0, 0, 0]
    assert batch.time_to_go.tolist() == [1, 0.75, 1, 0.75, 0.5, 1]
    # G: 1 + .5*2, 2 | 4 + .5*16, 8 + .5*16, 16 | 32
    assert batch.return_to_go.tolist() == [2, 2, 12, 16, 16, 32]
    assert batch.accidents.tolist() == [0, 1, 1, 0, 0, 0]
    assert dataset.episode_accidents.tolist() == [True, True, False]
    assert dataset.horizon == 4
    assert torch.equal(dataset.initial_observations[1], torch.tensor([4.0, 5.0]))
    assert isinstance(dataset.rows, torch.Tensor)
    assert dataset.rows.is_contiguous()
    assert dataset.rows.dtype == torch.float32


def test_round_trip_is_exact(path: Path) -> None:
    arrays = make_arrays()
    write_dataset(path, arrays, METADATA)
    dataset = load_dataset(path, discount=0.9, spec=SPEC)
    batch = dataset.transitions
    for name in ("observations", "next_observations", "actions", "rewards", "costs"):
        assert np.array_equal(getattr(batch, name).numpy(), arrays[name])
    assert dataset.metadata["env_id"] == "PointHazard-v0"
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


def test_behaviours_are_counted_from_the_data(path: Path) -> None:
    write_dataset(path, make_arrays(), METADATA)
    assert load_dataset(path, discount=0.9, spec=SPEC).metadata["behaviours"] == [
        {"name": "calm", "episodes": 2, "accident_episodes": 1},
        {"name": "wild", "episodes": 1, "accident_episodes": 1},
    ]


def test_identity_follows_the_content(path: Path, tmp_path: Path) -> None:
    def identity(arrays: dict[str, np.ndarray], metadata: dict[str, Any], name: str) -> str:
        write_dataset(tmp_path / name, arrays, metadata)
        return load_dataset(tmp_path / name, discount=0.9, spec=SPEC).sha256

    first = identity(make_arrays(), METADATA, "a.hdf5")
    assert identity(make_arrays(), METADATA, "b.hdf5") == first
    assert len(first) == 64
    changed = make_arrays()
    changed["rewards"][3] += 1
    assert identity(changed, METADATA, "c.hdf5") != first
    assert identity(make_arrays(), {**METADATA, "seed": 1}, "d.hdf5") != first
    # Another container (compressed, other order) with the same content is the same dataset.
    with h5py.File(path, "w") as file:
        for key, value in reversed(make_arrays().items()):
            file.create_dataset(key, data=value, compression="gzip")
        file.attrs["safe_offrl"] = json.dumps(METADATA)
    assert load_dataset(path, discount=0.5, spec=SPEC).sha256 == first


def test_accidents_follow_the_rule_of_the_run(path: Path) -> None:
    arrays = make_arrays()
    arrays["accidents"] = np.array([1, 0, 0, 0, 0, 0], dtype=bool)  # what the logger's rule said

    def accidents(metadata: dict[str, Any], **rule: Any) -> list[float]:
        write_dataset(path, arrays, metadata)
        spec = dataclasses.replace(SPEC, **rule)
        dataset = load_dataset(path, discount=0.9, spec=spec, horizon=4)
        result: list[float] = dataset.transitions.accidents.tolist()
        return result

    custom = {**METADATA, "accident": "m:f"}
    behaviours = {"behaviours": METADATA["behaviours"]}
    logged, by_cost = [1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]
    with pytest.raises(DataError, match="accidents are not those of the rule that it names"):
        accidents(METADATA)  # which can be checked
    assert accidents(behaviours) == logged  # a foreign file
    assert accidents(custom, accident="m:f") == logged
    assert accidents(custom) == by_cost  # another rule: derived
    assert accidents(METADATA, cost_threshold=0.5) == [0, 1, 0, 0, 0, 0]
    assert accidents(METADATA, accident="terminated") == [0, 1, 0, 0, 0, 0]
    with pytest.raises(DataError, match="cannot be applied to logged data"):
        accidents(METADATA, accident="other:rule")


def test_foreign_dsrl_file_needs_a_horizon(path: Path) -> None:
    with h5py.File(path, "w") as file:
        for key, value in make_arrays().items():
            if key != "episode_behaviours":
                file.create_dataset(key, data=value.astype(np.float64))
        file.create_dataset("infos", data=np.zeros(3))  # unknown arrays are left alone
    with pytest.raises(DataError, match=r"Set safety\.horizon"):
        load_dataset(path, discount=0.9, spec=SPEC)
    dataset = load_dataset(path, discount=0.9, spec=SPEC, horizon=3)
    assert dataset.horizon == 3
    assert dataset.metadata == {}
    assert load_dataset(path, discount=0.9, spec=SafetySpec(horizon=5)).horizon == 5
    with pytest.raises(DataError, match="Episode 1 of the dataset has 3 steps"):
        load_dataset(path, discount=0.9, spec=SPEC, horizon=2)


def test_termination_wins_over_a_simultaneous_timeout(path: Path) -> None:
    arrays = make_arrays()
    arrays["timeouts"][1] = True
    write_dataset(path, arrays, METADATA)
    dataset = load_dataset(path, discount=0.9, spec=SPEC)
    assert not dataset.truncated[1]
    assert dataset.episodes == 3


def test_writing_is_atomic(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(path, make_arrays(), METADATA)
    before = path.read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="no space"):
        write_dataset(path, make_arrays(), {**METADATA, "seed": 2})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def refused(path: Path, match: str) -> None:
    with pytest.raises(DataError, match=match):
        load_dataset(path, discount=0.9, spec=SPEC, horizon=4)


def test_missing_and_unreadable_files(path: Path, tmp_path: Path) -> None:
    refused(path, "There is no dataset file")
    refused(tmp_path, "There is no dataset file")
    path.write_bytes(b"not hdf5 at all")
    refused(path, "cannot be read as HDF5")
    path.write_bytes(b"")
    refused(path, "cannot be read as HDF5")


@pytest.mark.parametrize("kind", ["external link", "soft link", "virtual", "external storage"])
def test_files_that_reach_outside_themselves_are_refused(
    kind: str, path: Path, tmp_path: Path
) -> None:
    write_dataset(path, make_arrays(), METADATA)
    secret = tmp_path / "secret.hdf5"
    write_dataset(secret, make_arrays(), METADATA)
    (tmp_path / "raw").write_bytes(np.zeros(6, np.float32).tobytes())
    with h5py.File(path, "a") as file:
        del file["rewards"]
        if kind == "external link":
            file["rewards"] = h5py.ExternalLink("secret.hdf5", "rewards")
        elif kind == "soft link":
            file["rewards"] = h5py.SoftLink("/costs")
        elif kind == "virtual":
            layout = h5py.VirtualLayout(shape=(6,), dtype="f4")
            layout[:] = h5py.VirtualSource(str(secret), "rewards", shape=(6,))
            file.create_virtual_dataset("rewards", layout)
        else:
            external = [(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)]
            file.create_dataset("rewards", (6,), "f4", external=external)
    refused(path, "is a link" if "link" in kind else "from another file")


def test_objects_strings_groups_and_huge_arrays_are_refused(path: Path) -> None:
    def replace_rewards(**how: Any) -> None:
        write_dataset(path, make_arrays(), METADATA)
        with h5py.File(path, "a") as file:
            del file["rewards"]
            if how:
                file.create_dataset("rewards", **how)
            else:
                file.create_group("rewards")

    replace_rewards(data=["text"] * 6, dtype=h5py.string_dtype())
    refused(path, "not numbers")
    replace_rewards(shape=(6,), dtype=h5py.ref_dtype)
    refused(path, "not numbers")
    replace_rewards(data=h5py.Empty("f4"))
    refused(path, "not numbers")
    replace_rewards()
    refused(path, "is no array")
    # 8 TB declared, not one chunk of it allocated: must be refused from the shape alone.
    replace_rewards(shape=(10**12,), dtype="f8", chunks=(1024,))
    refused(path, "GiB")


@pytest.mark.parametrize(
    "text", ["not json", "[1]", '{"env_id": "a", "env_id": "b"}', "[" * 20_000, "{", ""]
)
def test_damaged_metadata(text: str, path: Path) -> None:
    write_dataset(path, make_arrays(), METADATA)
    with h5py.File(path, "a") as file:
        file.attrs["safe_offrl"] = text
    refused(path, "not a JSON object")


def test_metadata_of_another_type_is_refused(path: Path) -> None:
    write_dataset(path, make_arrays(), METADATA)
    with h5py.File(path, "a") as file:
        file.attrs["safe_offrl"] = np.arange(3)
    refused(path, "not one text or number")


@pytest.mark.promise("R13")
@pytest.mark.parametrize(
    ("at", "value"),
    [
        (8, 0),  # the heap's own size, which is 4096
        (8, 2**63),
        (24, 0x189),  # of the text: the next object is found in zeros, and has no size
        (24, 2**64 - 8),
        (16, 0),  # the text is taken for space that is left
    ],
)
def test_a_text_of_another_size_does_not_hang_the_process(path: Path, at: int, value: int) -> None:
    write_dataset(path, make_arrays(), METADATA)
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL") + at
    data[heap : heap + 8] = value.to_bytes(8, "little")
    path.write_bytes(data)
    refused(path, "The texts in the dataset .* are not where it says")


@pytest.mark.promise("R13")
@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_the_type_of_the_metadata_does_not_end_the_process(
    path: Path, bit: int
) -> None:
    """A text is a sequence of characters to HDF5, and one bit makes it a sequence of anything."""
    write_dataset(path, make_arrays(), METADATA)
    data = bytearray(path.read_bytes())
    sequence = data.index(b"safe_offrl\0") + 16  # the attribute's type comes after its padded name
    assert data[sequence : sequence + 3] == b"\x19\x01\x01"  # of variable length; text; UTF-8
    data[sequence + 1] ^= 1 << bit
    path.write_bytes(data)
    if bit < 4:
        refused(path, "not one text or number")
    else:  # means nothing
        load_dataset(path, discount=0.9, spec=SPEC, horizon=4)


@pytest.mark.parametrize("index", [[0, 0], [0, 0, 2], [0, 0, -1]])
def test_behaviour_index_must_fit(index: list[int], path: Path) -> None:
    arrays = make_arrays() | {"episode_behaviours": np.array(index)}
    write_dataset(path, arrays, METADATA)
    refused(path, "episode_behaviours")
    write_dataset(path, arrays, {})
    refused(path, "episode_behaviours")


@pytest.mark.parametrize("horizon", [0, -1, "4", 4.5, True, None])
def test_horizon_of_the_file_must_be_a_step_count(horizon: Any, path: Path) -> None:
    write_dataset(path, make_arrays(), {**METADATA, "horizon": horizon})
    with pytest.raises(DataError, match="horizon"):
        load_dataset(path, discount=0.9, spec=SPEC)


def test_damaged_bytes_give_our_error_or_a_dataset(path: Path) -> None:
    write_dataset(path, make_arrays(), METADATA)
    intact = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(intact)
        for position in rng.integers(0, len(intact), 4):
            damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged[: rng.integers(len(intact) // 2, len(intact) + 1)]))
        try:
            load_dataset(path, discount=0.9, spec=SPEC, horizon=4)
        except DataError:
            continue
