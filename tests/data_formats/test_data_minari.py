"""Minari's layout: costs one entry late, numeric order, spaces, and what may not be in a file."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.conversion import convert
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.errors import DataError
from safe_offrl.spec import SafetySpec

BOX = {"type": "Box", "dtype": "float32", "shape": [1], "low": [-2.0], "high": [2.0]}
DESCRIPTION: dict[str, Any] = {
    "data_format": "hdf5",
    "observation_space": json.dumps(BOX | {"low": [-99.0], "high": [99.0]}),
    "action_space": json.dumps(BOX),
    "env_spec": json.dumps({"id": "Reach-v1", "max_episode_steps": 5}),
}


def episode(file: h5py.File, k: int, steps: int = 2, **changed: Any) -> h5py.Group:
    """Observations 100 k + t, rewards k, the cost of step t is t + 1 (and 50 at the reset)."""
    group = file.create_group(f"episode_{k}")
    arrays: dict[str, Any] = {
        "observations": (100.0 * k + np.arange(steps + 1))[:, None],
        "actions": np.full((steps, 1), 2.0, np.float32),
        "rewards": np.full(steps, float(k)),
        "terminations": np.arange(steps) == steps - 1,
        "truncations": np.zeros(steps, bool),
        "infos/cost": np.array([50.0, *range(1, steps + 1)]),
    }
    for key, value in (arrays | changed).items():
        if value is not None:
            group[key] = value
    return group


def write(path: Path, episodes: Sequence[int] = (0,), /, **changed: Any) -> Path:
    folder = path / "data"
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "main_data.hdf5", "w") as file:
        for k in episodes:
            episode(file, k, **changed)
    (folder / "metadata.json").write_text(json.dumps(DESCRIPTION))
    return path


def load(path: Path | str, spec: SafetySpec | None = None) -> Dataset:
    return load_dataset(path, discount=1.0, spec=spec or SafetySpec())


def test_the_cost_of_a_step_is_the_next_entry(tmp_path: Path) -> None:
    batch = load(write(tmp_path / "log")).transitions
    assert batch.costs.tolist() == [1, 2]  # not 50, 1
    assert batch.observations[:, 0].tolist() == [0, 1]
    assert batch.next_observations[:, 0].tolist() == [1, 2]
    assert batch.terminated.tolist() == [0, 1]


def test_costs_without_an_entry_for_the_reset_are_taken_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "log", (0,), **{"infos/cost": np.array([7.0, 8.0])})
    assert load(path).transitions.costs.tolist() == [7, 8]


def test_episodes_are_in_numeric_order(tmp_path: Path) -> None:
    dataset = load(write(tmp_path / "log", [10, 2, 9, 1, 0, 11]))
    assert dataset.initial_observations[:, 0].tolist() == [0, 100, 200, 900, 1000, 1100]


def test_metadata_come_from_the_description(tmp_path: Path) -> None:
    dataset = load(write(tmp_path / "log"))
    assert dataset.metadata["env_id"] == "Reach-v1"
    assert dataset.horizon == 5
    assert dataset.transitions.actions.tolist() == [[1], [1]]  # 2 of [-2, 2]


def test_an_episode_that_nothing_ended_is_truncated(tmp_path: Path) -> None:
    """A log may have been cut by its collector; the next group is another episode all the same."""
    path = write(tmp_path / "log", [0, 1], terminations=np.zeros(2, bool))
    dataset = load(path)
    assert dataset.episode_starts.tolist() == [0, 2, 4]
    assert dataset.truncated.tolist() == [False, True, False, True]


def test_episodes_of_different_shapes_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "log", [0])
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        episode(file, 1, actions=np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"actions of the episodes of .* differ in shape"):
        load(path)


def test_all_ways_to_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "root" / "Team" / "reach-v0")
    expected = load(path).sha256
    assert load(path / "data").sha256 == expected
    assert load(path / "data" / "main_data.hdf5").sha256 == expected
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    assert load("Team/reach-v0").sha256 == expected
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "home" / ".minari" / "datasets" / "Team" / "reach-v0")
    assert load("Team/reach-v0").sha256 == expected
    with pytest.raises(DataError, match="There is no dataset"):
        load("Team/reach-v1")


def test_dict_observations_are_flattened_in_the_order_of_the_space(tmp_path: Path) -> None:
    path = write(
        tmp_path / "log",
        (0,),
        observations=None,
        **{
            "observations/b": np.array([[1.0], [2], [3]]),
            "observations/a/_index_1": np.array([[10.0, 11], [20, 21], [30, 31]]),
            "observations/a/_index_0": np.array([5.0, 6, 7]),
        },
    )
    inner = {"type": "Tuple", "subspaces": [{"type": "Box"}, {"type": "Box"}]}
    space = {"type": "Dict", "subspaces": {"b": {"type": "Box"}, "a": inner}}
    description = DESCRIPTION | {"observation_space": json.dumps(space)}
    (path / "data" / "metadata.json").write_text(json.dumps(description))
    assert load(path).transitions.observations.tolist() == [[1, 5, 10, 11], [2, 6, 20, 21]]


def test_discrete_actions_begin_where_their_space_does(tmp_path: Path) -> None:
    path = write(tmp_path / "log", actions=np.array([3, 5]))
    space = {"type": "Discrete", "n": 4, "start": 3}
    description = DESCRIPTION | {"action_space": json.dumps(space)}
    (path / "data" / "metadata.json").write_text(json.dumps(description))
    assert load(path).transitions.actions.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("largest", [math.inf, float(np.finfo(np.float32).max), 1e10])
def test_bounds_that_only_stand_for_none_rescale_nothing(tmp_path: Path, largest: float) -> None:
    path = write(tmp_path / "log", actions=np.array([[0.25], [-1.0]], np.float32))
    space = BOX | {"low": [-largest], "high": [largest]}
    description = DESCRIPTION | {"action_space": json.dumps(space)}
    (path / "data" / "metadata.json").write_text(json.dumps(description))
    found = load(path)
    assert "action_high" not in found.metadata
    assert found.transitions.actions.tolist() == [[0.25], [-1.0]]


def test_without_costs_only_other_rules_apply(tmp_path: Path) -> None:
    path = write(tmp_path / "log", [0, 1], **{"infos/cost": None})
    dataset = load(path, SafetySpec(accident="terminated"))
    assert dataset.episode_accidents.tolist() == [True, True]
    with pytest.raises(DataError, match="has no costs"):
        load(path)
    with h5py.File(path / "data" / "main_data.hdf5", "a") as file:
        file["episode_1/infos/cost"] = np.zeros(3)
    with pytest.raises(DataError, match="Only some episodes"):
        load(path, SafetySpec(accident="terminated"))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"rewards": None}, 'no array "rewards"'),
        ({"observations": np.zeros((2, 1))}, "one vector more"),
        ({"observations": np.zeros((3, 32, 32, 3))}, "images"),
        ({"rewards": np.zeros(3)}, "one vector more"),
        ({"terminations": np.zeros(1, bool)}, "same number of steps"),
        ({"infos/cost": np.zeros(5)}, "same number of steps"),
        ({"rewards": "text"}, "not numbers"),
        ({"observations": np.full((3, 1), np.nan)}, "NaN"),
    ],
    ids=str,
)
def test_episodes_that_cannot_be_used(changed: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=match):
        load(write(tmp_path / "log", **changed))


def test_links_and_sizes_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "log")
    file_path = path / "data" / "main_data.hdf5"
    for link in (h5py.SoftLink("/episode_0"), h5py.ExternalLink("other.hdf5", "/")):
        with h5py.File(file_path, "a") as file:
            file["episode_1"] = link
        with pytest.raises(DataError, match="is a link"):
            load(path)
        with h5py.File(file_path, "a") as file:
            del file["episode_1"]
    with h5py.File(file_path, "a") as file:
        del file["episode_0/infos"]
        file["episode_0/infos"] = h5py.ExternalLink("other.hdf5", "/")
    with pytest.raises(DataError, match="is a link"):
        load(path)
    write(path)
    with h5py.File(file_path, "a") as file:
        del file["episode_0/rewards"]
        file["episode_0"].create_dataset("rewards", (10**12,), "f8", chunks=(1024,))
    with pytest.raises(DataError, match="more than the limit"):
        load(path)


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"observation_space": "[1]"}',
        '{"observation_space": 5}',
        '{"observation_space": "{\\"subspaces\\": {\\"a\\": 1}}"}',
        '{"action_space": "{\\"start\\": \\"x\\"}"}',
        '{"env_spec": "x"}',
        '{"safe_offrl": 1}',
    ],
)
def test_damaged_descriptions(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "log")
    (path / "data" / "metadata.json").write_text(text)
    with pytest.raises(DataError):
        load(path)


def test_an_empty_set_and_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        load(write(tmp_path / "log", []))
    (tmp_path / "log" / "data" / "main_data.hdf5").write_bytes(b"text")
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        load(tmp_path / "log")


def test_what_is_written_has_minaris_layout(tmp_path: Path) -> None:
    source = write(tmp_path / "log", [0, 1])
    convert(source, tmp_path / "copy-v3")
    with h5py.File(tmp_path / "copy-v3" / "data" / "main_data.hdf5") as file:
        assert list(file) == ["episode_0", "episode_1"]
        group = file["episode_1"]
        assert dict(group.attrs) == {"id": 1, "total_steps": 2}
        assert group["observations"][()].tolist() == [[100], [101], [102]]
        assert group["infos/cost"][()].tolist() == [0, 1, 2]
        assert group["terminations"][()].tolist() == [False, True]
        assert group["truncations"].dtype == bool
    description = json.loads((tmp_path / "copy-v3" / "data" / "metadata.json").read_bytes())
    assert description["dataset_id"] == "copy-v3"
    assert (description["total_episodes"], description["total_steps"]) == (2, 4)
    assert json.loads(description["action_space"])["high"] == [1.0]
    assert json.loads(description["env_spec"])["id"] == "Reach-v1"


def test_minari_itself_reads_what_is_written(tmp_path: Path) -> None:
    """Only where Minari happens to be installed; the layout by hand is tested above."""
    minari = pytest.importorskip("minari")
    convert(write(tmp_path / "log", [0, 1]), tmp_path / "copy-v3")
    dataset = minari.MinariDataset(tmp_path / "copy-v3" / "data")
    assert (dataset.total_episodes, dataset.total_steps) == (2, 4)
    second = list(dataset.iterate_episodes())[1]
    assert second.infos["cost"].tolist() == [0, 1, 2]
    assert second.rewards.tolist() == [1, 1]
