"""The order of a stored row: written in one place, whoever fills it or reads it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safe_offrl import types
from safe_offrl.data_formats import memory_map
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.deploy.episodes import Reservation, play_episode
from safe_offrl.deploy.policy import Act
from safe_offrl.spec import SafetySpec
from safe_offrl.types import SCALARS, Batch, Layout, Normalizer

LAYOUT = Layout(observation_size=2, action_size=1)


class Env:
    """Three steps; the second is an accident."""

    horizon = 4
    signals: tuple[str, ...] = ()

    def reset(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps = getattr(self, "steps", 0) + 1
        info = {"accident": self.steps == 2, "cost": 7.0 * self.steps}
        return np.full(2, self.steps, np.float32), 0.5, self.steps == 3, False, info


class Still:
    """A policy that sees what there is and never moves."""

    normalizer = Normalizer(np.zeros(2, np.float32), np.ones(2, np.float32))
    guard = None

    def act(self, *_: Any, **__: Any) -> Act:
        return Act(np.zeros(1, np.float32), replaced=False, handed_over=False)


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


def test_an_episode_has_its_signals_and_their_sums() -> None:
    class TwoSignals(Env):
        signals = ("hazards", "vases")

        def step(self, action: np.ndarray) -> Any:
            *values, info = super().step(action)
            return *values, {**info, "signals": {"hazards": self.steps / 2, "vases": 10.0}}

    env: Any = TwoSignals()
    policy: Any = Still()
    episode = play_episode(env, policy, 0, np.random.default_rng(0))
    signals = Layout(2, 1, TwoSignals.signals).unpack(episode.rows).signals
    assert signals is not None
    assert signals.tolist() == [[0.5, 10.0], [1.0, 10.0], [1.5, 10.0]]
    assert episode.signal_costs == {"hazards": 3.0, "vases": 30.0}
    about: dict[str, Any] = {"index": 0, "seed": 0, "steps_before": 0, "version": 0, "phase": "x"}
    about |= {"worst_cost": 0.0, "worst_signals": {"hazards": 40.0, "vases": 20.0}}
    assert episode.recorded(**about).signal_costs == {"hazards": 3.0, "vases": 30.0}
    # A fault counts as the worst that is known, or as what was seen of it.
    fault = episode._replace(fault="It broke.").recorded(**about)
    assert fault.signal_costs == {"hazards": 40.0, "vases": 30.0}
    assert Reservation.for_episode(steps=9, **about).worst.signal_costs == about["worst_signals"]


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
    monkeypatch.setattr(types, "SCALARS", order)
    after = fields(tmp_path / "after")
    for name in Batch._fields[:-1]:
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["rewards"], before["accidents"])


def test_signals_end_a_row_in_the_order_of_their_names() -> None:
    layout = Layout(2, 1, ("hazards", "vases"))
    assert layout.scalars[-3:] == ("return_to_go", "costs_hazards", "costs_vases")
    assert (layout.width, LAYOUT.width) == (13, 11)
    zeros = np.zeros(2, np.float32)
    numbers = dict.fromkeys(SCALARS, 0.5)
    row = Layout.row(zeros, zeros[:1], zeros, signals=[3.0, 4.0], **numbers)
    assert row.tolist() == [0.0] * 5 + [0.5] * 6 + [3.0, 4.0]
    rows = torch.from_numpy(np.stack([row, row]))
    batch = layout.unpack(rows)
    assert batch.signals is not None
    assert batch.signals.tolist() == [[3.0, 4.0], [3.0, 4.0]]
    assert torch.equal(layout.pack(batch), rows)
    # Whoever knows the sizes alone reads the rest as it is.
    assert torch.equal(LAYOUT.pack(LAYOUT.unpack(rows)), rows)


def test_a_layout_is_its_sizes_and_its_signals() -> None:
    layout = Layout(2, 1, ("hazards",))
    assert layout.sizes == LAYOUT.sizes == (2, 1)
    assert layout == Layout(2, 1, ("hazards",))
    assert layout != LAYOUT
    assert layout != Layout(2, 1, ("vases",))
    assert len({layout, LAYOUT, Layout(2, 1, ("hazards",))}) == 2
    for same in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
        assert same == layout


def test_a_row_needs_every_number() -> None:
    nothing = np.zeros(1, np.float32)
    with pytest.raises(KeyError, match="accidents"):
        Layout.row(nothing, nothing, nothing, rewards=1.0)
