"""The policy at one observation, without torch's overhead: a numpy forward over shared weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from safe_offrl.distributions import LOG_STD_MAX, LOG_STD_MIN
from safe_offrl.nets import Actor

Vector = NDArray[np.float32]


class NumpyActor:
    """Views of an actor's parameters: when the actor learns, this one acts accordingly."""

    def __init__(self, actor: Actor) -> None:
        linears = [layer for layer in actor.layers if isinstance(layer, nn.Linear)]
        self._weights = [layer.weight.detach().numpy().T for layer in linears]
        self._biases = [layer.bias.detach().numpy() for layer in linears]

    def distribution(self, observation: Vector) -> tuple[Vector, Vector]:
        """Mean and standard deviation before tanh: observation [O] -> [A], [A]."""
        x = observation
        for weight, bias in zip(self._weights[:-1], self._biases[:-1], strict=True):
            x = np.maximum(x @ weight + bias, 0.0)
        mean, raw = np.split(x @ self._weights[-1] + self._biases[-1], 2)
        half_range = 0.5 * (LOG_STD_MAX - LOG_STD_MIN)
        return mean, np.exp(LOG_STD_MIN + half_range * (np.tanh(raw) + 1.0))

    def sample(self, observation: Vector, rng: np.random.Generator) -> Vector:
        """Draw an action [A] in [-1, 1]."""
        mean, std = self.distribution(observation)
        noise = rng.standard_normal(len(mean), dtype=np.float32)
        return np.tanh(mean + std * noise)

    def mean_action(self, observation: Vector) -> Vector:
        """The action at the Gaussian's mean [A]."""
        return np.tanh(self.distribution(observation)[0])
