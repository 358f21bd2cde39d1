"""Logged episodes: rows of transitions, in memory or mapped, and what they say as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from safe_offrl.data.content import MAX_DATASET_BYTES, chunks
from safe_offrl.data.offsets import offset_of
from safe_offrl.errors import DataError
from safe_offrl.limits import Limit
from safe_offrl.types import Batch, Layout, Normalizer, signal_column

# Temperatures, conservatism and learning rates are chosen for rewards of the size that they have in
# the default log of PointHazard-v0: the root mean square of its discounted returns to go.
TUNED_RETURN_SIZE = 0.82638733
FLOAT32_EPS = float(np.finfo(np.float32).eps)  # a spread below this share of the size is no spread
FLOAT32_SMALLEST = float(np.finfo(np.float32).tiny)  # below it float32 loses digits one by one


class StoredRows(Protocol):
    """Transitions [N, D] that lie outside of memory: drawn by index, never copied as a whole."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Rows [B, D] of an index [B]."""
        ...

    def column(self, name: str) -> Tensor:
        """One of the layout's scalars for all rows [N]."""
        ...

    def subset(self, episodes: np.ndarray) -> StoredRows:
        """Only these episodes, in this order; copies no rows."""
        ...

    def normalised(self, normalizer: Normalizer) -> StoredRows:
        """With observations standardised as they are drawn; copies no rows."""
        ...


Rows = Tensor | StoredRows


