"""Chunks: transitions that span several steps, of the log and of what was played online."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safe_offrl.compute.state import seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.experience import Experience
from safe_offrl.data.sampling import ChunkSampler, Reach
from safe_offrl.errors import DataError
from safe_offrl.types import Batch, Layout

LAYOUT = Layout(1, 2)
THREE = Reach(3, 0.5)
CPU = torch.device("cpu")


def rows_of(*episodes: tuple[int, bool], first: int = 0) -> torch.Tensor:
    """Episodes of so many steps that terminate or not; all numbers count the steps from ``first``.

    Observations are the number n of a step, actions n and -n, rewards n, the next observation
    n + .5.
    """
    lengths = [length for length, _ in episodes]
    n = torch.arange(sum(lengths)).float() + first
    ends = torch.zeros(len(n))
    ends[np.cumsum(lengths) - 1] = torch.tensor([float(ended) for _, ended in episodes])
    time_to_go = torch.cat([1.0 - torch.arange(length) / 20.0 for length in lengths])
    return LAYOUT.pack(
        Batch(
            observations=n.unsqueeze(1),
            actions=torch.stack([n, -n], dim=1),
            rewards=n,
            accidents=ends,
            costs=2.0 * n,
            next_observations=n.unsqueeze(1) + 0.5,
            terminated=ends,
            time_to_go=time_to_go,
            return_to_go=3.0 * n,
        )
    )


def log_of(*episodes: tuple[int, bool]) -> Dataset:
    starts = np.cumsum([0, *(length for length, _ in episodes)])
    return Dataset(rows_of(*episodes), LAYOUT, starts, np.zeros(starts[-1], bool), 20, "")


def by_first(batch: Batch) -> dict[int, Batch]:
    """Each chunk that was drawn, under the number of its first step."""
    return {
        int(n): Batch(*(x[i] for x in batch.tensors))
        for i, n in enumerate(batch.observations[:, 0])
    }


def test_which_chunks_there_are_and_what_they_hold() -> None:
    """Cut after 4 steps; terminated after 2; cut after 2; terminated after 3, where all ends."""
    log = log_of((4, False), (2, True), (2, False), (3, True))
    sampler = ChunkSampler.from_dataset(log, THREE, CPU)
    found = by_first(sampler.draw(500, seeded(0)))
    assert sorted(found) == [0, 1, 4, 5, 8, 9, 10]
    assert len(sampler) == 7
    expected = {
        # First step: actions, reward, next observation, whether it ends there.
        1: ([1.0, -1.0, 2.0, -2.0, 3.0, -3.0], 1.0 + 0.5 * 2.0 + 0.25 * 3.0, 3.5, 0.0),
        4: ([4.0, -4.0, 5.0, -5.0, 0.0, 0.0], 4.0 + 0.5 * 5.0, 5.5, 1.0),
        5: ([5.0, -5.0, 0.0, 0.0, 0.0, 0.0], 5.0, 5.5, 1.0),
        8: ([8.0, -8.0, 9.0, -9.0, 10.0, -10.0], 8.0 + 0.5 * 9.0 + 0.25 * 10.0, 10.5, 1.0),
        10: ([10.0, -10.0, 0.0, 0.0, 0.0, 0.0], 10.0, 10.5, 1.0),
    }
    for n, (actions, reward, following, ended) in expected.items():
        chunk = found[n]
        assert chunk.actions.tolist() == actions
        assert chunk.rewards.item() == reward
        assert chunk.next_observations.tolist() == [following]
        assert chunk.terminated.item() == ended
    # The rest is that of the first step.
    assert found[8].costs.item() == 16.0
    assert found[8].time_to_go.item() == 1.0
    assert found[9].time_to_go.item() == pytest.approx(0.95)
    assert found[8].accidents.item() == 0.0


def test_each_chunk_is_as_likely_as_any_other() -> None:
    sampler = ChunkSampler.from_dataset(log_of((4, False), (2, True)), THREE, CPU)
    drawn = sampler.draw(8000, seeded(0)).observations[:, 0]
    shares = [(drawn == n).float().mean().item() for n in (0, 1, 4, 5)]
    assert shares == pytest.approx([0.25] * 4, abs=0.02)


def test_a_chunk_of_one_step_is_a_transition() -> None:
    log = log_of((4, False), (2, True))
    found = by_first(ChunkSampler.from_dataset(log, Reach(1, 0.5), CPU).draw(200, seeded(0)))
    assert sorted(found) == list(range(6))
    for n, chunk in found.items():
        row = LAYOUT.unpack(log.rows[torch.tensor([n])])
        for mine, its in zip(chunk.tensors, row.tensors, strict=True):
            assert torch.equal(mine, its[0])


def test_a_log_without_a_chunk_is_refused() -> None:
    with pytest.raises(DataError, match=r"No episode of the dataset has 3 steps.*Take longer"):
        ChunkSampler.from_dataset(log_of((2, False), (1, False)), THREE, CPU)


# --- logged and online ---


def experience(share: float = 0.25) -> Experience:
    return Experience(log_of((4, False), (2, True)), 100, share, chunk=THREE)


def test_every_batch_has_its_exact_share() -> None:
    data = experience()
    data.buffer.append(rows_of((4, False), first=100))
    batches = data.batches(3, 16, seeded(0))
    assert [b.actions.shape for b in batches] == [(16, 6)] * 3
    for batch in batches:
        assert (batch.observations[:4, 0] < 100.0).all()
        assert set(batch.observations[4:, 0].tolist()) == {100.0, 101.0}
    assert not torch.equal(batches[0].observations, batches[1].observations)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_may_be_none_or_all(share: float) -> None:
    data = experience(share)
    data.buffer.append(rows_of((4, False), first=100))
    (batch,) = data.batches(1, 16, seeded(0))
    assert ((batch.observations[:, 0] < 100.0) == bool(share)).all()


def test_what_is_added_can_be_drawn_at_once_and_in_a_copy() -> None:
    """Two episodes in a row are not one: no chunk goes from one into the next."""
    data, copy = experience(share=0.0), experience(share=0.0)
    data.buffer.append(rows_of((3, False), first=100))
    data.batches(1, 4, seeded(0))
    data.buffer.append(rows_of((4, False), first=200))
    copy.buffer.load_state_dict(data.buffer.state_dict())
    for each in (data, copy):
        (batch,) = each.batches(1, 200, seeded(0))
        assert set(batch.observations[:, 0].tolist()) == {100.0, 200.0, 201.0}


def test_before_there_is_a_chunk_all_are_logged() -> None:
    """An episode of two steps that a hand-over cut."""
    data = experience()
    data.buffer.append(rows_of((2, False), first=100))
    (batch,) = data.batches(1, 16, seeded(0))
    assert len(batch.rewards) == 16
    assert (batch.observations < 100.0).all()


def test_by_default_a_batch_is_of_single_steps() -> None:
    data = Experience(log_of((4, False)), 100, 0.5)
    data.buffer.append(rows_of((2, False), first=100))
    assert data.batches(1, 16, seeded(0))[0].actions.shape == (16, 2)
