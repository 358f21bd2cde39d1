"""Policy and risk at one observation, without torch's overhead: numpy over shared weights."""

from __future__ import annotations

import copy
from typing import Protocol

import numpy as np
from scipy import special

from safe_offrl.policies.mlp import normalise
from safe_offrl.policies.networks import Actor, StackedLinear, StackedMLP
from safe_offrl.policies.protocol import Kind, Noise, Rows, Vector


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

    def __init__(self, kind: Kind, action_size: int) -> None:
        self.kind = kind
        self.action_size = action_size

    def draw(self, observation: Vector, count: int, rng: np.random.Generator) -> Rows:
        """Independent actions, [count, A]."""
        return self.kind.uniform((count, self.action_size), rng)

    def mean_action(self, observation: Vector) -> Vector:
        """The middle of the box, or of the probabilities of discrete actions [A]."""
        return np.full(self.action_size, self.kind.one_hot / self.action_size, dtype=np.float32)


class NumpyActor:
    """Views of an actor's parameters: when the actor learns, this one acts accordingly.

    Of an actor on a GPU it has copies.
    """

    def __init__(self, actor: Actor) -> None:
        self.noise_shape = actor.noise_shape
        self._draw_noise = actor.kind.draw_noise
        self._act = actor.kind.in_numpy(actor.layers)
        self._no_noise = np.zeros((1, *self.noise_shape), dtype=np.float32)

    def noise(self, count: int, rng: np.random.Generator) -> Noise:
        """What :meth:`draw` makes ``count`` actions of, [count, *noise_shape]."""
        return self._draw_noise((count, *self.noise_shape), rng)

    def draw(self, observation: Vector, count: int, rng: np.random.Generator) -> Rows:
        """Independent actions of the policy, [count, A]."""
        return self._act(observation, self.noise(count, rng))

    def mean_action(self, observation: Vector) -> Vector:
        """The action of no noise: at a Gaussian's mean, or the most probable of discrete ones."""
        return self._act(observation, self._no_noise)[0]


class NumpyRisk:
    """Views of a safety critic's parameters, which are in the computer's memory.

    As :class:`safe_offrl.policies.networks.StackedMLP` with a LayerNorm before every ReLU.
    """

    def __init__(self, net: StackedMLP) -> None:
        self._net = net
        layers = [layer for layer in net.hidden if isinstance(layer, StackedLinear)]
        self._layers = [
            (layer.weight.detach().numpy(), layer.bias.detach().numpy())
            for layer in (*layers, net.output)
        ]

    def __deepcopy__(self, memo: dict[int, object]) -> NumpyRisk:
        """Views of the copied network, not copies of views."""
        return NumpyRisk(copy.deepcopy(self._net, memo))

    def __call__(self, observation: Vector, time_to_go: float, actions: Rows) -> Vector:
        """Mean over the members of Q_C at one observation [O], of actions [K, A] -> [K]."""
        (weight, bias), *rest = self._layers
        size = len(observation) + 1
        # What the first layer makes of the state is the same for all actions.
        state = np.empty(size, dtype=np.float32)
        state[:-1], state[-1] = observation, time_to_go
        # An action a product, [K, E, 1, ...]: of so few rows BLAS takes twice as long for all.
        x = actions[:, None, None] @ weight[:, size:]
        x += (state @ weight[:, :size] + bias[:, 0])[:, None]
        for weight, bias in rest:
            normalise(x)
            x = np.maximum(x, 0.0, out=x) @ weight
            x += bias
        risk: Vector = np.add.reduce(special.expit(x[..., 0, 0]), 1)
        risk /= np.float32(len(bias))
        return risk
