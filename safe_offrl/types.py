"""The types every layer shares. Shape letters, used in all docstrings:

B batch, N transitions of a dataset, M episodes, O observation size, A action size, E ensemble
members, U update-to-data ratio (UTD), K candidate actions, D columns of a stored transition.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """Aligned transitions: a mini-batch, a whole dataset and the buffer's storage alike.

    ``accidents``, ``terminated`` are 0/1 floats. ``time_to_go`` is the share of the horizon that
    was left BEFORE the action: 1 at the first step, 1/horizon at the last. ``return_to_go`` is the
    discounted sum of rewards from this step to the end of the logged episode (Cal-QL's reference).
    """

    observations: Tensor  # [B, O]
    actions: Tensor  # [B, A], in [-1, 1]
    rewards: Tensor  # [B]
    accidents: Tensor  # [B]
    costs: Tensor  # [B], the environment's own number
    next_observations: Tensor  # [B, O]
    terminated: Tensor  # [B]
    time_to_go: Tensor  # [B]
    return_to_go: Tensor  # [B]


class Layout(NamedTuple):
    """Where each field of a :class:`Batch` stands in one row of contiguous storage [N, D]."""

    observation_size: int
    action_size: int

    @property
    def width(self) -> int:
        """Columns D of a row."""
        return 2 * self.observation_size + self.action_size + 6

    def unpack(self, rows: Tensor) -> Batch:
        """View rows [..., D] as a Batch of [..., O], [..., A] and [...]; copies nothing."""
        o, a = self.observation_size, self.action_size
        scalars = 2 * o + a
        return Batch(
            observations=rows[..., :o],
            actions=rows[..., o : o + a],
            rewards=rows[..., scalars],
            accidents=rows[..., scalars + 1],
            costs=rows[..., scalars + 2],
            next_observations=rows[..., o + a : scalars],
            terminated=rows[..., scalars + 3],
            time_to_go=rows[..., scalars + 4],
            return_to_go=rows[..., scalars + 5],
        )

    def pack(self, batch: Batch) -> Tensor:
        """Copy a Batch into rows [N, D]; the inverse of :meth:`unpack`."""
        scalars = (
            batch.rewards,
            batch.accidents,
            batch.costs,
            batch.terminated,
            batch.time_to_go,
            batch.return_to_go,
        )
        columns = [batch.observations, batch.actions, batch.next_observations]
        return torch.cat(columns + [s.unsqueeze(-1) for s in scalars], dim=-1).contiguous()


class Normalizer(NamedTuple):
    """Standardises observations: (o - mean) / std, with the statistics of the log, each [O]."""

    mean: np.ndarray
    std: np.ndarray

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """Standardise observations [..., O], float32."""
        return (observation - self.mean) / self.std


@dataclass(frozen=True)
class Dataset:
    """Logged episodes in one contiguous float32 store.

    ``rows`` [N, D] holds the transitions, episode after episode; ``episode_starts`` [M + 1] (int64)
    the first row of each episode and, last, N; ``truncated`` [N] (bool) where a time limit cut it.
    ``horizon`` is the number of steps within which an accident counts. ``metadata`` is what the
    file says of itself (environment id, accident rule, behaviours ...); ``sha256`` its identity.
    """

    rows: Tensor
    layout: Layout
    episode_starts: np.ndarray
    truncated: np.ndarray
    horizon: int
    sha256: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def transitions(self) -> Batch:
        """All transitions as views [N, ...]."""
        return self.layout.unpack(self.rows)

    @property
    def episodes(self) -> int:
        """Number of episodes M."""
        return len(self.episode_starts) - 1

    @property
    def initial_observations(self) -> Tensor:
        """First observation of every episode [M, O]: the sample of s0 behind V_accident(s0)."""
        return self.transitions.observations[torch.from_numpy(self.episode_starts[:-1])]

    @property
    def episode_lengths(self) -> np.ndarray:
        """Steps of each episode [M]."""
        return np.diff(self.episode_starts)

    @property
    def episode_accidents(self) -> np.ndarray:
        """Whether each episode held at least one accident [M], bool."""
        accidents = self.transitions.accidents.numpy()
        return np.maximum.reduceat(accidents, self.episode_starts[:-1]) > 0

    @property
    def episode_returns(self) -> np.ndarray:
        """Undiscounted sum of rewards of each episode [M], float64."""
        rewards = self.transitions.rewards.numpy().astype(np.float64)
        return np.add.reduceat(rewards, self.episode_starts[:-1])

    def subset(self, episodes: np.ndarray) -> Dataset:
        """Copy only these episodes (indices into 0..M-1), in the order given."""
        spans = [
            np.arange(self.episode_starts[e], self.episode_starts[e + 1], dtype=np.int64)
            for e in episodes
        ]
        index = np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)
        starts = np.concatenate([[0], np.cumsum([len(s) for s in spans])]).astype(np.int64)
        return Dataset(
            rows=self.rows[torch.from_numpy(index)],
            layout=self.layout,
            episode_starts=starts,
            truncated=self.truncated[index],
            horizon=self.horizon,
            sha256=self.sha256,
            metadata=self.metadata,
        )

    def normalizer(self) -> Normalizer:
        """Mean and standard deviation of the observations; a constant entry keeps its scale."""
        observations = self.transitions.observations.numpy().astype(np.float64)
        std = observations.std(axis=0)
        std[std < 1e-6] = 1.0
        mean = observations.mean(axis=0)
        return Normalizer(mean.astype(np.float32), std.astype(np.float32))

    def normalised(self, normalizer: Normalizer) -> Dataset:
        """A copy with standardised observations; everything else is shared or equal."""
        batch = self.transitions
        rows = self.layout.pack(
            batch._replace(
                observations=torch.from_numpy(normalizer(batch.observations.numpy())),
                next_observations=torch.from_numpy(normalizer(batch.next_observations.numpy())),
            )
        )
        return replace(self, rows=rows)

    def split(self, held_out: float, seed: int) -> tuple[Dataset, Dataset]:
        """Split by whole episodes into (train, held out); the same seed gives the same split."""
        order = np.random.default_rng(seed).permutation(self.episodes)
        n = round(held_out * self.episodes)
        return self.subset(np.sort(order[n:])), self.subset(np.sort(order[:n]))


class Episode(NamedTuple):
    """One complete episode of the environment, as the loops yield it and the ledger records it."""

    index: int  # type: ignore[assignment]  # 0-based within the run
    seed: int  # what the environment was reset with
    steps: int  # environment interactions charged
    total_steps: int  # interactions charged so far, this episode included
    episode_return: float  # undiscounted
    cost: float  # the environment's own cost, summed
    accident: bool  # at least one accident
    accident_steps: int  # steps flagged as accidents
    version: int  # of the deployed policy that acted; 0 is the pretrained policy
    phase: str  # "warmup" or "online"
    shield_interventions: int  # steps whose action the shield replaced


class Record(NamedTuple):
    """Numbers to log: ``step`` is the x axis (interactions charged, or gradient steps offline)."""

    step: int
    values: dict[str, float]


class Constraint(NamedTuple):
    """A measured value and its limit. Strictly below is satisfied, so a NaN is a violation."""

    name: str
    value: float
    limit: float

    @property
    def satisfied(self) -> bool:
        """Whether value < limit."""
        return self.value < self.limit
