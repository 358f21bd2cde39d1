"""Categorical policies over A actions, each written as a one-hot row [A]; every expectation over
one is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from safe_offrl.policies.mlp import NumpyMLP, linear_layers
from safe_offrl.policies.protocol import Density, Kind, Noise, Quadrature, Rows, Vector

UNLIKELY = 0.05  # probability below which an action is not one of the policy's


class Categorical(NamedTuple):
    """A choice among A actions at each observation; of the log's behaviour, its model as well."""

    log_probs: Tensor  # [..., A], normalised

    def act(self, noise: Tensor) -> Tensor:
        """One-hot rows [..., A] of standard Gumbel noise [..., A].

        The largest of log probabilities plus Gumbel noise is a draw from them.
        """
        one_hot = torch.eye(self.log_probs.shape[-1], device=self.log_probs.device)
        return one_hot[(self.log_probs + noise).argmax(-1)]

    def quadrature(self, noise: Tensor | None = None) -> Quadrature:
        """Every action with its probability: exact, so the noise has nothing to do. [B, A] only."""
        return self.scored(noise)[0]

    def scored(self, noise: Tensor | None = None) -> tuple[Quadrature, Tensor]:
        """Every action with its probability, and the log of it [A B]."""
        b, a = self.log_probs.shape
        every = torch.eye(a, dtype=self.log_probs.dtype, device=self.log_probs.device)
        by_action = self.log_probs.T
        return Quadrature(every.repeat_interleave(b, 0), by_action.exp()), by_action.flatten()

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log probability of given one-hot actions [..., A] -> [...]."""
        return (self.log_probs * actions).sum(-1)

    def typical(self, actions: Tensor) -> Tensor:
        """Of a probability of 5 % at least."""
        return (self.log_probs.exp() * actions).sum(-1) >= UNLIKELY

    def divergence(self, other: Categorical) -> Tensor:
        """KL(self || other), [...]: ``sum_a p(a) (log p(a) - log q(a))``."""
        assert isinstance(other, Categorical)
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum(-1)

    def log_ratio(self, policy: Categorical, noise: Tensor) -> tuple[Quadrature, Tensor]:
        """Every action with a policy's probability, and ``log pi - log p`` of each, p this one."""
        every, log_probs = policy.scored(noise)
        return every, log_probs - self.log_probs.T.flatten()


def _from_outputs(logits: Tensor) -> Categorical:
    return Categorical(torch.log_softmax(logits, dim=-1))


def _one_hot(chosen: NDArray[np.integer], actions: int) -> Rows:
    return np.eye(actions, dtype=np.float32)[chosen]


def _in_numpy(network: nn.Module) -> Callable[[Vector, Noise], Rows]:
    net = NumpyMLP(network)

    def act(observation: Vector, noise: Noise) -> Rows:
        scores = net(observation) + noise
        rows = _one_hot(scores.argmax(axis=1), scores.shape[1])
        rows[~np.isfinite(scores).all(axis=1)] = np.nan
        return rows

    return act


CATEGORICAL = Kind(
    name="categorical",
    one_hot=True,
    exact=True,
    divergence_name="KL",
    divergence_unit="nats",
    noise_in_words="standard Gumbel draws, -log(-log(u))",
    mean_in_words="the most probable action",
    noise_shape=lambda a: (a,),
    network=lambda o, a, hidden, generator: linear_layers(o, (*hidden, a), generator),
    distribution=lambda network, observations: _from_outputs(network(observations)),
    in_numpy=_in_numpy,
    draw_noise=lambda shape, rng: rng.gumbel(size=shape),
    uniform=lambda shape, rng: np.eye(shape[1], dtype=np.float32)[
        rng.integers(shape[1], size=shape[0])
    ],
    target_entropy=lambda a, per_dimension, share: share * math.log(a),
    density=Density(
        behaviour_outputs=lambda a, components: a,
        behaviour=lambda outputs, components: _from_outputs(outputs),
    ),
)
