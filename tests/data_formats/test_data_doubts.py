"""What a log is doubted for stays with it, and what it says of itself is held against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.conversion import convert
from safe_offrl.data_formats.hdf5 import read_hdf5
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.errors import DataError
from safe_offrl.spec import SafetySpec

Arrays = dict[str, NDArray[Any]]
EPISODES, LENGTH = 40, 15
TERMINATED = SafetySpec(accident="terminated")


def falls(start: float = 0.0, seed: int = 0) -> Arrays:
    """Walks to the right from one place (or from a square) that fall, at random, before LENGTH."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {key: [] for key in ("o", "n", "a", "r", "t", "u")}
    for _ in range(EPISODES):
        place = start * rng.uniform(-1, 1, 2)
        for k in range(LENGTH):
            after = place + np.array([0.2, 0.0]) + 0.02 * rng.standard_normal(2)
            fallen = bool(rng.random() < 0.08)
            values = (place, after, rng.uniform(-1, 1, 1), rng.standard_normal(), fallen)
            for key, value in zip("onart", values, strict=True):
                rows[key].append(value)
            rows["u"].append(k == LENGTH - 1 and not fallen)
            place = after
            if fallen:
                break
    return {
        "observations": np.array(rows["o"], np.float32),
        "next_observations": np.array(rows["n"], np.float32),
        "actions": np.array(rows["a"], np.float32),
        "rewards": np.array(rows["r"], np.float32),
        "costs": np.array(rows["t"], np.float32),
        "terminals": np.array(rows["t"]),
        "timeouts": np.array(rows["u"]),
    }


def write(path: Path, arrays: Arrays, **metadata: Any) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
        file.attrs["safe_offrl"] = json.dumps({"horizon": LENGTH} | metadata)
    return path


def load(path: Path, spec: SafetySpec | None = None, horizon: int | None = None) -> Dataset:
    return load_dataset(path, discount=1.0, spec=spec or SafetySpec(), horizon=horizon)


def test_what_is_unsure_or_was_remarked_stays_so_in_every_format(tmp_path: Path) -> None:
    arrays = falls()
    arrays["terminals"][np.flatnonzero(arrays["terminals"])[::3]] = False
    source = write(tmp_path / "log.hdf5", arrays)
    said = load(source).remarks
    assert "marked neither in terminals nor in timeouts" in said[0]
    with pytest.raises(DataError, match="decides what was an accident"):
        load(source, TERMINATED)
    for name in ("copy.hdf5", "copy.npz", "copy", "copy.mmap"):
        convert(source, tmp_path / name)
        again = load(tmp_path / name)
        assert again.remarks == said
        if name != "copy":  # Minari marks the end of every episode
            assert again.sha256 == load(source).sha256
        assert not {"remarks", "unsure"} & again.metadata.keys()
        with pytest.raises(DataError, match="decides what was an accident"):
            load(tmp_path / name, TERMINATED)
    with pytest.raises(DataError, match="a table could not say so"):
        convert(source, tmp_path / "copy.csv")


def test_a_table_says_of_itself_what_stands_beside_it(tmp_path: Path) -> None:
    convert(write(tmp_path / "log.hdf5", falls()), tmp_path / "log.csv")
    with pytest.raises(DataError, match="horizon is None"):
        load(tmp_path / "log.csv")
    (tmp_path / "log.csv.json").write_text(json.dumps({"horizon": LENGTH, "env_id": "Fall-v0"}))
    dataset = load(tmp_path / "log.csv")
    assert (dataset.horizon, dataset.metadata["env_id"]) == (LENGTH, "Fall-v0")
    (tmp_path / "log.csv.json").write_text("[1]")
    with pytest.raises(DataError, match=r"log\.csv\.json"):
        load(tmp_path / "log.csv")


def test_a_row_of_another_width_is_named(tmp_path: Path) -> None:
    convert(write(tmp_path / "log.hdf5", falls()), tmp_path / "log.csv")
    lines = (tmp_path / "log.csv").read_text().splitlines()
    lines[6] = lines[6].replace(".", ",", 1)  # a decimal comma
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"Line 7 of .* cells, but the first line names 9"):
        load(tmp_path / "log.csv", horizon=LENGTH)


def test_verdicts_are_held_against_the_rule_that_the_file_names(tmp_path: Path) -> None:
    arrays = falls()
    none = np.zeros(len(arrays["rewards"]), bool)
    accidents = int(arrays["terminals"].sum())
    for rule in ("cost", "terminated"):
        spec = SafetySpec(accident=rule)
        said = {"accident": rule, "cost_threshold": 0.0}
        path = write(tmp_path / "log.hdf5", arrays | {"accidents": none}, **said)
        with pytest.raises(DataError, match=f'rule that it names, "{rule}".* in {accidents} steps'):
            load(path, spec)
        path = write(tmp_path / "log.hdf5", arrays | {"accidents": arrays["terminals"]}, **said)
        assert load(path, spec).episode_accidents.sum() == accidents


