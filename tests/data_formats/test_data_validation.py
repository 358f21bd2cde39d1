"""One clear error for each way in which a dataset can be wrong (RELIABILITY R10)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.complete import complete
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.data_formats.validation import check_learnable, check_matches_env, validate_arrays
from safe_offrl.errors import DataError
from safe_offrl.spec import SafetySpec


def good_arrays(n: int = 5) -> dict[str, np.ndarray]:
    return {
        "observations": np.zeros((n, 3), np.float32),
        "next_observations": np.zeros((n, 3), np.float32),
        "actions": np.full((n, 2), -1.0, np.float32),
        "rewards": np.zeros(n, np.float32),
        "costs": np.zeros(n, np.float32),
        "terminals": np.arange(n) == n - 1,
        "timeouts": np.zeros(n, bool),
    }


def test_good_arrays_pass_also_as_other_number_types() -> None:
    validate_arrays(good_arrays())
    arrays = good_arrays()
    arrays["terminals"] = arrays["terminals"].astype(np.float64)
    arrays["rewards"] = np.arange(5)
    arrays["actions"] += -0.5e-6  # a rounding error is tolerated
    validate_arrays(arrays)


def changed(name: str, index: Any, value: float, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    arrays = good_arrays()
    arrays[name] = arrays[name].astype(dtype)
    arrays[name][index] = value
    return arrays


FAULTS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "missing": ({k: v for k, v in good_arrays().items() if k != "costs"}, 'no array "costs"'),
    "empty": (good_arrays(0), "empty"),
    "scalar": (good_arrays() | {"observations": np.array(1.0)}, r"expected \[N, size\]"),
    "flat actions": (good_arrays() | {"actions": np.zeros(5)}, r"expected \[N, size\]"),
    "no columns": (good_arrays() | {"actions": np.zeros((5, 0))}, r"expected \[N, size\]"),
    "column rewards": (good_arrays() | {"rewards": np.zeros((5, 1))}, r"expected \[N\]"),
    "unequal": (good_arrays() | {"rewards": np.zeros(4)}, 'has 4 rows, but "observations" has 5'),
    "next shape": (good_arrays() | {"next_observations": np.zeros((5, 4))}, "same shape"),
    "complex": (good_arrays() | {"rewards": np.zeros(5, complex)}, "no real numbers"),
    "text": (good_arrays() | {"rewards": np.array(["a"] * 5)}, "no real numbers"),
    "nan": (changed("observations", (2, 1), np.nan), "first in row 2"),
    "infinite": (changed("rewards", 3, -np.inf), "first in row 3"),
    "beyond float32": (changed("next_observations", (1, 0), 1e39), "too large"),
    "action above": (changed("actions", (0, 0), 1.01), "outside"),
    "action below": (changed("actions", (0, 0), -1.00001), "outside"),
    "float16 infinity": (good_arrays() | {"rewards": np.full(5, np.inf, np.float16)}, "infinite"),
    "smallest integer": (good_arrays() | {"actions": np.full((5, 2), -(2**63))}, "outside"),
    "behaviour scalar": (good_arrays() | {"episode_behaviours": np.array(0)}, "one whole number"),
    "behaviour inf": (good_arrays() | {"episode_behaviours": np.full(5, np.inf)}, "whole number"),
    "flag of two": (changed("timeouts", 1, 2), "other than 0 and 1"),
    "flag nan": (changed("terminals", 1, np.nan), "other than 0 and 1"),
    "accident flag": (good_arrays() | {"accidents": np.full(5, 0.5)}, "other than 0 and 1"),
    "no end": (changed("terminals", 4, 0, bool), "No episode of the dataset ever ends"),
}


@pytest.mark.promise("R10")
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_error(fault: str, tmp_path: Path) -> None:
    arrays, match = FAULTS[fault]
    with pytest.raises(DataError, match=match):
        validate_arrays(arrays)
    with pytest.raises(DataError, match=match):  # and nothing of it reaches the disk
        write_dataset(tmp_path / "log.hdf5", arrays, {})
    assert not list(tmp_path.iterdir())


def load(
    tmp_path: Path, metadata: dict[str, Any], arrays: dict[str, np.ndarray] | None = None
) -> Dataset:
    write_dataset(tmp_path / "log.hdf5", arrays or good_arrays(), metadata)
    return load_dataset(tmp_path / "log.hdf5", discount=0.9, spec=SafetySpec(), horizon=5)


def test_dataset_of_another_environment_is_refused(tmp_path: Path) -> None:
    dataset = load(tmp_path, {"env_id": "mine.envs:Ring-v0"})
    check_matches_env(dataset, "mine.envs:Ring-v0", 3, 2)
    check_matches_env(dataset, "Ring-v0", 3, 2)  # the same id, registered otherwise
    with pytest.raises(DataError, match=r'logged on "mine[.]envs:Ring-v0", not on "Ring-v1"'):
        check_matches_env(dataset, "Ring-v1", 3, 2)
    for sizes in ((4, 2), (3, 1)):
        with pytest.raises(DataError, match="observations of 3 and actions of 2"):
            check_matches_env(dataset, "Ring-v0", *sizes)


def test_foreign_dataset_is_judged_by_its_sizes(tmp_path: Path) -> None:
    dataset = load(tmp_path, {})
    check_matches_env(dataset, "Any-v3", 3, 2)
    with pytest.raises(DataError, match="observations of 3"):
        check_matches_env(dataset, "Any-v3", 2, 2)


def test_another_environment_is_named_with_env(tmp_path: Path) -> None:
    dataset = load(tmp_path, {})
    with pytest.raises(DataError, match=r"or name its environment with --env\.$"):
        check_matches_env(dataset, "Any-v3", 4, 2)
    with pytest.raises(DataError, match=r"or name its environment with --env\.$"):
        check_matches_env(dataset, "Any-v3", 3, 2, discrete=True)


def test_the_kind_of_actions_is_compared_before_their_number(tmp_path: Path) -> None:
    rows = good_arrays() | {"actions": np.tile([1.0, 0.0], (5, 1))}
    discrete = load(tmp_path, {"action_count": 2}, rows)
    check_matches_env(discrete, "Any-v3", 3, 2, discrete=True)
    with pytest.raises(DataError, match=r"discrete, those .* continuous\..*actions as floats"):
        check_matches_env(discrete, "Any-v3", 3, 1)
    with pytest.raises(DataError, match=r"continuous, those .* discrete\..*action_count"):
        check_matches_env(load(tmp_path, {}), "Any-v3", 3, 7, discrete=True)


def test_actions_that_never_occur_are_named_by_their_count(tmp_path: Path) -> None:
    rows = good_arrays() | {"actions": np.tile([1.0, 0.0], (5, 1))}
    dataset = load(tmp_path, {"action_count": 2}, rows)
    with pytest.raises(DataError, match=r'has 2 discrete actions, but "Any-v3" has 3.*count as 3'):
        check_matches_env(dataset, "Any-v3", 3, 3, discrete=True)
    for sizes in ((3, 1), (4, 3)):  # too many, or of another environment altogether
        with pytest.raises(DataError, match="observations of 3 and actions of 2"):
            check_matches_env(dataset, "Any-v3", *sizes, discrete=True)


def test_one_episode_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds a single episode"):
        check_learnable(load(tmp_path, {}), SafetySpec())
    ends = {"timeouts": np.array([0, 1, 0, 0, 0], bool)}
    check_learnable(load(tmp_path, {}, good_arrays() | ends), SafetySpec())


def test_a_constraint_on_cost_takes_no_negative_costs(tmp_path: Path) -> None:
    arrays = good_arrays() | {"timeouts": np.array([0, 1, 0, 0, 0], bool)}
    arrays["costs"] = np.array([1, 0, -0.5, 1, -1], np.float32)
    dataset = load(tmp_path, {}, arrays)
    check_learnable(dataset, SafetySpec())
    with pytest.raises(DataError, match="2 steps a cost below 0, the first in row 2"):
        check_learnable(dataset, SafetySpec(constraint="cost", cost_limit=0.5))
    with pytest.raises(DataError, match="2 steps a cost below 0, the first in row 2"):
        check_learnable(dataset, SafetySpec(limits={"accident": 0.5, "cost": 0.5}))


@pytest.mark.parametrize("name", good_arrays())
def test_an_array_of_too_many_dimensions_is_named_before_any_use(name: str) -> None:
    """Also where episodes are compared with each other, which takes many that are alike in form."""
    arrays = {key: np.concatenate([array] * 8) for key, array in good_arrays().items()}
    arrays["observations"] = np.random.default_rng(0).random(arrays["observations"].shape)
    del arrays["next_observations"]
    if name == "next_observations":
        arrays[name] = np.roll(arrays["observations"], -1, axis=0)
    complete(arrays, {}, horizon=5)
    arrays[name] = arrays[name].reshape(*arrays[name].shape, 1, 1)
    with pytest.raises(DataError, match=f'"{name}" has the shape'):
        complete(arrays, {}, horizon=5)
