"""Off-policy estimates where the log says how likely its actions were: reweighed episodes.

``rho_t`` is the product over the steps 0..t of an episode of pi(a | s) / beta(a | s), held at its
last value when the episode is over. Exact for any Q, and of use only while the effective number of
episodes is large: over long episodes one episode soon has all the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

USABLE = 10.0  # effective episodes: with fewer a mean and its bootstrap mean nothing


class Weighted(NamedTuple):
    """Weighted importance sampling and weighted doubly robust estimates of one quantity."""

    wis: float
    wis_error: float  # standard error, bootstrap over episodes
    doubly_robust: float
    doubly_robust_error: float
    episodes: float  # effective number of episodes

    @property
    def usable(self) -> bool:
        """Whether enough episodes have a say."""
        return self.episodes >= USABLE


def by_episode(values: NDArray[np.floating], starts: NDArray[np.int64]) -> Floats:
    """[N] -> [M, T], T the longest episode, 0 after an episode's end."""
    lengths = np.diff(starts)
    table = np.zeros((len(lengths), int(lengths.max())))
    table[np.arange(table.shape[1]) < lengths[:, None]] = values
    return table


def cumulative_ratios(log_ratios: NDArray[np.floating], starts: NDArray[np.int64]) -> Floats:
    """rho_t from log pi / beta of each step: [N] -> [M, T], each column divided by its largest.

    The estimates only use shares of a column, and a product over hundreds of steps overflows.
    """
    logs = np.cumsum(by_episode(log_ratios, starts), axis=1)
    return np.exp(logs - logs.max(axis=0))


def effective_episodes(weights: Floats) -> float:
    """Kish's ``(sum w)^2 / sum w^2``: [M] -> between 1 and M."""
    return float(weights.sum() ** 2 / np.square(weights).sum())


def doubly_robust(
    outcomes: Floats, ratios: Floats, q: Floats, v: Floats, weights: Floats
) -> Floats:
    """Weighted doubly robust estimate (Thomas & Brunskill 2016, arXiv:1604.00923, eq. 10), [R].

    ``sum_t sum_i w_t^i (r_t^i - Q(s_t^i, a_t^i)) + w_{t-1}^i V(s_t^i)`` with
    ``w_t^i = u_i rho_t^i / sum_j u_j rho_t^j`` and rho_{-1} = 1. All tables are [M, T];
    ``weights`` u [R, M] are those of a bootstrap over episodes. With Q = V = 0 this is per-decision
    weighted importance sampling (Precup, Sutton & Singh 2000); with Q it is doubly robust (Jiang &
    Li 2016, arXiv:1511.03722).
    """
    before = np.concatenate([np.ones((len(ratios), 1)), ratios[:, :-1]], axis=1)
    corrections = (weights @ (ratios * (outcomes - q))) / (weights @ ratios)
    values = (weights @ (before * v)) / (weights @ before)
    return np.asarray((corrections + values).sum(axis=1))


def weighted(
    outcomes: NDArray[np.floating],
    log_ratios: NDArray[np.floating],
    q: NDArray[np.floating],
    v: NDArray[np.floating],
    starts: NDArray[np.int64],
    weights: Floats,
) -> Weighted:
    """Both estimates of one quantity from its outcome at each step [N].

    ``weights`` [1 + R, M]: the first row all ones, the others of a bootstrap over episodes.
    """
    table, ratios = by_episode(outcomes, starts), cumulative_ratios(log_ratios, starts)
    nothing = np.zeros_like(table)
    plain = doubly_robust(table, ratios, nothing, nothing, weights)
    robust = doubly_robust(table, ratios, by_episode(q, starts), by_episode(v, starts), weights)
    return Weighted(
        wis=float(plain[0]),
        wis_error=float(plain[1:].std()),
        doubly_robust=float(robust[0]),
        doubly_robust_error=float(robust[1:].std()),
        episodes=effective_episodes(ratios[:, -1]),
    )
