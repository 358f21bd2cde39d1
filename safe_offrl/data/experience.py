"""Logged and lived transitions together: what the online phase draws its batches from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import RiskSampler, draw_indices, symmetric_batches
from safe_offrl.data.storage import TransitionBuffer
from safe_offrl.types import Batch, Visited


class Experience:
    """The dataset, the online buffer, and the start states of both.

    ``offline_share`` of every batch is logged, the rest lived; before the first episode has been
    added only the start states of the log exist and nothing can be drawn.
    """

    def __init__(
        self,
        dataset: Dataset,
        capacity: int,
        offline_share: float,
        *,
        steps: int = 1,
        discount: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        """Batches for the safety critic span ``steps`` steps, see :class:`RiskSampler`.

        What is lived is kept on ``device``, the CPU by default, where the rows of the dataset,
        unless they are a memory map, and the generators must be as well.
        """
        self.dataset = dataset
        self._steps, self._discount = steps, discount
        self.offline_share = offline_share
        self.buffer = TransitionBuffer(dataset.layout, capacity, device)
        size = dataset.layout.observation_size
        self.starts = torch.zeros(0, size, device=device)  # of the online episodes
        self._logged_starts = dataset.initial_observations.to(device)
        self._logged = RiskSampler.of(dataset, steps=steps, discount=discount, device=device)
        self._lived: RiskSampler | None = None
        self._begin = torch.zeros(1, dtype=torch.int64)  # where episodes begin, and the end; on CPU

    def add_episode(self, rows: Tensor) -> None:
        """Append the rows [n, D] of one complete episode."""
        self.buffer.append(rows)
        first = rows[:1, : self.dataset.layout.observation_size].to(self.starts.device)
        self.starts = torch.cat([self.starts, first])
        self._index_episodes()

    def visited(self, steps: int) -> Batch:
        """The last ``steps`` lived transitions, fewer if there are fewer."""
        return self.dataset.layout.unpack(self.buffer.rows[-steps:])

    def mean_length(self, steps: int) -> float:
        """Mean length of the episodes that begin among the last ``steps`` lived transitions.

        Of the last episode where none does.
        """
        return self._mean_over_episodes(self._begin.diff(), steps)

    def lived(self, steps: int, *, until_accident: bool) -> Visited:
        """The last ``steps`` lived transitions, fewer if there are fewer.

        ``until_accident``: those behind the first accident of their episode do not count.
        """
        batch = self.dataset.layout.unpack(self.buffer.rows)
        accidents = batch.accidents.cpu()
        episode = torch.repeat_interleave(self._begin.diff())  # of each row
        counted = torch.ones_like(accidents)
        if until_accident:
            before = accidents.cumsum(0) - accidents  # accidents of all rows before
            counted = (before == before[self._begin[:-1]][episode]).to(counted.dtype)
        counts = counted.new_zeros(len(self._begin) - 1).index_add_(0, episode, counted)
        first = max(0, len(accidents) - steps)
        last = Batch(*(field[first:] for field in batch))
        there = counted[first:].to(batch.rewards.device)
        return Visited(last, there, self._mean_over_episodes(counts, steps))

    def _mean_over_episodes(self, values: Tensor, steps: int) -> float:
        latest = values[self._begin[:-1] >= self._begin[-1] - steps]
        return float(latest.double().mean() if len(latest) else values[-1])

    def recent(self, steps: int, size: int, generator: torch.Generator) -> Batch:
        """``size`` transitions drawn from the last ``steps`` lived ones."""
        rows = self.buffer.rows[-steps:]
        return self.dataset.layout.unpack(rows[draw_indices(len(rows), size, generator)])

    def batches(self, updates: int, batch_size: int, generator: torch.Generator) -> list[Batch]:
        """Mini-batches for the reward critics and the actor, each with its exact share of both."""
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
        self, batch_size: int, positive_share: float, generator: torch.Generator
    ) -> tuple[Batch, Tensor, Tensor]:
        """A batch for the safety critic, see RiskSampler.draw: (transitions, weights, spans).

        Each source is stratified by itself, so a weighted mean is that of a symmetric batch.
        """
        if self._lived is None:
            raise ValueError("no episode has been added yet")
        n = round(batch_size * self.offline_share)
        parts = [
            source.draw(size, positive_share, generator)
            for source, size in ((self._logged, n), (self._lived, batch_size - n))
        ]
        batches, weights, spans = zip(*parts, strict=True)
        joined = Batch(*(torch.cat(fields) for fields in zip(*batches, strict=True)))
        return joined, torch.cat(weights), torch.cat(spans)

    def start_states(self, n: int, generator: torch.Generator) -> Tensor:
        """Start states [n, O], half of the log and half of the online episodes."""
        first = draw_indices(len(self._logged_starts), n - n // 2, generator)
        second = draw_indices(len(self.starts), n // 2, generator)
        return torch.cat([self._logged_starts[first], self.starts[second]])

    def state_dict(self) -> dict[str, Tensor]:
        """The online part, copied; the dataset is identified by its hash elsewhere."""
        return {**self.buffer.state_dict(), "starts": self.starts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the online part; DataError if it does not fit the buffer."""
        self.buffer.load_state_dict(state)
        self.starts = state["starts"].to(self.starts.device, copy=True)
        if self.buffer.size:
            self._index_episodes()

    def _index_episodes(self) -> None:
        """Of all rows in the buffer, which holds every episode of a run: an episode begins where
        the time to go does not fall.
        """
        rows, layout = self.buffer.rows, self.dataset.layout
        lived = layout.unpack(rows)
        begin = (lived.time_to_go.diff() >= 0.0).nonzero().squeeze(1) + 1
        begin = torch.cat([begin.new_tensor([0]), begin, begin.new_tensor([len(rows)])])
        self._begin = begin.cpu()
        self._lived = RiskSampler(
            rows,
            layout,
            begin,
            lived.accidents,
            lived.costs,
            steps=self._steps,
            discount=self._discount,
        )
