"""Each trap of a foreign file, loaded to arrays that were written down by hand."""

import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from safe_offrl.commands.common import stored_dataset
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.complete import complete
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.errors import DataError
from safe_offrl.record.run_config import RunInputs
from safe_offrl.spec import SafetySpec

TERMINATED = SafetySpec(accident="terminated")


def load(path: Path, spec: SafetySpec | None = None, horizon: int | None = 3) -> Dataset:
    return load_dataset(path, discount=1.0, spec=spec or SafetySpec(), horizon=horizon)


def write_hdf5(path: Path, **arrays: Any) -> Path:
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
    return path


def d4rl(path: Path, **changed: Any) -> Path:
    """Six steps: terminated after two, cut after three, and one step whose end is not marked."""
    arrays: dict[str, Any] = {
        "observations": np.array([[0.0], [1], [10], [11], [12], [20]], np.float32),
        "actions": np.zeros((6, 1), np.float32),
        "rewards": np.array([[1.0], [2], [3], [4], [5], [6]], np.float32),  # (N, 1)
        "terminals": np.array([0, 1, 0, 0, 0, 0], bool),
    }
    return write_hdf5(path, **{k: v for k, v in (arrays | changed).items() if v is not None})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.hdf5"


def test_d4rl_without_timeouts_ends_episodes_at_the_horizon(path: Path) -> None:
    dataset = load(d4rl(path), TERMINATED)
    assert dataset.episode_starts.tolist() == [0, 2, 5, 6]
    assert dataset.truncated.tolist() == [False, False, False, False, True, True]
    assert dataset.transitions.rewards.tolist() == [1, 2, 3, 4, 5, 6]
    assert dataset.transitions.costs.tolist() == [0] * 6
    assert dataset.metadata["no_costs"]
    with pytest.raises(DataError, match="cut by a time limit"):
        load(path, TERMINATED, horizon=None)


def test_d4rl_next_observations_do_not_cross_an_episode_and_no_row_is_lost(path: Path) -> None:
    dataset = load(d4rl(path), TERMINATED)
    # Shifting alone would give 10 after 1 and 20 after 12, and drop the last row.
    assert dataset.transitions.next_observations[:, 0].tolist() == [1, 1, 11, 12, 12, 20]
    assert dataset.transitions.accidents.tolist() == [0, 1, 0, 0, 0, 0]
    assert "2 truncated episodes is not known" in dataset.metadata["warning"]


def test_an_accident_on_the_last_step_of_a_truncated_episode_survives(path: Path) -> None:
    dataset = load(d4rl(path, costs=np.array([0, 0, 0, 0, 1, 0.0])))
    assert dataset.transitions.accidents.tolist() == [0, 0, 0, 0, 1, 0]
    assert dataset.episode_accidents.tolist() == [False, True, False]
    assert dataset.truncated[4]
    assert not dataset.transitions.terminated[4]


def test_d4rl_own_timeouts_and_next_observations_are_kept(path: Path) -> None:
    following = np.array([[1.0], [99], [11], [12], [13], [21]], np.float32)
    timeouts = np.array([0, 0, 0, 1, 0, 0], bool)
    dataset = load(d4rl(path, timeouts=timeouts, next_observations=following), TERMINATED)
    assert dataset.transitions.next_observations[:, 0].tolist() == [1, 99, 11, 12, 13, 21]
    assert dataset.episode_starts.tolist() == [0, 2, 4, 6]
    assert "warning" not in dataset.metadata


def test_d4rl_cannot_be_judged_by_a_cost_it_does_not_have(path: Path) -> None:
    with pytest.raises(DataError, match=r"has no costs.*safety\.accident=terminated"):
        load(d4rl(path))


def test_a_dsrl_file_with_every_trap(path: Path) -> None:
    """Rewards (N, 1), float flags, both ends in one row, costs above 1, an unmarked last end."""
    write_hdf5(
        path,
        observations=np.array([[0.0], [1], [10], [11], [20]]),
        next_observations=np.array([[1.0], [2], [11], [12], [21]]),
        actions=np.array([[1.0000001], [-1], [0], [0.5], [0]]),
        rewards=np.array([[1.0], [2], [4], [8], [16]]),
        costs=np.array([[0.0], [3], [0], [2], [0]]),
        terminals=np.array([0.0, 1, 0, 0, 0]),
        timeouts=np.array([0.0, 1, 0, 1, 0]),
    )
    dataset = load_dataset(path, discount=0.5, spec=SafetySpec(), horizon=4)
    batch = dataset.transitions
    assert dataset.episode_starts.tolist() == [0, 2, 4, 5]
    assert batch.terminated.tolist() == [0, 1, 0, 0, 0]
    assert dataset.truncated.tolist() == [False, False, False, True, True]
    assert batch.accidents.tolist() == [0, 1, 0, 1, 0]  # the second on a timeout row
    assert batch.costs.tolist() == [0, 3, 0, 2, 0]
    assert dataset.cost_max == 3.0
    assert batch.actions[:, 0].tolist() == [1, -1, 0, 0.5, 0]
    assert batch.return_to_go.tolist() == [2, 2, 8, 8, 16]
    assert batch.time_to_go.tolist() == [1, 0.75, 1, 0.75, 1]
    assert batch.next_observations[:, 0].tolist() == [1, 2, 11, 12, 21]


