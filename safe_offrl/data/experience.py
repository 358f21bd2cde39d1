"""Logged and online transitions together: what the online phase draws its batches from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_offrl.data.dataset import Dataset
from safe_offrl.data.online_buffer import OnlineBuffer
from safe_offrl.data.sampling import (
    ChunkSampler,
    Reach,
    RiskSampler,
    draw_indices,
    symmetric_batches,
)
from safe_offrl.types import Batch


class Experience:
    """The dataset and the online buffer.

    ``offline_share`` of every batch is logged, the rest online; before the buffer holds an episode
    nothing can be drawn.
    """

    def __init__(
        self,
        dataset: Dataset,
        capacity: int,
        offline_share: float,
        *,
        reaches: Sequence[Reach] = (Reach(),),
        chunk: Reach | None = None,
        device: torch.device | None = None,
    ) -> None:
        """``reaches``, one a safety critic, say what its batches span, see :class:`RiskSampler`.

        ``chunk`` says so of those for the reward critics and the actor: one step each by default,
        else see :class:`ChunkSampler`.

        The buffer lies on ``device``, the CPU by default. The generators must be there as well, and
        the rows of the dataset unless they are a memory map.
        """
        self.dataset = dataset
        self.offline_share = offline_share
        self.buffer = OnlineBuffer(dataset.layout, capacity, reaches=reaches, device=device)
        self._logged_starts = dataset.initial_observations.to(device)
        self._logged = [
            RiskSampler.from_dataset(dataset, **reach._asdict(), device=device) for reach in reaches
        ]
        where = device or torch.device("cpu")
        self._chunks = ChunkSampler.from_dataset(dataset, chunk, where) if chunk else None

    def batches(self, updates: int, batch_size: int, generator: torch.Generator) -> list[Batch]:
        """Mini-batches for the reward critics and the actor, each with its exact share of both.

        Before there are online chunks, all are logged.
        """
        if self._chunks:
            online = self.buffer.chunks(self._chunks.reach)
            n = round(batch_size * self.offline_share) if len(online) else batch_size
            sizes = ((self._chunks, n), (online, batch_size - n))
            return [
                _joined([source.draw(size, generator) for source, size in sizes if size])
                for _ in range(updates)
            ]
        return symmetric_batches(
            self.dataset.rows,
            self.buffer.rows,
            self.dataset.layout,
            updates=updates,
            batch_size=batch_size,
            offline_share=self.offline_share,
            generator=generator,
        )

    def stratified_batch(
        self, batch_size: int, positive_share: float, generator: torch.Generator, reach: int = 0
    ) -> tuple[Batch, Tensor, Tensor]:
        """A batch for the safety critic of one reach, by its place: (transitions, weights, spans).

        See RiskSampler.draw. Each source is stratified by itself, so a weighted mean is that of a
        symmetric batch.
        """
        n = round(batch_size * self.offline_share)
        parts = [
            source.draw(size, positive_share, generator)
            for source, size in (
                (self._logged[reach], n),
                (self.buffer.risk_sampler(reach), batch_size - n),
            )
        ]
        batches, weights, spans = zip(*parts, strict=True)
        return _joined(batches), torch.cat(weights), torch.cat(spans)

    def draw_start_observations(self, n: int, generator: torch.Generator) -> Tensor:
        """First observations of episodes [n, O], half of the log and half of the online ones."""
        online = self.buffer.start_observations
        first = draw_indices(len(self._logged_starts), n - n // 2, generator)
        second = draw_indices(len(online), n // 2, generator)
        return torch.cat([self._logged_starts[first], online[second]])


def _joined(batches: Sequence[Batch]) -> Batch:
    """One batch of several, in their order."""
    fields = zip(*(batch.tensors for batch in batches), strict=True)
    return Batch(*(torch.cat(parts) for parts in fields))
