"""Columns derived at load, by hand: episodes, the rule on an episode's cost, returns, units."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safe_offrl.data import derived, episode_sums
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.errors import DataError
from safe_offrl.spec import SafetySpec
from safe_offrl.types import Layout

# Two episodes of four and two steps.
STARTS = np.array([0, 4, 6])
COSTS = np.array([0, 3, 0, 8, 4, 0], dtype=np.float32)


def write(path: Path, metadata: dict[str, Any], **changed: np.ndarray) -> Path:
    observations = np.arange(6, dtype=np.float32)[:, None]
    arrays = {
        "observations": observations,
        "next_observations": observations + 1,
        "actions": np.zeros((6, 1), np.float32),
        "rewards": np.arange(6, dtype=np.float32),
        "costs": COSTS,
        "terminals": np.zeros(6, bool),
        "timeouts": np.array([0, 0, 0, 1, 0, 1], bool),
    }
    write_dataset(path, arrays | changed, {"horizon": 4} | metadata)
    return path


def test_episode_cost_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "log.hdf5", {})
    spec = SafetySpec(accident="episode_cost", cost_threshold=4.0)
    dataset = load_dataset(path, discount=0.9, spec=spec)
    batch = dataset.transitions
    # Sums after each step: 0 3 3 11 | 4 4. Only 11 exceeds 4.
    assert batch.accidents.tolist() == [0, 0, 0, 1, 0, 0]
    # Before the step 0 0 3 3 | 0 4, after it 0 3 3 11 | 4 4, of 4, at most 2.
    assert batch.observations.tolist() == [[0, 0], [1, 0], [2, 0.75], [3, 0.75], [4, 0], [5, 1]]
    assert batch.next_observations[:, 1].tolist() == [0, 0.75, 0.75, 2, 1, 1]
    assert batch.next_observations[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert dataset.layout == Layout(2, 1)
    assert dataset.initial_observations.tolist() == [[0, 0], [4, 0]]
    # The identity is that of the file, which has no such column.
    assert dataset.sha256 == load_dataset(path, discount=0.9, spec=SafetySpec()).sha256


def test_every_step_after_the_threshold_is_an_accident() -> None:
    spec = SafetySpec(accident="episode_cost", cost_threshold=2.0)
    arrays = {"costs": np.array([0, 3, -3, 0, 1, 0], np.float32)}
    accidents = derived.accidents_under(arrays, STARTS, {}, spec)
    assert accidents.tolist() == [False, True, True, True, False, False]


def test_a_files_own_verdict_counts_under_the_same_episode_cost_alone(tmp_path: Path) -> None:
    logged = np.array([0, 0, 1, 0, 0, 1], bool)
    rule = {"accident": "episode_cost", "cost_threshold": 4.0}
    path = write(tmp_path / "log.hdf5", rule, accidents=logged)

    def accidents(threshold: float) -> list[float]:
        spec = SafetySpec(accident="episode_cost", cost_threshold=threshold)
        loaded: list[float] = (
            load_dataset(path, discount=1.0, spec=spec).column("accidents").tolist()
        )
        return loaded

    with pytest.raises(DataError, match=r"accidents are not those.*episode_cost. above 4\.0"):
        accidents(4.0)
    assert accidents(2.0) == [0, 1, 1, 1, 1, 1]
    exceeded = episode_sums.costs_so_far(COSTS, STARTS) + COSTS > 4.0
    write(tmp_path / "log.hdf5", rule, accidents=exceeded)
    assert accidents(4.0) == exceeded.tolist()


def test_returns_and_sums_stay_within_their_episode() -> None:
    rewards = np.array([1, 2, 4, 8, 16, 32], dtype=np.float32)
    # 8 | 4 + 4 | 2 + 4 | 1 + 3; 32, 16 + 16
    assert episode_sums.returns_to_go(rewards, STARTS, 0.5).tolist() == [4, 6, 8, 8, 32, 32]
    assert episode_sums.costs_so_far(COSTS, STARTS).tolist() == [0, 0, 3, 3, 0, 4]
    assert episode_sums.times_to_go(STARTS, 4).tolist() == [1, 0.75, 0.5, 0.25, 1, 0.75]


def test_lock_step_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 40)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rewards = rng.normal(size=starts[-1]).astype(np.float32)
    expected = np.empty(len(rewards))
    for first, end in itertools.pairwise(starts):
        following = 0.0
        for t in range(end - 1, first - 1, -1):
            following = float(rewards[t]) + 0.97 * following
            expected[t] = following
    assert np.array_equal(episode_sums.returns_to_go(rewards, starts, 0.97), expected)


def dataset_of(costs: list[float], terminated: Sequence[int] = ()) -> Dataset:
    layout = Layout(1, 1)
    rows = torch.zeros(len(costs), layout.width)
    layout.unpack(rows).costs[:] = torch.tensor(costs)
    layout.unpack(rows).terminated[list(terminated)] = 1.0
    starts = np.array([0, 2, len(costs)])
    return Dataset(rows, layout, starts, np.zeros(len(costs), bool), 10, "test")


def test_units_of_cost() -> None:
    dataset = dataset_of([0.5, 2.0, 0.0, 1.0, 1.0])
    assert dataset.episode_costs.tolist() == [2.5, 2.0]
    assert dataset.cost_max == 2.0
    assert dataset_of([0.0, 0.0, 0.0]).cost_max == 1.0
    tiny = dataset_of([0.0, 1e-20, 0.0])  # the unit is the log's own, whatever it is
    assert tiny.cost_max == tiny.column("costs").max() == pytest.approx(1e-20)


def test_the_most_that_an_episode_can_cost() -> None:
    """Ten steps: nine as dear as the dearest that did not end its episode, and the dearest last."""
    costs = [0.5, 2.0, 0.0, 1.0, 1.0]
    assert dataset_of(costs).worst_cost == 9 * 2.0 + 2.0
    assert dataset_of(costs, terminated=[1]).worst_cost == 9 * 1.0 + 2.0
    assert dataset_of([0.0, 2.0, 0.0, 0.0, 3.0], terminated=[1, 4]).worst_cost == 3.0
    # Where the log has no cost an accident counts as 1, as in the environment.
    assert dataset_of([0.0] * 5, terminated=[1]).worst_cost == 1.0
    assert (
        dataset_of([0.5, 3.0, 1.0], terminated=[0, 1, 2]).worst_cost == 3.0
    )  # nothing ever went on


def test_what_an_episode_can_return() -> None:
    """Ten steps, each as good (or bad) as the best (worst) that did not end its episode."""

    def range_of(rewards: list[float], terminated: Sequence[int] = ()) -> tuple[float, float]:
        dataset = dataset_of([0.0] * len(rewards), terminated)
        dataset.transitions.rewards[:] = torch.tensor(rewards)
        return dataset.return_range

    assert range_of([1.0, 1.0, 1.0]) == (1.0, 10.0)  # the shortest episode has one step
    assert range_of([-1.0, -2.0, -1.0]) == (-20.0, -1.0)
    assert range_of([0.0, 5.0, -1.0], terminated=[1]) == (-10.0, 5.0)
    assert range_of([0.0, 5.0, -1.0], terminated=[1, 2]) == (-1.0, 5.0)


def test_a_sample_holds_whole_episodes_and_little_more_than_asked() -> None:
    dataset = dataset_of([0.0] * 7)  # episodes of 2 and 5 steps
    assert dataset.sample(7, 0) is dataset
    for seed in range(6):
        part = dataset.sample(2, seed)
        assert part.episode_lengths.tolist() in ([2], [5])
        assert len(part.rows) == part.episode_starts[-1] == len(part.truncated)
    assert dataset.sample(3, 0).episodes in (1, 2)


def test_a_rule_of_ones_own_takes_its_verdicts_from_the_log(tmp_path: Path) -> None:
    spec = SafetySpec(accident="mine:rule")
    verdicts = np.array([0, 0, 1, 0, 0, 0], bool)
    with pytest.raises(DataError, match=r'"mine:rule" cannot be .* array "accidents"'):
        load_dataset(write(tmp_path / "log.hdf5", {}), discount=1.0, spec=spec)
    path = write(tmp_path / "log.hdf5", {}, accidents=verdicts)
    dataset = load_dataset(path, discount=1.0, spec=spec)
    assert dataset.column("accidents").tolist() == [0, 0, 1, 0, 0, 0]
    path = write(path, {"accident": "cost", "cost_threshold": 0.0}, accidents=verdicts)
    with pytest.raises(DataError, match=r"mine:rule as the metadata's accident"):
        load_dataset(path, discount=1.0, spec=spec)
    path = write(path, {"accident": "mine:rule"}, accidents=verdicts)
    dataset = load_dataset(path, discount=1.0, spec=spec)
    assert dataset.column("accidents").tolist() == [0, 0, 1, 0, 0, 0]


def test_whose_horizon_is_too_short_decides_what_can_be_done(tmp_path: Path) -> None:
    path = write(tmp_path / "log.hdf5", {"horizon": 2})
    with pytest.raises(DataError, match=r"Set safety\.horizon=4 or more"):  # the file's own
        load_dataset(path, discount=1.0, spec=SafetySpec())
    path = write(tmp_path / "log.hdf5", {"horizon": None})
    remedies = {
        (None, 3): r"Set safety\.horizon=4 or more",
        # safety.horizon cannot be above the environment's own limit.
        (3, None): r"register the environment with max_episode_steps=4 or more, or cut",
        (3, 3): r"Set safety\.horizon=4 or more",
    }
    for (given, chosen), match in remedies.items():
        spec = SafetySpec(horizon=chosen)
        with pytest.raises(DataError, match=match):
            load_dataset(path, discount=1.0, spec=spec, horizon=given)
    assert load_dataset(path, discount=1.0, spec=SafetySpec(), horizon=4).horizon == 4


def test_a_horizon_other_than_the_one_that_the_log_states_is_an_error_that_names_both(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "log.hdf5", {"horizon": 40.0})
    for given, chosen, words in (
        (200, None, r"at most 40 steps.*environment ends them after 200.*safety\.horizon=40"),
        (20, None, r"at most 40 steps.*environment ends them after 20\..*max_episode_steps=40\.$"),
        (None, 50, r"at most 40 steps.*safety\.horizon is 50\. Leave safety\.horizon out"),
    ):
        with pytest.raises(DataError, match=words):
            load_dataset(path, discount=1.0, spec=SafetySpec(horizon=chosen), horizon=given)
    for given, chosen in ((None, None), (40, None), (None, 40), (40, 40)):
        spec = SafetySpec(horizon=chosen)
        assert load_dataset(path, discount=1.0, spec=spec, horizon=given).horizon == 40
    for wrong in (40.5, "40", True, 0):
        with pytest.raises(DataError, match="metadata's horizon is"):
            load_dataset(
                write(tmp_path / "log.hdf5", {"horizon": wrong}), discount=1.0, spec=SafetySpec()
            )


@pytest.mark.parametrize(("share", "episodes", "n"), [(0.15, 3, 1), (0.85, 3, 2), (0.3, 10, 3)])
def test_each_part_of_a_split_holds_an_episode(share: float, episodes: int, n: int) -> None:
    layout = Layout(1, 1)
    starts, truncated = np.arange(episodes + 1), np.ones(episodes, bool)
    dataset = Dataset(torch.zeros(episodes, layout.width), layout, starts, truncated, 10, "test")
    train, held_out = dataset.split(share, 0)
    assert (train.episodes, held_out.episodes) == (episodes - n, n)


@pytest.mark.parametrize("rule", ["cost", "episode_cost"])
def test_a_rule_on_costs_needs_costs(rule: str) -> None:
    spec = SafetySpec(accident=rule, cost_threshold=1.0)
    with pytest.raises(DataError, match="has no costs"):
        derived.accidents_under({"costs": COSTS}, STARTS, {"no_costs": True}, spec)
