"""Logged and online transitions in one batch, each in its share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safe_offrl.data.dataset import Dataset
from safe_offrl.data.experience import Experience
from safe_offrl.data.sampling import Reach
from safe_offrl.types import Layout

LAYOUT = Layout(2, 1)


def rows(n: int, value: float, accidents: int = 0) -> torch.Tensor:
    """n rows whose every column is ``value`` but the last ``accidents`` have an accident."""
    result = torch.full((n, LAYOUT.width), value)
    LAYOUT.unpack(result).accidents.zero_()
    if accidents:
        LAYOUT.unpack(result).accidents[-accidents:] = 1.0
    return result


def experience(share: float = 0.5, steps: int = 1) -> Experience:
    logged = rows(40, -1.0, accidents=2)
    dataset = Dataset(
        rows=logged,
        layout=LAYOUT,
        episode_starts=np.array([0, 20, 40]),
        truncated=np.zeros(40, bool),
        horizon=20,
        sha256="",
    )
    return Experience(dataset, 100, share, reaches=[Reach(steps)])


@pytest.mark.parametrize("share", [0.5, 0.25, 0.0])
def test_every_batch_has_its_exact_share(share: float) -> None:
    data = experience(share)
    data.buffer.append(rows(10, 1.0))
    batches = data.batches(3, 16, torch.Generator().manual_seed(0))
    assert [int((b.rewards < 0).sum()) for b in batches] == [round(16 * share)] * 3
    risky, weights, _ = data.stratified_batch(16, 0.25, torch.Generator().manual_seed(0))
    assert int((risky.rewards < 0).sum()) == round(16 * share)
    assert weights.shape == (16,)


def test_the_weights_undo_the_extra_accidents_of_each_source() -> None:
    data = experience()
    data.buffer.append(rows(10, 1.0, accidents=1))
    drawn, weights, _ = data.stratified_batch(20_000, 0.25, torch.Generator().manual_seed(0))
    # 2 of 40 logged and 1 of 10 online transitions, in halves: .5 * .05 + .5 * .1
    assert float(drawn.accidents.mean()) > 0.2
    assert float((weights * drawn.accidents).mean()) == pytest.approx(0.075, rel=0.05)


def test_start_observations_are_the_first_of_each_episode_of_both() -> None:
    data = experience()
    episode = rows(3, 1.0)
    episode[0, :2] = 7.0
    LAYOUT.unpack(episode).time_to_go[:] = 1.0 - torch.arange(3) / 20
    data.buffer.append(episode)
    starts = data.draw_start_observations(5, torch.Generator().manual_seed(0))
    assert starts[:, 0].tolist() == [-1.0, -1.0, -1.0, 7.0, 7.0]


def test_recent_transitions_are_the_last_steps() -> None:
    data = experience()
    data.buffer.append(rows(3, 1.0))
    data.buffer.append(rows(3, 2.0))
    assert data.buffer.recent_transitions(4).rewards.tolist() == [1.0, 2.0, 2.0, 2.0]
    assert len(data.buffer.recent_transitions(99).rewards) == 6


def add_episode(data: Experience, steps: int, accidents: tuple[int, ...] = ()) -> None:
    """An episode whose rewards number its steps."""
    episode = rows(steps, 0.0)
    batch = LAYOUT.unpack(episode)
    batch.time_to_go[:] = 1.0 - torch.arange(steps) / 20
    batch.rewards[:] = torch.arange(steps).float()
    batch.accidents[list(accidents)] = 1.0
    data.buffer.append(episode)


def test_of_the_last_episodes_what_lies_before_an_accident() -> None:
    data = experience()
    add_episode(data, 6, accidents=(1, 3))
    add_episode(data, 4, accidents=(2,))
    add_episode(data, 2)
    seen = data.buffer.recent_visits(8, until_accident=True)  # from step 4 of the first on
    assert seen.batch.rewards.tolist() == [4.0, 5.0, 0.0, 1.0, 2.0, 3.0, 0.0, 1.0]
    assert seen.counted.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert seen.per_episode == (3 + 2) / 2  # of the episodes that begin among them
    seen = data.buffer.recent_visits(8, until_accident=False)
    assert seen.counted.tolist() == [1.0] * 8
    assert seen.per_episode == data.buffer.mean_episode_length(8) == (4 + 2) / 2
    # Where none begins among them, the last one is meant.
    assert (
        data.buffer.recent_visits(1, until_accident=False).per_episode
        == data.buffer.mean_episode_length(1)
        == 2.0
    )
    assert data.buffer.recent_visits(99, until_accident=True).per_episode == pytest.approx(7 / 3)
    other = experience()
    other.buffer.load_state_dict(data.buffer.state_dict())
    assert other.buffer.recent_visits(8, until_accident=True).per_episode == 2.5


def test_episodes_of_one_step_are_told_apart() -> None:
    data = experience(share=0.0, steps=3)
    for cost in (1.0, 100.0):
        episode = rows(1, 0.0)
        LAYOUT.unpack(episode).costs.fill_(cost)
        LAYOUT.unpack(episode).time_to_go.fill_(1.0)
        data.buffer.append(episode)
    batch, _, spans = data.stratified_batch(50, 0.0, torch.Generator().manual_seed(0))
    assert set(batch.costs.tolist()) == {1.0, 100.0}
    assert set(spans.tolist()) == {1.0}


def test_n_step_costs_stay_inside_each_add_episode() -> None:
    data = experience(share=0.0, steps=3)
    for cost, steps in ((1.0, 4), (100.0, 3)):
        episode = rows(steps, 0.0)
        LAYOUT.unpack(episode).costs.fill_(cost)
        LAYOUT.unpack(episode).time_to_go[:] = 1.0 - torch.arange(steps) / 20
        data.buffer.append(episode)
    drawn = data.stratified_batch(100, 0.0, torch.Generator().manual_seed(0))
    assert set(drawn[0].costs.tolist()) == {3.0, 2.0, 1.0, 300.0, 200.0, 100.0}


def test_nothing_can_be_drawn_before_the_first_episode() -> None:
    with pytest.raises(ValueError, match="no episode"):
        experience().stratified_batch(8, 0.25, torch.Generator())


def test_state_round_trip_draws_the_same() -> None:
    data, other = experience(), experience()
    data.buffer.append(rows(10, 1.0, accidents=1))
    state = data.buffer.state_dict()
    data.buffer.append(rows(5, 3.0))  # the state is a copy
    other.buffer.load_state_dict(state)
    assert other.buffer.size == 10
    first = other.stratified_batch(8, 0.25, torch.Generator().manual_seed(1))
    again = experience()
    again.buffer.append(rows(10, 1.0, accidents=1))
    second = again.stratified_batch(8, 0.25, torch.Generator().manual_seed(1))
    assert torch.equal(first[0].rewards, second[0].rewards)
    assert torch.equal(first[1], second[1])
