"""The order of a stored row: written in one place, whoever fills it or reads it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safe_offrl import types
from safe_offrl.data_formats import mapped_rows, memory_map
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.deploy.episodes import play_episode
from safe_offrl.spec import SafetySpec
from safe_offrl.types import SCALARS, Batch, Layout, Normalizer

LAYOUT = Layout(observation_size=2, action_size=1)


class Env:
    """Three steps; the second is an accident."""

    horizon = 4

    def reset(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps = getattr(self, "steps", 0) + 1
        info = {"accident": self.steps == 2, "cost": 7.0 * self.steps}
        return np.full(2, self.steps, np.float32), 0.5, self.steps == 3, False, info


class Still:
    """A policy that sees what there is and never moves."""

    normalizer = Normalizer(np.zeros(2, np.float32), np.ones(2, np.float32))

    def act(self, *_: Any, **__: Any) -> tuple[np.ndarray, bool]:
        return np.zeros(1, np.float32), False


def played() -> Batch:
    env: Any = Env()
    policy: Any = Still()
    return LAYOUT.unpack(play_episode(env, policy, 0, np.random.default_rng(0)).rows)


def mapped(folder: Path) -> Batch:
    """Rows of a memory map, whose scalars are computed and kept beside it."""
    n = 6
    numbers = np.random.default_rng(0).normal(size=(n, 5)).astype(np.float32)
    ends = np.arange(n) % 3 == 2
    arrays = {
        "observations": numbers[:, :2],
        "actions": np.clip(numbers[:, 2:3], -1.0, 1.0),
        "rewards": numbers[:, 3],
        "costs": np.arange(n, dtype=np.float32) % 2,
        "next_observations": numbers[:, 3:5],
        "terminals": ends,
        "timeouts": np.zeros(n, bool),
    }
    metadata = {"env_id": "Rows-v0", "horizon": 4}
    memory_map.write_memory_map(folder / "log.mmap", arrays, metadata)
    dataset = load_dataset(folder / "log.mmap", discount=0.9, spec=SafetySpec())
    return dataset.layout.unpack(dataset.rows[torch.arange(n)])


def test_the_order_is_that_of_what_is_on_disk() -> None:
    """Buffers in checkpoints and the caches of memory maps have it: another needs new versions."""
    assert SCALARS == ("rewards", "accidents", "costs", "terminated", "time_to_go", "return_to_go")


def test_what_an_episode_brought_stands_under_its_name() -> None:
    batch = played()
    assert batch.rewards.tolist() == [0.5, 0.5, 0.5]
    assert batch.accidents.tolist() == [0.0, 1.0, 0.0]
    assert batch.costs.tolist() == [7.0, 14.0, 21.0]
    assert batch.terminated.tolist() == [0.0, 0.0, 1.0]
    assert batch.time_to_go.tolist() == [1.0, 0.75, 0.5]
    assert batch.return_to_go.tolist() == [0.0, 0.0, 0.0]
    assert batch.next_observations.tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


@pytest.mark.parametrize("source", ["packed", "played", "mapped"])
def test_another_order_swaps_nothing(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fields(folder: Path) -> dict[str, torch.Tensor]:
        if source == "packed":
            batch = Batch(*torch.randn(9, 5, 1, generator=torch.Generator().manual_seed(0)))
            one = {name: getattr(batch, name)[:, 0] for name in SCALARS}
            two = batch.observations.expand(-1, 2)
            batch = batch._replace(observations=two, next_observations=-two, **one)
            return LAYOUT.unpack(LAYOUT.pack(batch))._asdict()
        return (played() if source == "played" else mapped(folder))._asdict()

    before = fields(tmp_path / "before")
    order = ("accidents", "rewards", *reversed(SCALARS[2:]))
    for module in (types, mapped_rows, memory_map):
        monkeypatch.setattr(module, "SCALARS", order)
    after = fields(tmp_path / "after")
    for name, values in before.items():
        assert torch.equal(values, after[name]), name
    assert not torch.equal(before["rewards"], before["accidents"])


def test_a_row_needs_every_number() -> None:
    nothing = np.zeros(1, np.float32)
    with pytest.raises(KeyError, match="accidents"):
        Layout.row(nothing, nothing, nothing, rewards=1.0)
