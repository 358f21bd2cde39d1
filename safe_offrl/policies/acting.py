"""The policy at one observation, without torch's overhead: a numpy forward over shared weights."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from safe_offrl.policies.distributions import LOG_STD_MAX, LOG_STD_MIN
from safe_offrl.policies.networks import Actor

Vector = NDArray[np.float32]
Rows = NDArray[np.float32]


class Sampler(Protocol):
    """What the shield needs of whoever acts."""

    def draw(self, observation: Vector, count: int, rng: np.random.Generator) -> Rows:
        """Independent actions of the policy, [count, A]."""
        ...

    def mean_action(self, observation: Vector) -> Vector:
        """The action [A] at the centre of the distribution."""
        ...


class UniformActor:
    """Uniformly random actions, for baselines that begin with them."""

    def __init__(self, action_size: int, *, discrete: bool) -> None:
        self.action_size = action_size
        self.discrete = discrete

    def draw(self, observation: Vector, count: int, rng: np.random.Generator) -> Rows:
        """Independent actions, [count, A]."""
        if self.discrete:
            return np.eye(self.action_size, dtype=np.float32)[
                rng.integers(self.action_size, size=count)
            ]
        return rng.uniform(-1.0, 1.0, (count, self.action_size)).astype(np.float32)

    def mean_action(self, observation: Vector) -> Vector:
        """The middle of the box, or the first of the discrete actions [A]."""
        if self.discrete:
            return np.eye(self.action_size, dtype=np.float32)[0]
        return np.zeros(self.action_size, dtype=np.float32)


class NumpyActor:
    """Views of an actor's parameters: when the actor learns, this one acts accordingly.

    Of an actor on a GPU it has copies.

    An action is a vector [A] in [-1, 1], or a one-hot row [A] where actions are discrete; all NaN
    if the network's output for a discrete choice is not finite, so that nobody takes it for one.
    """

    def __init__(self, actor: Actor) -> None:
        linears = [layer for layer in actor.layers if isinstance(layer, nn.Linear)]
        self.discrete = actor.discrete
        self._weights = [layer.weight.detach().cpu().numpy().T for layer in linears]
        self._biases = [layer.bias.detach().cpu().numpy() for layer in linears]

    def _outputs(self, observation: Vector) -> Vector:
        x = observation
        for weight, bias in zip(self._weights[:-1], self._biases[:-1], strict=True):
            x = np.maximum(x @ weight + bias, 0.0)
        return x @ self._weights[-1] + self._biases[-1]

    def distribution(self, observation: Vector) -> tuple[Vector, Vector]:
        """Mean and standard deviation before tanh: observation [O] -> [A], [A]."""
        mean, raw = np.split(self._outputs(observation), 2)
        half_range = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)
        return mean, np.exp(LOG_STD_MIN + half_range * (np.tanh(raw) + 1.0))

    def noise(self, count: int, rng: np.random.Generator) -> NDArray[np.floating]:
        """What actions are made of [count, A]: normal draws; discrete: Gumbel ones."""
        outputs = len(self._biases[-1])
        if self.discrete:
            return rng.gumbel(size=(count, outputs))
        return rng.standard_normal((count, outputs // 2), dtype=np.float32)

    def draw(self, observation: Vector, count: int, rng: np.random.Generator) -> Rows:
        """Independent actions of the policy, [count, A].

        Discrete: the largest of logits plus Gumbel noise is a draw from their softmax.
        """
        if self.discrete:
            return _one_hot_rows(self._outputs(observation) + self.noise(count, rng))
        mean, std = self.distribution(observation)
        return np.tanh(mean + std * self.noise(count, rng))

    def mean_action(self, observation: Vector) -> Vector:
        """The action at the Gaussian's mean, or the most probable of discrete ones [A]."""
        if self.discrete:
            return _one_hot_rows(self._outputs(observation)[None])[0]
        return np.tanh(self.distribution(observation)[0])


def _one_hot_rows(scores: NDArray[np.floating]) -> Rows:
    """The best action of each row of scores [n, A], one-hot; NaN where a score is not finite."""
    rows = np.eye(scores.shape[1], dtype=np.float32)[scores.argmax(axis=1)]
    rows[~np.isfinite(scores).all(axis=1)] = np.nan
    return rows
