"""Online transitions in one preallocated store that only grows, whole episodes at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safe_offrl.data.sampling import (
    ChunkSampler,
    Reach,
    RiskSampler,
    StratifiedSampler,
    draw_indices,
    n_step_costs,
)
from safe_offrl.errors import DataError
from safe_offrl.types import Batch, Layout, Visited


class OnlineBuffer:
    """Rows [capacity, D] of whole episodes, in the order in which they were played.

    The capacity is the budget of a run, so no row is ever overwritten. What is derived from an
    episode is derived once, as it is appended. ``start_observations`` [M, O] are the first of each.
    """

    def __init__(
        self,
        layout: Layout,
        capacity: int,
        *,
        reaches: Sequence[Reach] = (Reach(),),
        device: torch.device | None = None,
    ) -> None:
        """Rows are kept on ``device``; ``reaches`` are those of :meth:`risk_sampler`."""
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}, but at least one row is needed")
        self.layout = layout
        self.capacity = capacity
        self._reaches = tuple(reaches)
        self._layouts = [layout._replace(limited=reach.limited) for reach in reaches]
        self._store = torch.zeros(capacity, layout.width, device=device)
        # Costs and spans of each reach.
        self._costs = torch.zeros(len(reaches), capacity, 1 + len(layout.signals), device=device)
        self._spans = torch.zeros(len(reaches), capacity, device=device)
        self._handed_over = torch.zeros(capacity, dtype=torch.bool, device=device)
        self._clear()

    def _clear(self) -> None:
        self._handed_over.zero_()
        self._own: dict[int, Tensor] = {}
        self._chunks: dict[Reach, ChunkSampler] = {}
        self.start_observations = self._store.new_zeros(0, self.layout.observation_size)
        none = torch.zeros(0, dtype=torch.int64, device=self._store.device)
        self._event_rows = [none] * len(self._reaches)  # what each sees often, see Layout.event
        self._starts = torch.zeros(1, dtype=torch.int64)  # first rows of episodes, and N; on CPU

    @property
    def size(self) -> int:
        """Rows stored N, at most ``capacity``."""
        return int(self._starts[-1])

    @property
    def rows(self) -> Tensor:
        """The rows stored [N, D], oldest first: a view."""
        return self._store[: self.size]

    def append(self, rows: Tensor, handed_over: Tensor | None = None) -> None:
        """Copy the rows [n, D] of whole episodes in.

        An episode begins where the time to go does not fall. ``handed_over`` [n] says in which rows
        a fallback acted, in none if None: what the safety critic learns from spans no step of it
        behind the first, or it would hold the policy for as safe as its guard.
        """
        if rows.ndim != 2 or rows.shape[1] != self.layout.width:
            raise ValueError(f"rows are {list(rows.shape)}, expected [n, {self.layout.width}]")
        first, end = self.size, self.size + len(rows)
        if end > self.capacity:
            raise ValueError(f"{end} rows are more than the capacity of {self.capacity}")
        # Rows.
        self._own, self._chunks = {}, {}
        self._store[first:end] = rows
        added = self.layout.unpack(self._store[first:end])
        # Episodes.
        ends = torch.ones(len(rows), dtype=torch.bool, device=self._store.device)
        ends[:-1] = added.time_to_go.diff() >= 0.0
        starts = torch.nn.functional.pad(ends.nonzero().squeeze(1) + 1, (1, 0))
        initial = added.observations[starts[:-1]]
        self.start_observations = torch.cat([self.start_observations, initial])
        self._starts = torch.cat([self._starts, first + starts[1:].cpu()])
        # Costs, spans and accidents, which the safety critics learn from.
        signals = [] if added.signals is None else [added.signals]
        cuts = starts
        if handed_over is not None:
            handed = self._handed_over[first:end] = handed_over.to(self._store.device)
            cuts = torch.cat([starts, handed.nonzero().squeeze(1)]).unique()
        for k, (reach, layout) in enumerate(zip(self._reaches, self._layouts, strict=True)):
            seen = layout.unpack(self._store[first:end])
            columns = torch.cat([seen.costs.unsqueeze(-1), *signals], dim=-1)
            costs, spans = n_step_costs(columns, cuts, reach.steps, reach.discount)
            self._costs[k, first:end], self._spans[k, first:end] = costs, spans
            events = first + (getattr(seen, layout.event) > 0).nonzero().squeeze(1)
            self._event_rows[k] = torch.cat([self._event_rows[k], events])

    def risk_sampler(self, reach: int = 0) -> RiskSampler:
        """Batches for a safety critic from the rows stored; at least one episode is needed.

        ``reach`` is its place among those that the buffer was made with.
        """
        if not self.size:
            raise ValueError("no episode has been added yet")
        layout = self._layouts[reach]
        return RiskSampler(
            self.rows,
            layout,
            StratifiedSampler(layout.column(self.rows, layout.event), self._event_rows[reach]),
            self._costs[reach, : self.size],
            self._spans[reach, : self.size],
            steps=self._reaches[reach].steps,
        )

    def chunks(self, reach: Reach) -> ChunkSampler:
        """Chunks of the rows stored, of which there may be none yet.

        Asked for at every update, and found once an episode.
        """
        if reach not in self._chunks:
            terminated = self.layout.column(self.rows, "terminated")
            starts = self._starts.to(terminated.device)
            self._chunks = {reach: ChunkSampler(self.rows, self.layout, terminated, starts, reach)}
        return self._chunks[reach]

    def steps_of_recent(self, episodes: int) -> int:
        """Steps of the last so many episodes, fewer if there are fewer."""
        return self.size - int(self._starts[max(0, len(self._starts) - 1 - episodes)])

    def recent_transitions(self, steps: int) -> Batch:
        """The last ``steps`` transitions, fewer if there are fewer."""
        return self.layout.unpack(self.rows[-steps:])

    def recent_hand_overs(self, steps: int) -> list[bool]:
        """Of the same, whether a fallback acted."""
        handed: list[bool] = self._handed_over[: self.size][-steps:].tolist()
        return handed

    def draw_recent(self, steps: int, size: int, generator: torch.Generator) -> Batch:
        """``size`` transitions drawn from the last ``steps``, of those without a fallback if any.

        What the policy itself visits: it would go on as it began, had it not been handed over.
        """
        own = self._own_rows(steps)
        return self.layout.unpack(self.rows[own[draw_indices(len(own), size, generator)]])

    def _own_rows(self, steps: int) -> Tensor:
        """Which of the last ``steps`` rows no fallback acted in, or all if it did in each [n].

        Asked for at every update, and found once an episode.
        """
        if steps not in self._own:
            first = max(0, self.size - steps)
            own = first + (~self._handed_over[first : self.size]).nonzero().squeeze(1)
            every = torch.arange(first, self.size, device=own.device)
            self._own = {steps: own if len(own) else every}
        return self._own[steps]

    def mean_episode_length(self, steps: int) -> float:
        """Mean length of the episodes that begin among the last ``steps`` transitions.

        Of the last episode where none does.
        """
        return _mean_of_recent(self._starts.diff(), self._starts, steps)

    def recent_visits(self, steps: int, *, until_accident: bool) -> Visited:
        """The last ``steps`` transitions, fewer if there are fewer.

        ``until_accident``: those behind the first accident of their episode do not count. Nor do
        those in which a fallback acted, unless it did in all; without it there would be as many.
        """
        # Episodes from the one on that the first of the transitions belongs to.
        first = max(0, self.size - steps)
        starts = self._starts[int(torch.searchsorted(self._starts, first, right=True)) - 1 :]
        begin = int(starts[0])
        accidents = self.layout.unpack(self.rows[begin:]).accidents.cpu()
        episode = torch.repeat_interleave(starts.diff())  # of each row
        # Rows that count, and their number in each episode.
        counted = torch.ones_like(accidents)
        if until_accident:
            before = accidents.cumsum(0) - accidents  # accidents of the rows before
            counted = (before == before[starts[:-1] - begin][episode]).to(counted.dtype)
        counts = counted.new_zeros(len(starts) - 1).index_add_(0, episode, counted)
        counted = counted[first - begin :].to(self._store.device)
        own = torch.zeros_like(counted)
        own[self._own_rows(steps) - first] = 1.0
        return Visited(
            self.recent_transitions(steps), counted * own, _mean_of_recent(counts, starts, steps)
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what was stored; enough to continue bitwise.

        Earlier versions read the first three; the cursor is where a ring would go on.
        """
        handed = self._handed_over[: self.size]
        return {
            "rows": self.rows.clone(),
            "cursor": torch.tensor(self.size % self.capacity),
            "starts": self.start_observations.clone(),
            **({"handed_over": handed.clone()} if handed.any() else {}),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the content by that of :meth:`state_dict`.

        Raises DataError when the rows do not fit this buffer or contradict the cursor.
        """
        rows, cursor = state["rows"], int(state["cursor"])
        fits = rows.ndim == 2 and rows.shape[1] == self.layout.width and len(rows) <= self.capacity
        if not fits or cursor != len(rows) % self.capacity:
            raise DataError(
                f"The saved buffer holds {list(rows.shape)} rows, cursor {cursor}, which does "
                f"not fit a buffer of {self.capacity} x {self.layout.width}. Resume with the "
                "environment and the budget of the original run."
            )
        self._clear()
        self.append(rows, state.get("handed_over"))


def _mean_of_recent(values: Tensor, starts: Tensor, steps: int) -> float:
    """Mean of the ``values`` [M] of episodes that begin among the last ``steps`` rows.

    ``starts`` [M + 1] are their first rows, and N. The last value where none does.
    """
    recent = values[starts[:-1] >= starts[-1] - steps]
    return float(recent.double().mean() if len(recent) else values[-1])