@pytest.mark.parametrize("name", ["copy.hdf5", "copy.npz", "copy.csv", "copy.mmap", "copy"])
def test_a_cost_at_the_threshold_is_none_however_it_is_stored(tmp_path: Path, name: str) -> None:
    """A tenth in float32 is more than a tenth, and ten times three tenths more than three."""
    arrays = falls()
    arrays["costs"] = np.full(len(arrays["rewards"]), 0.1)
    arrays["costs"][3] = 0.2
    source = write(tmp_path / "log.hdf5", arrays)
    convert(source, tmp_path / name)
    for path in (source, tmp_path / name):
        one = load(path, SafetySpec(cost_threshold=0.1), LENGTH)
        assert one.column("accidents").numpy().nonzero()[0].tolist() == [3]
    arrays["costs"][:] = 0.3
    whole = np.diff(np.flatnonzero(np.append(True, arrays["terminals"] | arrays["timeouts"])))
    source = write(tmp_path / "sum.hdf5", arrays)
    spec = SafetySpec(accident="episode_cost", cost_threshold=0.3 * int(np.median(whole)))
    convert(source, tmp_path / f"sum-{name}")
    expected = int((whole > np.median(whole)).sum())
    for path in (source, tmp_path / f"sum-{name}"):
        assert load(path, spec, LENGTH).episode_accidents.sum() == expected


def test_stray_ends_are_seen_where_all_episodes_begin_at_one_place(tmp_path: Path) -> None:
    arrays = falls()
    del arrays["next_observations"]
    assert not any("ends of" in text for text in load(write(tmp_path / "a.hdf5", arrays)).remarks)
    inner = np.flatnonzero(~(arrays["terminals"] | arrays["timeouts"]))
    arrays["timeouts"][np.random.default_rng(1).choice(inner, 4, replace=False)] = True
    with pytest.raises(DataError, match=r"4 of \d+ ends of episodes .timeouts"):
        load(write(tmp_path / "b.hdf5", arrays))


def test_a_slow_variable_that_goes_on_is_no_doubt(tmp_path: Path) -> None:
    """A battery does not know of episodes."""
    arrays = falls(start=0.0)
    del arrays["next_observations"]
    battery = np.linspace(1.0, 0.2, len(arrays["rewards"]), dtype=np.float32)
    arrays["observations"] = np.column_stack([arrays["observations"], battery])
    dataset = load(write(tmp_path / "log.hdf5", arrays))
    assert dataset.episodes == EPISODES
    assert not any("goes on" in text for text in dataset.remarks)


def test_contexts_that_come_again_are_no_copies_of_rows(tmp_path: Path) -> None:
    """800 users, visited 1000 times, are offered one of two things: some visits are equal."""
    rng = np.random.default_rng(0)
    users, n = rng.standard_normal((800, 3)), 1000
    arrays: Arrays = {
        "observations": users[rng.integers(800, size=n)].astype(np.float32),
        "actions": rng.integers(2, size=n),
        "rewards": (rng.random(n) < 0.5).astype(np.float32),
        "costs": (rng.random(n) < 0.2).astype(np.float32),
        "terminals": np.ones(n, bool),
        "timeouts": np.zeros(n, bool),
    }
    dataset = load(write(tmp_path / "log.hdf5", arrays, action_count=2, horizon=1))
    assert dataset.episodes == n
    assert "are copies of others" in dataset.remarks[0]


@pytest.mark.parametrize("kind", [bool, np.int64, np.float16, np.float64])
def test_numbers_of_actions_may_have_any_type(tmp_path: Path, kind: type) -> None:
    arrays = falls()
    numbers: NDArray[Any] = (arrays["actions"][:, 0] > 0).astype(kind)
    path = write(tmp_path / "log.hdf5", arrays | {"actions": numbers}, action_count=2)
    np.testing.assert_array_equal(load(path).transitions.actions[:, 1], numbers.astype(float))
    # From 1 on, which has to be said.
    path = write(tmp_path / "log.hdf5", arrays | {"actions": numbers.astype(int) + 1})
    with pytest.raises(DataError, match="integers 1 to 2, so that it is not clear"):
        load(path)
    for said, remarked in (({"action_start": 1}, False), ({"action_count": 3}, True)):
        write(path, arrays | {"actions": numbers.astype(int) + 1}, **said)
        dataset = load(path)
        column = 1 if "action_start" in said else 2
        assert dataset.layout.action_size == column + 1
        np.testing.assert_array_equal(dataset.transitions.actions[:, column], numbers.astype(float))
        assert any("no action has the number 0" in text for text in dataset.remarks) == remarked
        assert read_hdf5(path).metadata.items() >= said.items()


def test_whole_numbers_between_bounds_are_continuous(tmp_path: Path) -> None:
    arrays, bounds = falls(), {"action_low": 0, "action_high": 10}
    throttle = np.round(5 + 5 * arrays["actions"][:, 0]).astype(int)
    path = write(tmp_path / "log.hdf5", arrays | {"actions": throttle}, **bounds)
    loaded = load(path).transitions.actions[:, 0]
    np.testing.assert_allclose(loaded, throttle / 5.0 - 1.0, atol=1e-6)
    path = write(tmp_path / "log.hdf5", arrays, **bounds, action_count=3)
    with pytest.raises(DataError, match="action_count, of discrete actions, and action_low"):
        load(path)