def omnisafe(path: Path, done: list[int], rows: int = 6) -> Path:
    column = np.arange(float(rows))[:, None]
    np.savez(
        path,
        obs=column,
        action=np.zeros((rows, 1)),
        reward=column,
        cost=np.array([0, 1, 0, 0, 0, 1])[:rows],
        next_obs=column + 1,
        done=np.array(done)[:, None],
    )
    return path


def test_omnisafe_done_at_the_horizon_is_a_timeout(tmp_path: Path) -> None:
    dataset = load(omnisafe(tmp_path / "log.npz", [0, 0, 1, 0, 1, 1]))
    # Lengths 3 (the horizon: cut), 2 and 1 (terminated).
    assert dataset.episode_starts.tolist() == [0, 3, 5, 6]
    assert dataset.transitions.terminated.tolist() == [0, 0, 0, 0, 1, 1]
    assert dataset.truncated.tolist() == [False, False, True, False, False, False]
    assert dataset.transitions.accidents.tolist() == [0, 1, 0, 0, 0, 1]
    assert dataset.transitions.rewards.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="cut by a time limit"):
        load(tmp_path / "log.npz", horizon=None)


def test_own_npz_needs_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "log.npz"
    arrays: dict[str, Any] = {"observations": np.array([[0.0], [1]]), "actions": np.ones((2, 1))}
    arrays |= {"rewards": [1, 2], "terminals": [False, True], "costs": [0, 1]}
    np.savez(path, **arrays)
    dataset = load(path)
    assert dataset.transitions.next_observations[:, 0].tolist() == [1, 1]
    assert dataset.transitions.accidents.tolist() == [0, 1]
    assert dataset.metadata == {}


def test_csv_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        "time,observations_1,observations_0,actions_0,rewards,costs,terminals,timeouts\n"
        "7,0.5,0,1,1,0,0,0\n"
        "8,1.5,1,-1,2,1,0,1\n"
        "9,2.5,2,0,3,0,1,0\n"
    )
    batch = load(path).transitions
    assert batch.observations.tolist() == [[0, 0.5], [1, 1.5], [2, 2.5]]
    assert batch.next_observations.tolist() == [[1, 1.5], [1, 1.5], [2, 2.5]]
    assert batch.actions[:, 0].tolist() == [1, -1, 0]
    assert batch.costs.tolist() == [0, 1, 0]
    assert batch.terminated.tolist() == [0, 0, 1]


def test_csv_columns_are_in_numeric_order(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    names = sorted(f"observations_{i}" for i in range(12))  # observations_10 before observations_2
    values = [name.rpartition("_")[2] for name in names]
    head = ",".join([*names, "actions", "rewards", "terminals"])
    rows = [",".join([*values, f"{action},1,1"]) for action in (2, 0)]
    path.write_text("\n".join([head, *rows]) + "\n")
    batch = load(path, TERMINATED).transitions
    assert batch.observations.tolist() == [[float(i) for i in range(12)]] * 2
    assert batch.actions.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_csv_as_pandas_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        ",observations_0,actions_0,rewards,costs,terminals,timeouts,kind\n"
        "0,0.5,1.0,1,False,False,false,a\n"
        "1,1.5,-1.0,2,TRUE,False, True ,b\n"
        "2,2.5,0.0,3,False,True,False,True\n"
    )
    dataset = load(path)
    assert dataset.transitions.costs.tolist() == [0, 1, 0]
    assert dataset.transitions.terminated.tolist() == [0, 0, 1]
    assert dataset.truncated.tolist() == [False, True, False]
    path.write_text(path.read_text().replace("TRUE", "yes"))
    with pytest.raises(DataError, match="cannot be read as CSV"):
        load(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,b\n1,2\n", "names none of our columns"),
        ("observations_0,observations_2\n1,2\n", "numbered from 0"),
        ("observations_0,observations_0\n1,2\n", "numbered from 0"),
        ("observations_0,actions_0,rewards,terminals\n1,x,1,1\n", "cannot be read as CSV"),
        ("observations_0,actions_0,rewards,terminals\n1,2\n", "Line 2 of .* has 2 cells"),
        ("observations_0,actions,rewards,terminals\n1,0.5,1,1\n", "no index of a discrete"),
        ("observations_0,actions_0,rewards,terminals\n", "empty"),
        ("observations_0,actions_0,rewards\n1,1,1\n", 'no array "terminals"'),
    ],
)
def test_csv_that_cannot_be_used(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=match):
        load(path)


