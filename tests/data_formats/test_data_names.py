"""Which array of a file is which, and what is said of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from safe_offrl.data_formats.hdf5 import present_arrays
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.data_formats.names import SYNONYMS, near_name, recognise
from safe_offrl.data_formats.stored import REQUIRED
from safe_offrl.errors import DataError
from safe_offrl.spec import SafetySpec

WHOLE: dict[str, int | None] = dict.fromkeys(REQUIRED, 4)


def without(name: str, **more: int) -> dict[str, int | None]:
    return {key: rows for key, rows in WHOLE.items() if key != name} | more


def test_our_own_names_need_no_word() -> None:
    names, remarks = recognise(WHOLE | {"accidents": 4, "episode_behaviours": 2})
    assert names == {key: key for key in (*WHOLE, "accidents", "episode_behaviours")}
    assert remarks == []


@pytest.mark.parametrize(("theirs", "ours"), SYNONYMS.items())
def test_what_others_call_it_is_read_and_said(theirs: str, ours: str) -> None:
    missing = "terminals" if ours == "dones" else ours
    names, remarks = recognise(without(missing, **{theirs: 4}))
    assert names[ours] == theirs
    assert remarks == [f'"{theirs}" is read as "{ours}".']
    # Where ours is there, the other is not needed, and said to be idle.
    names, remarks = recognise(WHOLE | {theirs: 4})
    if ours != "dones":
        assert theirs not in names.values()
        assert f'"{theirs}"' in remarks[0]


@pytest.mark.parametrize(
    ("ours", "near"),
    [
        ("timeouts", "timeout"),
        ("timeouts", "truncateds"),
        ("timeouts", "TimeLimit.truncated"),
        ("timeouts", "is_truncated"),
        ("timeouts", "TIMEOUTS"),
        ("timeouts", "infos/timeouts"),
        ("costs", "cost_hazards"),
        ("costs", "info_costs"),
        ("rewards", "Rewards"),
        ("terminals", "is_terminal"),
        ("next_observations", "nextObservations"),
        ("next_observations", "observations_next"),
        ("actions", "acts"),
        ("observations", "states"),
    ],
)
def test_a_near_name_of_what_is_missing_is_refused_by_both_names(ours: str, near: str) -> None:
    with pytest.raises(DataError, match=f'no array "{ours}", but one called "{near}"'):
        recognise(without(ours, **{near: 4}))


@pytest.mark.parametrize(
    ("ours", "other"),
    [("timeouts", "time"), ("timeouts", "timestep"), ("costs", "cosine"), ("costs", "kind")],
)
def test_other_names_are_no_near_ones(ours: str, other: str) -> None:
    assert near_name(ours, [other]) is None
    names, remarks = recognise(without(ours, **{other: 4}))
    assert ours not in names
    assert remarks == [f'of the dataset\'s arrays these are not used: "{other}".']


def test_only_rows_are_said_to_be_idle() -> None:
    """An array of another length has no row for each step, so nothing of a step is lost."""
    assert recognise(WHOLE | {"lengths": 2, "qpos": 4})[1] == [
        'of the dataset\'s arrays these are not used: "qpos".'
    ]
    many = WHOLE | {f"x{k}": 4 for k in range(9)}
    assert recognise(many)[1][0].endswith('"x4", "x5" and 3 more.')


def test_arrays_in_groups_are_seen_and_links_are_not_followed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["secret"] = np.zeros(3)
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        file["rewards"] = np.zeros(3)
        file["infos/qpos"] = np.zeros((3, 2))
        file["infos/deep/qvel"] = np.zeros((3, 2))
        file["outside"] = h5py.ExternalLink("other.hdf5", "secret")
        assert present_arrays(file) == {
            "rewards": 3,
            "infos/qpos": 3,
            "infos/deep/qvel": 3,
            "outside": None,
        }


def table(folder: Path, header: str, encoding: str = "utf-8") -> Path:
    rows = ["0,0.5,0.1,1,0,0", "1,1.5,0.2,2,1,0", "0,2.5,0.3,3,0,1"]
    (folder / "log.csv").write_text("\n".join([header, *rows]) + "\n", encoding=encoding)
    return folder / "log.csv"


def test_a_byte_order_mark_hides_no_column(tmp_path: Path) -> None:
    header = "timeouts,observations_0,actions_0,rewards,costs,terminals"
    for encoding in ("utf-8", "utf-8-sig"):
        path = table(tmp_path, header, encoding)
        dataset = load_dataset(path, discount=1.0, spec=SafetySpec(), horizon=9)
        assert dataset.episode_starts.tolist() == [0, 2, 3]
        assert dataset.remarks == ()


def test_another_separator_is_named(tmp_path: Path) -> None:
    path = table(tmp_path, "timeouts;observations_0;actions_0;rewards;costs;terminals")
    with pytest.raises(DataError, match=r"separated by ';'. Separate them by commas"):
        load_dataset(path, discount=1.0, spec=SafetySpec(), horizon=9)


@pytest.mark.parametrize("key", ["horizons", "max_episode_steps"])
def test_a_near_word_of_the_metadata_is_said(tmp_path: Path, key: str) -> None:
    arrays: dict[str, Any] = {
        "observations": np.zeros((4, 1)),
        "actions": np.zeros((4, 1)),
        "rewards": np.arange(4.0),
        "costs": np.zeros(4),
        "terminals": np.zeros(4, bool),
        "timeouts": np.arange(4) % 2 == 1,
    }
    np.savez(tmp_path / "log.npz", metadata=np.array(f'{{"{key}": 2}}'), **arrays)
    dataset = load_dataset(tmp_path / "log.npz", discount=1.0, spec=SafetySpec(), horizon=2)
    assert f'the metadata\'s "{key}" is not read: did you mean "horizon"?' in dataset.remarks
