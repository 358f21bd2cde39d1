"""Mini-batches: pure functions of the stored rows and a ``torch.Generator``.

Batches are on the generator's device. Rows on a GPU never leave it; a memory map is read by the
CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from safe_offrl.data.dataset import Dataset, Rows
from safe_offrl.errors import DataError
from safe_offrl.types import Batch, Layout, signal_column


def symmetric_batches(
    offline_rows: Rows,
    online_rows: Tensor,
    layout: Layout,
    *,
    updates: int,
    batch_size: int,
    offline_share: float,
    generator: torch.Generator,
) -> list[Batch]:
    """Draw U mini-batches [B, ...], each with the same number of offline rows.

    EVERY one of them holds exactly ``round(batch_size * offline_share)`` rows drawn from
    ``offline_rows`` [N, D], which come first, and the rest from ``online_rows`` [n, D]: symmetric
    sampling (Ball et al. 2023, RLPD) per update, so a high update-to-data ratio cannot put all
    offline rows into some of them. Rows are drawn uniformly with replacement.
    """
    if not 0.0 <= offline_share <= 1.0:
        raise ValueError(f"offline_share is {offline_share}, outside [0, 1]")
    n_offline = logged_rows(batch_size, offline_share)
    offline = _draw_rows(offline_rows, updates, n_offline, generator)
    online = _draw_rows(online_rows, updates, batch_size - n_offline, generator)
    return [layout.unpack(rows) for rows in torch.cat([offline, online], dim=1)]


def logged_rows(batch_size: int, offline_share: float) -> int:
    """How many rows of such a batch are logged: its first."""
    return round(batch_size * offline_share)


def uniform_batches(
    rows: Rows, layout: Layout, updates: int, batch_size: int, generator: torch.Generator
) -> list[Batch]:
    """Draw U mini-batches [B, ...] uniformly with replacement from ``rows`` [N, D]."""
    return [layout.unpack(drawn) for drawn in _draw_rows(rows, updates, batch_size, generator)]


def _draw_rows(rows: Rows, updates: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw rows [updates, size, D] with one gather; an empty source is fine if none are asked."""
    if size > 0 and len(rows) == 0:
        raise ValueError("cannot draw from an empty store of rows")
    drawn = _select(rows, draw_indices(max(len(rows), 1), updates * size, generator))
    return drawn.view(updates, size, drawn.shape[1])


def draw_indices(below: int, n: int, generator: torch.Generator) -> Tensor:
    """n integers [n] in [0, below), uniformly, on the generator's device."""
    return torch.randint(below, (n,), generator=generator, device=generator.device)


def _select(rows: Rows, index: Tensor) -> Tensor:
    """Rows [n, D] of an index [n], on its device."""
    if isinstance(rows, Tensor):
        return rows.index_select(0, index)
    return rows[index.cpu()].to(index.device)


class Following(NamedTuple):
    """What was logged in the step after each of a batch."""

    actions: Tensor  # [B, A]
    known: Tensor  # [B], 0 at the end of an episode: there is none, and any action stands for it


class SuccessiveSampler:
    """Transitions of a log, each with the action that was logged after it."""

    def __init__(self, dataset: Dataset, device: torch.device | None = None) -> None:
        self._rows, self._layout = dataset.on(device or torch.device("cpu")).rows, dataset.layout
        self._known = torch.ones(len(self._rows), device=device)
        self._known[torch.from_numpy(dataset.episode_starts[1:] - 1)] = 0.0

    def draw(self, n: int, generator: torch.Generator) -> tuple[Batch, Following]:
        """n transitions uniformly, with replacement."""
        index = draw_indices(len(self._rows), n, generator)
        batch = self._layout.unpack(_select(self._rows, index))
        after = (index + 1).clamp_max(len(self._rows) - 1)
        actions = self._layout.unpack(_select(self._rows, after)).actions
        return batch, Following(actions, self._known[index])


class Reach(NamedTuple):
    """What a transition spans that values are learnt from: steps, discounted.

    ``limited`` is the signal whose costs a safety critic learns, see :class:`Layout`.
    """

    steps: int = 1
    discount: float = 1.0
    limited: str = ""