@dataclass(frozen=True)
class Dataset:
    """Logged episodes in one contiguous float32 store, in memory or mapped into it.

    ``rows`` [N, D] holds the transitions, episode after episode; ``episode_starts`` [M + 1] (int64)
    the first row of each episode and, last, N; ``truncated`` [N] (bool) where a time limit cut it.
    ``horizon`` is the number of steps within which an accident counts. ``metadata`` is what the
    file says of itself (environment id, accident rule, behaviours ...); ``sha256`` its identity.
    ``episode_behaviours`` [M] (int) is who logged each episode, an index into
    ``metadata["behaviours"]``; None if the file does not say. ``behaviour_log_probs`` [N] is the
    log density (or probability) of each logged action under whoever chose it, None if unknown.
    ``remarks``: a sentence each on what of the file was not used, guessed or repaired.
    """

    rows: Rows
    layout: Layout
    episode_starts: np.ndarray
    truncated: np.ndarray
    horizon: int
    sha256: str
    metadata: dict[str, Any] = field(default_factory=dict)
    episode_behaviours: np.ndarray | None = None
    behaviour_log_probs: np.ndarray | None = None
    remarks: tuple[str, ...] = ()

    def under(self, limit: Limit | str) -> Dataset:
        """The same rows as this limit (of this signal) sees them: its costs are the costs."""
        limited = limit if isinstance(limit, str) else limit.quantity.signal
        return replace(self, layout=self.layout._replace(limited=limited))

    @property
    def transitions(self) -> Batch:
        """All transitions [N, ...]: views, or a copy in memory of a memory-mapped set."""
        if isinstance(self.rows, Tensor):
            return self.layout.unpack(self.rows)
        size = len(self.rows) * self.layout.width * 4
        if size > MAX_DATASET_BYTES:
            raise DataError(
                f"The dataset would take {size / 2**30:.0f} GiB in memory, more than the limit of "
                f"{MAX_DATASET_BYTES / 2**30:.0f} GiB. Work on a part of its episodes."
            )
        return self.layout.unpack(self.rows[torch.arange(len(self.rows))])

    def on(self, device: torch.device) -> Dataset:
        """With its rows there; a memory map stays where it is. On a GPU only to draw from."""
        rows = self.rows.to(device) if isinstance(self.rows, Tensor) else self.rows
        return replace(self, rows=rows)

    def column(self, name: str) -> Tensor:
        """One of the layout's scalars for all transitions [N], without reading the others."""
        if isinstance(self.rows, Tensor):
            return self.layout.column(self.rows, name)
        return self.rows.column(self.layout.stored(name))

    @property
    def discrete(self) -> bool:
        """Whether actions are one-hot rows: the metadata then says how many, "action_count"."""
        return self.metadata.get("action_count") is not None

    @property
    def episodes(self) -> int:
        """Number of episodes M."""
        return len(self.episode_starts) - 1

    @property
    def initial_observations(self) -> Tensor:
        """First observation of every episode [M, O]: the sample of s0 behind V_accident(s0)."""
        first = torch.from_numpy(self.episode_starts[:-1])
        return self.layout.unpack(self.rows[first]).observations

    @property
    def episode_lengths(self) -> np.ndarray:
        """Steps of each episode [M]."""
        return np.diff(self.episode_starts)

    @property
    def episode_accidents(self) -> np.ndarray:
        """Whether each episode held at least one accident [M], bool."""
        accidents = self.column("accidents").numpy()
        return np.maximum.reduceat(accidents, self.episode_starts[:-1]) > 0

    @property
    def dangers(self) -> np.ndarray:
        """What a safety critic is judged by, [N] bool: steps with an accident.

        Under a limit of a signal, which may cost a little in every step, those dearer than the
        mean.
        """
        values = self.column(self.layout.event).numpy()
        return values > (values.mean(dtype=np.float64) if self.layout.limited else 0.0)

    @property
    def dangerous_episodes(self) -> np.ndarray:
        """Whether each episode held such a step [M], bool."""
        return np.logical_or.reduceat(self.dangers, self.episode_starts[:-1])

    @property
    def episode_returns(self) -> np.ndarray:
        """Undiscounted sum of rewards of each episode [M], float64."""
        return self._episode_sums("rewards")

    @property
    def episode_costs(self) -> np.ndarray:
        """Undiscounted sum of costs of each episode [M], float64."""
        return self._episode_sums("costs")

    @property
    def signal_costs(self) -> dict[str, np.ndarray]:
        """Undiscounted sum of each named cost signal of each episode, {name: [M]}, float64."""
        return {name: self._episode_sums(signal_column(name)) for name in self.layout.signals}

    def _episode_sums(self, column: str) -> np.ndarray:
        values = self.column(column).numpy().astype(np.float64)
        return np.add.reduceat(values, self.episode_starts[:-1])

    @property
    def cost_max(self) -> float:
        """Largest cost of a step: the unit of costs; 1 if none is above 0."""
        return self._largest("costs")

    @property
    def signals_max(self) -> dict[str, float]:
        """The same of each named cost signal, by its name."""
        return {name: self._largest(signal_column(name)) for name in self.layout.signals}

    def _largest(self, column: str) -> float:
        largest = float(self.column(column).max())
        return largest if largest > 0.0 else 1.0

    @property
    def worst_cost(self) -> float:
        """The most that an episode of the horizon can cost, as far as the log tells; 1 if nothing.

        Every step as dear as the dearest that did not end its episode, and the last one as dear as
        the dearest of all. An environment may hold dearer ones.
        """
        most = self._most("costs")
        return most if most > 0.0 else 1.0

    @property
    def worst_signals(self) -> dict[str, float]:
        """The same of each named cost signal, by its name; 0 of one that never costs anything."""
        return {name: self._most(signal_column(name)) for name in self.layout.signals}

    @property
    def return_range(self) -> tuple[float, float]:
        """The least and the most that an episode can return, undiscounted, as far as the log tells.

        Found as :attr:`worst_cost` is; an environment may hold other rewards.
        """
        return 0.0 - self._most("rewards", -1.0), self._most("rewards")  # 0, not -0

    def _most(self, name: str, sign: float = 1.0) -> float:
        """The largest sum, times ``sign``, of this column over 1 to ``horizon`` steps."""
        values, ended = sign * self.column(name), self.column("terminated") > 0
        lasting = max(0.0, float(values.masked_fill(ended, 0.0).max()))
        return (self.horizon - 1) * lasting + float(values.max())

    def subset(self, episodes: np.ndarray) -> Dataset:
        """Only these episodes (indices into 0..M-1), in the order given; a map stays a map."""
        spans = [slice(self.episode_starts[e], self.episode_starts[e + 1]) for e in episodes]
        starts = np.concatenate([[0], np.cumsum([s.stop - s.start for s in spans])])
        if isinstance(self.rows, Tensor):
            index = [np.arange(s.start, s.stop, dtype=np.int64) for s in spans]
            rows: Rows = self.rows[
                torch.from_numpy(np.concatenate([np.empty(0, np.int64), *index]))
            ]
        else:
            rows = self.rows.subset(np.asarray(episodes))
        return replace(
            self,
            rows=rows,
            episode_starts=starts.astype(np.int64),
            truncated=np.concatenate([np.empty(0, bool), *(self.truncated[s] for s in spans)]),
            episode_behaviours=None
            if self.episode_behaviours is None
            else self.episode_behaviours[np.asarray(episodes, dtype=np.int64)],
            behaviour_log_probs=None
            if self.behaviour_log_probs is None
            else np.concatenate(
                [np.empty(0, np.float32), *(self.behaviour_log_probs[s] for s in spans)]
            ),
        )

    def sample(self, transitions: int, seed: int) -> Dataset:
        """Whole episodes drawn at random, ``transitions`` steps or a little more; or all of it."""
        if len(self.rows) <= transitions:
            return self
        order = np.random.default_rng(seed).permutation(self.episodes)
        n = int(np.searchsorted(np.cumsum(self.episode_lengths[order]), transitions)) + 1
        return self.subset(np.sort(order[:n]))

    def normalizer(self) -> Normalizer:
        """Mean and standard deviation of the observations, and the scale of the rewards.

        A constant entry, one that varies by rounding errors at most, is divided by its size.
        """
        n = len(self.rows)
        size = np.zeros(self.layout.observation_size)

        def measured() -> Iterator[np.ndarray]:
            for x in self._observations():
                np.maximum(size, np.abs(x).max(axis=0), out=size)
                yield x

        mean = _total(measured()) / n
        std = np.sqrt(_total(np.square(x - mean) for x in self._observations()) / n)
        least = np.maximum(FLOAT32_EPS * size, FLOAT32_SMALLEST)
        std = np.where(std > least, std, np.where(size > FLOAT32_SMALLEST, size, 1.0))
        return Normalizer(
            mean.astype(np.float32),
            std.astype(np.float32),
            self.reward_scale(),
            offset_of(self.metadata),
        )

    def reward_scale(self) -> float:
        """What rewards are multiplied by to be of the size that learning is tuned to, a float32.

        REWARD_REFERENCE over the root mean square of the discounted returns to go, which the
        critics learn: sparse rewards count by what they are worth on the way. 1 without rewards.
        DataError where float32 cannot hold them.
        """
        returns = self.column("return_to_go").numpy().astype(np.float64)
        size = math.sqrt(np.square(returns).mean())
        if size == 0.0:
            return 1.0
        with np.errstate(over="ignore"):
            scale = float(np.float32(TUNED_RETURN_SIZE / size))
        if not 0.0 < scale < math.inf:
            raise DataError(
                f"The dataset's discounted returns are of the size {size:.3g}, beyond float32. "
                "Store the rewards in another unit."
            )
        return scale

    def normalised(self, normalizer: Normalizer) -> Dataset:
        """With standardised observations and scaled rewards: a copy, or of a map another view."""
        if not isinstance(self.rows, Tensor):
            return replace(self, rows=self.rows.normalised(normalizer))
        batch = self.transitions
        rows = self.layout.pack(
            batch._replace(
                observations=torch.from_numpy(normalizer(batch.observations.numpy())),
                next_observations=torch.from_numpy(normalizer(batch.next_observations.numpy())),
                rewards=batch.rewards * normalizer.reward_scale,
                return_to_go=batch.return_to_go * normalizer.reward_scale,
            )
        )
        return replace(self, rows=rows)

    def _observations(self) -> Iterator[np.ndarray]:
        """Observations of all transitions in order, float64 [n, O] each; whole if in memory."""
        if isinstance(self.rows, Tensor):
            yield self.transitions.observations.numpy().astype(np.float64)
            return
        for part in chunks(len(self.rows)):
            rows = self.layout.unpack(self.rows[torch.arange(part.start, part.stop)])
            yield rows.observations.numpy().astype(np.float64)

    def split(self, held_out: float, seed: int) -> tuple[Dataset, Dataset]:
        """Split by whole episodes into (train, held out), at least one in each if there are two.

        The same seed gives the same split.
        """
        order = np.random.default_rng(seed).permutation(self.episodes)
        n = min(max(1, round(held_out * self.episodes)), self.episodes - 1)
        return self.subset(np.sort(order[n:])), self.subset(np.sort(order[:n]))


def _total(chunks: Iterator[np.ndarray]) -> np.ndarray:
    """Sum over the first axis of chunks [n, O], in the order of the rows however they are cut."""
    total = next(chunks).sum(axis=0)
    for chunk in chunks:
        total = np.concatenate([total[None], chunk]).sum(axis=0)
    return total