def test_integer_actions_become_one_hot(path: Path) -> None:
    index = np.array([0, 1, 0, 2, 1, 0])
    rows = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
    dataset = load(d4rl(path, actions=index), TERMINATED)
    assert dataset.transitions.actions.tolist() == rows
    assert dataset.metadata["action_count"] == 3
    d4rl(path, actions=index[:, None])  # (N, 1)
    with h5py.File(path, "a") as file:
        file.attrs["safe_offrl"] = json.dumps({"action_count": 4})
    assert load(path, TERMINATED).transitions.actions.tolist() == [[*row, 0] for row in rows]
    with h5py.File(path, "a") as file:
        file.attrs["safe_offrl"] = json.dumps({"action_count": 2})
    with pytest.raises(DataError, match="integers 0 to 2"):
        load(path, TERMINATED)
    with pytest.raises(DataError, match=r"integers -1 to 2.*continuous actions as floats"):
        load(d4rl(path, actions=index - (index == 0)), TERMINATED)
    with h5py.File(path, "a") as file:
        file.attrs["safe_offrl"] = json.dumps({"action_count": 3})
    with pytest.raises(DataError, match=r"integers -1 to 2.*metadata's action_count is 3"):
        load(path, TERMINATED)


def test_what_is_no_row_for_each_transition_is_named(path: Path) -> None:
    for name in ("observations", "actions", "terminals", "timeouts"):
        with pytest.raises(DataError, match=f'"{name}" is a single number'):
            load(d4rl(path, **{name: np.float32(0)}), TERMINATED)
    with pytest.raises(DataError, match='"timeouts" has 5 rows, but "observations" has 6'):
        load(d4rl(path, timeouts=np.zeros(5)), TERMINATED)


@pytest.mark.parametrize("horizon", [6, 2**31, 2**64])
def test_a_horizon_that_no_step_reaches_ends_no_episode(path: Path, horizon: int) -> None:
    assert load(d4rl(path), TERMINATED, horizon=horizon).episode_starts.tolist() == [0, 2, 6]


@pytest.mark.parametrize("largest", [10_000, 2**31, 2**62])
def test_a_wrong_number_of_an_action_asks_for_no_memory(path: Path, largest: int) -> None:
    with pytest.raises(DataError, match="discrete actions"):
        load(d4rl(path, actions=np.array([0, 1, 0, 2, 1, largest])), TERMINATED)


def test_actions_are_rescaled_where_their_bounds_are_known(path: Path) -> None:
    actions = np.array([[0.0], [5], [10], [2.5], [0], [0]])
    with pytest.raises(DataError, match=r"outside \[-1, 1\].*action_low and action_high"):
        load(d4rl(path, actions=actions), TERMINATED)
    with h5py.File(path, "a") as file:
        file.attrs["safe_offrl"] = json.dumps({"action_low": [0.0], "action_high": 10.0})
    dataset = load(path, TERMINATED)
    assert dataset.transitions.actions[:, 0].tolist() == [-1, 0, 1, -0.5, -1, -1]
    assert dataset.metadata["action_low"] == -1.0  # what the arrays now are
    for wrong in ([0.0, 1.0], "x", None, float("inf"), float("nan"), -1.7e308, 20.0):
        noted = {"action_low": wrong, "action_high": 1.7e308 if wrong == -1.7e308 else 10.0}
        with pytest.raises(DataError, match="no bounds"):
            complete(
                dict.fromkeys(("observations", "actions", "rewards", "terminals"), actions), noted
            )
    with h5py.File(path, "a") as file:
        file.attrs["safe_offrl"] = json.dumps({"action_high": 10.0})
    with pytest.raises(DataError, match="have action_high alone"):
        load(path, TERMINATED)


@pytest.mark.parametrize("wrong", [np.inf, np.nan, 1e40, 1.7e308])
def test_actions_that_cannot_be_rescaled_are_refused(path: Path, wrong: float) -> None:
    d4rl(path, actions=np.array([[0.0], [wrong], [10], [2.5], [0], [0]]))
    with h5py.File(path, "a") as file:
        file.attrs["safe_offrl"] = json.dumps({"action_low": [0.0], "action_high": 10.0})
    with pytest.raises(DataError, match='"actions" has 1 values that are NaN, infinite or too'):
        load(path, TERMINATED)