class RiskSampler:
    """Batches for the safety critic from one source of whole episodes: stratified, n-step."""

    def __init__(
        self,
        rows: Rows,
        layout: Layout,
        stratified: StratifiedSampler,
        costs: Tensor,
        spans: Tensor,
        *,
        steps: int,
    ) -> None:
        """``rows`` [N, D], how they are drawn, and their :func:`n_step_costs` of ``steps``.

        ``costs`` [N, 1 + K]: the cost and the signals behind it.
        """
        self._rows = rows
        self._layout = layout
        self._stratified = stratified
        self._costs, self._spans = costs, spans
        self._steps = steps

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        *,
        steps: int = 1,
        discount: float = 1.0,
        limited: str = "",
        device: torch.device | None = None,
    ) -> RiskSampler:
        """Of a whole dataset, for batches on ``device``, the CPU by default.

        A transition spans ``steps`` steps, fewer where its episode ends before; see :class:`Reach`.
        """
        dataset = dataset.under(limited)
        starts = torch.from_numpy(dataset.episode_starts).to(device)
        names = ("costs", *map(signal_column, dataset.layout.signals))
        columns = torch.stack([dataset.column(name).to(device) for name in names], dim=-1)
        costs = n_step_costs(columns, starts, steps, discount)
        stratified = StratifiedSampler(dataset.column(dataset.layout.event).to(device))
        return cls(dataset.rows, dataset.layout, stratified, *costs, steps=steps)

    def draw(
        self, n: int, positive_share: float, generator: torch.Generator
    ) -> tuple[Batch, Tensor, Tensor]:
        """Transitions [n, ...], their weights [n] (see StratifiedSampler) and spans [n].

        ``costs`` and ``signals`` are the discounted sums of the steps that a transition spans,
        ``next_observations`` and ``terminated`` those of the last.
        """
        index, weights = self._stratified.draw(n, positive_share, generator)
        first = self._layout.unpack(_select(self._rows, index))
        spans = self._spans[index]
        if self._steps == 1:
            return first, weights, spans
        last = self._layout.unpack(_select(self._rows, index + spans.long() - 1))
        costs = self._costs[index]
        joined = first._replace(
            costs=costs[:, 0],
            signals=None if first.signals is None else costs[:, 1:],
            next_observations=last.next_observations,
            terminated=last.terminated,
        )
        return joined, weights, spans


def n_step_costs(
    costs: Tensor, starts: Tensor, steps: int, discount: float
) -> tuple[Tensor, Tensor]:
    """``sum_k<n discount^k c_(t+k)`` of each row [N], and n [N]: ``steps``, or those left of its
    episode.

    ``costs`` of C kinds are [N, C], and so are the sums. ``starts`` [M + 1] are the first rows of
    the episodes, and N.
    """
    spans = _spans(starts, steps)
    sums = costs.clone()
    for k in range(1, min(steps, len(costs))):
        within = (spans[:-k] > k).view(-1, *[1] * (costs.ndim - 1))
        sums[:-k] += torch.where(within, discount**k * costs[k:], 0.0)
    return sums, spans.to(costs.dtype)


def _spans(starts: Tensor, steps: int) -> Tensor:
    """``steps`` of each row [N], or those left of its episode; ``starts`` as in n_step_costs."""
    ends = starts[1:].repeat_interleave(starts.diff())
    return (ends - torch.arange(len(ends), device=ends.device)).clamp_max(steps)


