"""Logged and lived transitions together: what the online phase draws its batches from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import RiskSampler, draw_indices, symmetric_batches
from safe_offrl.data.storage import TransitionBuffer
from safe_offrl.types import Batch


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

    def add_episode(self, rows: Tensor) -> None:
        """Append the rows [n, D] of one complete episode."""
        self.buffer.append(rows)
        first = rows[:1, : self.dataset.layout.observation_size].to(self.starts.device)
        self.starts = torch.cat([self.starts, first])
        self._lived = self._lived_sampler()

    def visited(self, steps: int) -> Batch:
        """The last ``steps`` lived transitions, fewer if there are fewer."""
        return self.dataset.layout.unpack(self.buffer.rows[-steps:])

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
            self._lived = self._lived_sampler()

    def _lived_sampler(self) -> RiskSampler:
        """Of all rows in the buffer, which holds every episode of a run: an episode begins where
        the time to go rises.
        """
        rows, layout = self.buffer.rows, self.dataset.layout
        lived = layout.unpack(rows)
        rises = (lived.time_to_go.diff() > 0.0).nonzero().squeeze(1) + 1
        starts = torch.cat([rises.new_tensor([0]), rises, rises.new_tensor([len(rows)])])
        return RiskSampler(
            rows,
            layout,
            starts,
            lived.accidents,
            lived.costs,
            steps=self._steps,
            discount=self._discount,
        )