@pytest.mark.parametrize("wrong", ["inf", "-inf", "nan", "1e300", "0.5"])
def test_a_discrete_action_that_is_no_index_is_refused(tmp_path: Path, wrong: str) -> None:
    row = "0.0,{},0.0,0.0,0.0,0.0\n"
    names = "observations_0,actions,rewards,costs,terminals,timeouts\n"
    (tmp_path / "log.csv").write_text(names + row.format(1) + row.format(wrong))
    with pytest.raises(DataError, match="no index of a discrete action"):
        load(tmp_path / "log.csv", TERMINATED)


def test_densities_of_rescaled_actions_are_those_of_what_is_stored(path: Path) -> None:
    """Uniform on [0, 10] has the density 1/10, and on [-1, 1] 1/2: a factor of (10 - 0) / 2."""
    actions = np.array([[0.0], [5], [10], [2.5], [0], [0]])
    d4rl(path, actions=actions, behaviour_log_probs=np.full(6, np.log(0.1)))
    with h5py.File(path, "a") as file:
        file.attrs["safe_offrl"] = json.dumps({"action_low": [0.0], "action_high": 10.0})
    dataset = load(path, TERMINATED)
    assert dataset.behaviour_log_probs == pytest.approx(np.full(6, np.log(0.5)), abs=1e-6)
    part = dataset.subset(np.array([2, 0])).behaviour_log_probs
    assert part is not None
    assert len(part) == 3
    assert load(d4rl(path, actions=actions / 10), TERMINATED).behaviour_log_probs is None
    with pytest.raises(DataError, match="behaviour_log_probs"):
        load(d4rl(path, behaviour_log_probs=np.full(6, np.nan)), TERMINATED)


def test_what_is_complete_already_is_left_alone() -> None:
    n = 3
    arrays: dict[str, np.ndarray] = {
        "observations": np.zeros((n, 2)),
        "next_observations": np.zeros((n, 2)),
        "actions": np.zeros((n, 1)),
        "rewards": np.zeros(n),
        "costs": np.zeros(n),
        "terminals": np.array([0, 0, 1]),
        "timeouts": np.zeros(n),
    }
    found, metadata, remarks, _ = complete(arrays, {"action_low": -1, "action_high": 1})
    assert all(found[key] is arrays[key] for key in arrays)
    assert metadata == {"action_low": -1, "action_high": 1}
    assert remarks == ()


def test_npz_bombs_lies_and_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.npz"

    def write(header: bytes, body: bytes = b"") -> None:
        magic = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("observations.npy", magic + body)

    # 8 TB declared, nothing stored; then 24 bytes more than are stored.
    for shape in (b"(1000000000000,)", b"(6,)"):
        write(b"{'descr': '<f8', 'fortran_order': False, 'shape': " + shape + b"}", b"\0" * 24)
        with pytest.raises(DataError, match="declares"):
            load(path)
    np.savez(path, observations=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="refused for safety"):
        load(path)
    np.savez(path, observations=np.array(["text"]))
    with pytest.raises(DataError, match="refused for safety"):
        load(path)
    np.savez(path, metadata=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="refused for safety"):
        load(path)
    path.write_bytes(b"PK no archive")
    with pytest.raises(DataError, match="cannot be read as npz"):
        load(path)


def test_a_compressed_bomb_is_refused_by_its_declared_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.npz"
    np.savez_compressed(path, observations=np.zeros((10**6, 2)))  # 16 MB in 16 kB
    monkeypatch.setattr("safe_offrl.data_formats.stored.MAX_DATASET_BYTES", 10**6)
    with pytest.raises(DataError, match="more than the limit"):
        load(path)


def test_damaged_npz_gives_our_error_or_a_dataset(tmp_path: Path) -> None:
    path = omnisafe(tmp_path / "log.npz", [0, 0, 1, 0, 0, 1])
    intact = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(intact)
        for position in rng.integers(0, len(intact), 4):
            damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged[: rng.integers(len(intact) // 2, len(intact) + 1)]))
        try:
            load(path)
        except DataError:
            continue


def test_a_run_remembers_the_horizon_that_its_dataset_does_not_name(path: Path) -> None:
    d4rl(path, costs=np.zeros(6), timeouts=np.array([0, 0, 0, 0, 1, 1], bool))
    spec = SafetySpec()
    sha256 = load(path).sha256
    inputs = RunInputs("Any-v0", str(path), sha256, horizon=3)
    assert stored_dataset(inputs, spec, 0.9).horizon == 3
    assert stored_dataset(inputs, SafetySpec(horizon=4), 0.9).horizon == 4
    with pytest.raises(DataError, match=r"safety\.horizon"):
        stored_dataset(RunInputs("Any-v0", str(path), sha256), spec, 0.9)