class ChunkSampler:
    """Transitions that span several steps: all of the actions, and what comes of them together.

    A chunk has as many steps as its reach, or ends with an episode that terminates before; zeros
    stand for the actions behind that. A chunk that is cut short otherwise, by a time limit or the
    end of a record, is not drawn: how it would have gone on is not known. Who chose the actions
    does not matter, for it is they that are judged.
    """

    def __init__(
        self, rows: Rows, layout: Layout, terminated: Tensor, starts: Tensor, reach: Reach
    ) -> None:
        """``rows`` [N, D] of whole episodes, ``starts`` [M + 1] their first ones, and N.

        ``terminated`` [N] and ``starts`` lie where batches are to be.
        """
        self.reach = reach
        self._rows, self._layout = rows, layout
        self._spans = _spans(starts, reach.steps)
        last = torch.arange(len(rows), device=starts.device) + self._spans - 1
        whole = (self._spans == reach.steps) | (terminated[last] > 0)
        self._begins = whole.nonzero().squeeze(1)
        self._steps = torch.arange(reach.steps, device=starts.device)
        self._discounts = reach.discount**self._steps

    @classmethod
    def from_dataset(cls, dataset: Dataset, reach: Reach, device: torch.device) -> ChunkSampler:
        """Of a whole dataset, for batches on ``device``; DataError if it has no chunk."""
        terminated = dataset.column("terminated").to(device)
        starts = torch.from_numpy(dataset.episode_starts).to(device)
        sampler = cls(dataset.on(device).rows, dataset.layout, terminated, starts, reach)
        if not len(sampler):
            raise DataError(
                f"No episode of the dataset has {reach.steps} steps, and none ends by itself "
                "before, so there are no plans of that many actions to learn from. Take longer "
                "episodes, or an agent that does not plan."
            )
        return sampler

    def __len__(self) -> int:
        """How many chunks there are; they overlap."""
        return len(self._begins)

    def draw(self, n: int, generator: torch.Generator) -> Batch:
        """n chunks, uniformly with replacement, of h steps and A action numbers each.

        ``actions`` [n, h A], ``rewards`` [n] are the discounted sum, ``next_observations`` and
        ``terminated`` those of the last step; all else is that of the first.
        """
        index = self._begins[draw_indices(len(self), n, generator)]
        spans = self._spans[index].unsqueeze(1)
        within = self._steps < spans  # [n, h]
        # Behind its end a chunk's last row stands again, so that the last of h is its last.
        each = index.unsqueeze(1) + torch.minimum(self._steps, spans - 1)
        rows = _select(self._rows, each.flatten()).unflatten(0, each.shape)
        steps = self._layout.unpack(rows)
        return self._layout.unpack(rows[:, 0])._replace(
            actions=(steps.actions * within.unsqueeze(-1)).flatten(1),
            rewards=(steps.rewards * within * self._discounts).sum(1),
            next_observations=steps.next_observations[:, -1],
            terminated=steps.terminated[:, -1],
        )


class StratifiedSampler:
    """Draws accidents more often than they occur, and says by how much to weigh each draw.

    A draw takes a random accident with probability ``share`` and a random transition otherwise:
    ``q(i) = (1 - share) / N + share * 1[i is an accident] / N_accidents``. With the weights
    ``(1/N) / q(i)`` a weighted mean estimates the plain mean over all N transitions without bias,
    so the prior of an accident is not distorted. Draws are independent: any grouping of them into
    mini-batches is valid. Without accidents the draw is uniform and every weight 1.
    """

    def __init__(self, accidents: Tensor, positives: Tensor | None = None) -> None:
        """``accidents`` [N], 0 or 1; whoever knows where they are 1 gives ``positives`` as well."""
        if accidents.ndim != 1 or len(accidents) == 0:
            raise ValueError(f"accidents are {list(accidents.shape)}, expected [N] with N > 0")
        self._accidents = accidents
        found = (accidents > 0).nonzero().squeeze(1) if positives is None else positives
        self._positives = found

    def draw(
        self, n: int, positive_share: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw n transitions: (index [n] int64, weights [n] float32, 1 on average).

        ``positive_share`` in [0, 1) is the share drawn among the accidents alone; at 1 the other
        transitions would never be seen and no weight could correct that.
        """
        if not 0.0 <= positive_share < 1.0:
            raise ValueError(f"positive_share is {positive_share}, outside [0, 1)")
        total, positives = len(self._accidents), len(self._positives)
        device = generator.device
        index = draw_indices(total, n, generator)
        if positives == 0 or positive_share == 0.0:
            return index, torch.ones(n, device=device)
        from_positives = self._positives[draw_indices(positives, n, generator)]
        take = torch.rand(n, generator=generator, device=device) < positive_share
        index = torch.where(take, from_positives, index)
        ratio = torch.where(self._accidents[index] > 0, positive_share * total / positives, 0.0)
        return index, 1.0 / (1.0 - positive_share + ratio)
