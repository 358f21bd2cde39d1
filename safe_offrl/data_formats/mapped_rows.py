"""Rows of a memory-mapped dataset: drawn by index, standardised and scaled as they are drawn."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor

from safe_offrl.types import Layout, Normalizer


class MappedRows:
    """The rows [N, D] of some episodes of a map; implements StoredRows of data/dataset.py.

    ``tables`` [R, 2 O + A] and ``scalars`` [R, 6 + K (+ 2)] are mapped files. The scalars begin
    with the layout's; the other two, if any, are appended to the observation and to the next
    observation. ``starts`` [m + 1] are the first rows of the map's episodes and R.
    """

    def __init__(self, tables: Tensor, scalars: Tensor, layout: Layout, starts: np.ndarray) -> None:
        self._tables = tables
        self._scalars = scalars
        self._layout = layout
        self._names = layout.scalars
        self._first = torch.from_numpy(starts[:-1])  # row in the files of each episode of ours
        self._starts = torch.from_numpy(starts)  # the same in our own count, and N
        self._whole = True
        self._mean: Tensor | None = None
        self._std: Tensor | None = None
        self._scale = torch.ones(len(self._names))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Tensor) -> Tensor:
        """Rows [B, D] of an index [B]."""
        at = self._position(index)
        tables, scalars = self._tables.index_select(0, at), self._scalars.index_select(0, at)
        scalars, shares = scalars[:, : len(self._names)], scalars[:, len(self._names) :]
        # Of the shares there are 0 or 2.
        o, a = self._layout.observation_size - shares.shape[1] // 2, self._layout.action_size
        observations, following = tables[:, :o], tables[:, o + a :]
        if shares.shape[1]:
            observations = torch.cat([observations, shares[:, :1]], dim=1)
            following = torch.cat([following, shares[:, 1:]], dim=1)
        if self._mean is not None and self._std is not None:
            observations = (observations - self._mean) / self._std
            following = (following - self._mean) / self._std
        actions = tables[:, o : o + a].clamp(-1.0, 1.0)  # the tolerance of the validation
        return Layout.join(observations, actions, following, scalars * self._scale)

    def column(self, name: str) -> Tensor:
        """One of the layout's scalars for all rows [N]; a view if these are all rows of the map."""
        at = self._names.index(name)
        column = self._scalars[:, at]
        if self._scale[at] != 1.0:
            column = column * self._scale[at]
        if self._whole:
            return column
        lengths = self._starts.diff()
        spans = zip(self._first.tolist(), lengths.tolist(), strict=True)
        return torch.cat([column[first : first + n] for first, n in spans] or [column[:0]])

    def subset(self, episodes: np.ndarray) -> MappedRows:
        """Only these episodes, in this order, as two numbers each."""
        chosen = torch.from_numpy(episodes.astype(np.int64))
        result = copy.copy(self)
        result._first = self._first[chosen]
        zero = torch.zeros(1, dtype=torch.int64)
        result._starts = torch.cat([zero, self._starts.diff()[chosen].cumsum(0)])
        result._whole = False
        return result

    def normalised(self, normalizer: Normalizer) -> MappedRows:
        """With observations standardised and rewards scaled as they are drawn."""
        result = copy.copy(self)
        result._mean = torch.from_numpy(normalizer.mean)
        result._std = torch.from_numpy(normalizer.std)
        in_rewards = torch.tensor([name in ("rewards", "return_to_go") for name in self._names])
        result._scale = torch.where(in_rewards, normalizer.reward_scale, 1.0)
        return result

    def _position(self, index: Tensor) -> Tensor:
        """Rows in the files [B]."""
        if self._whole:
            return index
        episode = torch.searchsorted(self._starts, index, right=True) - 1
        return self._first[episode] + index - self._starts[episode]
