"""What adds up along an episode: costs so far, returns and time to go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safe_offrl.spec import COST_SHARE_MAX
from safe_offrl.types import Layout


def times_to_go(starts: NDArray[np.int64], horizon: int) -> NDArray[np.float64]:
    """Share of the horizon left before each step [N]."""
    steps = np.arange(starts[-1]) - np.repeat(starts[:-1], np.diff(starts))
    return np.asarray(1.0 - steps / horizon)


def returns_to_go(
    rewards: NDArray[Any], starts: NDArray[np.int64], discount: float
) -> NDArray[np.float64]:
    """``G_t = r_t + discount * G_{t+1}`` within each episode, 0 after its end: [N] -> [N]."""
    result = rewards.astype(np.float64)
    last, lengths = starts[1:] - 1, np.diff(starts)
    for rows in _lock_step(last, lengths, -1):
        result[rows] += discount * result[rows + 1]
    return result


def fill_returns(rows: Tensor, layout: Layout, discount: float) -> None:
    """The return-to-go of one whole episode's rows [n, D], in place."""
    batch = layout.unpack(rows)
    returns = returns_to_go(batch.rewards.numpy(), np.array([0, len(rows)]), discount)
    batch.return_to_go.copy_(torch.from_numpy(returns))


def costs_so_far(costs: NDArray[Any], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cost of the earlier steps of the same episode [N], 0 at its first."""
    following = cumulate(np.add, costs.astype(np.float64), starts)
    before = np.concatenate([[0.0], following[:-1]])
    before[starts[:-1]] = 0.0
    return before


def share_used(spent: NDArray[np.float64], cost_threshold: float) -> NDArray[np.float32]:
    """``min(cost so far / cost_threshold, 2)`` [N]: the observation that makes a sum Markov.

    Saute RL (arXiv:2202.06558). The same number that the environment appends.
    """
    return np.minimum(spent / cost_threshold, COST_SHARE_MAX).astype(np.float32)


def cumulate(
    ufunc: np.ufunc, values: NDArray[np.float64], starts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Cumulative ``ufunc`` (np.add, np.maximum) within each episode, in the order of its steps."""
    result = values.copy()
    for rows in _lock_step(starts[:-1], np.diff(starts), 1):
        result[rows] = ufunc(result[rows - 1], result[rows])
    return result


def _lock_step(
    first: NDArray[np.int64], lengths: NDArray[np.int64], stride: int
) -> Iterator[NDArray[np.int64]]:
    """Row k of every episode that has one, for k = 1, 2, ...: all episodes advance together."""
    order = np.argsort(-lengths, kind="stable")
    first, lengths = first[order], lengths[order]
    for k in range(1, int(lengths[0])):
        alive = np.searchsorted(-lengths, -k, side="left")  # lengths above k come first
        yield first[:alive] + stride * k
