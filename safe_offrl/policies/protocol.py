"""What a policy is to everybody else: distributions over actions, and the kinds there are of them.

A kind is one file beside this one, with everything that sets it apart: what its network gives, its
distribution in torch, how it acts in numpy and in an exported graph, how far apart two of its
policies are. Nobody asks which kind it has; whoever needs more than every kind offers, an entropy
(:func:`require_entropy`) or a probability density (:func:`require_density`), asks for that and
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from safe_offrl.errors import ConfigError

Vector = NDArray[np.float32]
Rows = NDArray[np.float32]
Noise = NDArray[np.floating]


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal noise, on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)


def choosing_noise(shape: Sequence[int], rng: np.random.Generator) -> Noise:
    """Standard normal numbers, but standard Gumbel ones in the last column.

    The largest of log probabilities plus such numbers is a draw by them.
    """
    noise = rng.standard_normal(shape, dtype=np.float32)
    noise[..., -1] = rng.gumbel(size=noise.shape[:-1])
    return noise


class Quadrature(NamedTuple):
    """Actions that stand for a policy at B observations: ``E_pi f = sum_k weight_k f(action_k)``.

    Rows are K blocks of B, row ``k B + b`` being action k at observation b, so that a network takes
    them as they are. ``weights`` None is K = 1, a sample of weight one: then every method returns
    its argument, and an expectation costs nothing.
    """

    actions: Tensor  # [K B, A]
    weights: Tensor | None = None  # [K, B], sum over K is 1

    def repeat(self, values: Tensor) -> Tensor:
        """Values of the observations for each of their actions: [B, ...] -> [K B, ...]."""
        if self.weights is None:
            return values
        return values.repeat(len(self.weights), *[1] * (values.ndim - 1))

    def expect(self, values: Tensor) -> Tensor:
        """E_pi of values of the rows, [..., K B] -> [..., B]; differentiable in the weights too."""
        if self.weights is None:
            return values
        return (values.unflatten(-1, self.weights.shape) * self.weights).sum(-2)

    def spread(self, weights: Tensor) -> Tensor:
        """Weights of observations [B] as weights of rows [K B].

        The mean of ``spread(w) * f`` over rows is the mean of ``w * E_pi f`` over observations.
        """
        if self.weights is None:
            return weights
        return (len(self.weights) * self.weights * weights).flatten()


class ActionDistribution(Protocol):
    """A policy at B observations."""

    def quadrature(self, noise: Tensor) -> Quadrature:
        """Differentiable actions to average over, driven by normal noise [B, *noise_shape]."""

    def act(self, noise: Tensor) -> Tensor:
        """Actions [K, B, A] of noise [K, B, *noise_shape] as ``Kind.draw_noise`` draws it.

        This is what an exported graph does, so nothing here branches on a value.
        """

    def divergence(self, other: Any) -> Tensor:
        """How far this policy is from another of its kind [B]; 0 if they are the same."""


class ScoredPolicy(ActionDistribution, Protocol):
    """A policy that says how random it is."""

    def scored(self, noise: Tensor) -> tuple[Quadrature, Tensor]:
        """The quadrature, and the log density of each of its actions, or of what it is made of.

        [K B]; its mean, negated, is the policy's entropy. Where the quadrature is a sample, noise
        may have further axes in front, and both have them.
        """


class DensityPolicy(ScoredPolicy, Protocol):
    """A policy whose actions have a probability density, or, being discrete, a probability.

    It scores its actions by that.
    """

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log density of given actions, [..., A] -> [...]."""

    def typical(self, actions: Tensor) -> Tensor:
        """Whether given actions are such as the policy takes, [B, A] -> bool [B]."""


class BehaviourModel(Protocol):
    """A model of the log's behaviour at B observations."""

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log density of logged actions, in whatever measure the model has: [B, A] -> [B]."""

    def log_ratio(self, policy: Any, noise: Tensor) -> tuple[Quadrature, Tensor]:
        """A policy's quadrature, and ``log pi - log behaviour`` of each of its actions [K B]."""


class Density(NamedTuple):
    """What a kind has whose distributions are each a :class:`DensityPolicy`.

    ``behaviour`` is made of a network's outputs [B, n] and a number of components,
    ``behaviour_outputs`` says n for action size and components.
    """

    behaviour_outputs: Callable[[int, int], int]
    behaviour: Callable[[Tensor, int], BehaviourModel]


class Kind(NamedTuple):
    """A kind of policy; A is the action size, and what is learnt is all in one network."""

    name: str  # in checkpoints
    one_hot: bool  # whether its actions are one-hot rows, of a discrete space; else in [-1, 1]^A
    exact: bool  # whether its quadrature is the expectation itself, so that noise has no part in it
    divergence_name: str
    divergence_unit: str
    noise_in_words: str  # what draw_noise draws, in the manifest of an exported graph
    mean_in_words: str  # the action that noise of zeros makes, likewise
    noise_shape: Callable[[int], tuple[int, ...]]  # A -> shape of the noise behind one action
    # Observation size, A, widths of hidden layers -> network; its parameters' names are kept.
    network: Callable[[int, int, Sequence[int], torch.Generator], nn.Module]
    distribution: Callable[[nn.Module, Tensor], ActionDistribution]  # at observations [B, O]
    # The network -> observation [O] and noise [K, *noise_shape] -> actions [K, A], in numpy, over
    # the same parameters. NaN where the network is not finite: nobody must take it for an action.
    in_numpy: Callable[[nn.Module], Callable[[Vector, Noise], Rows]]
    draw_noise: Callable[[Sequence[int], np.random.Generator], Noise]  # of this shape
    uniform: Callable[[tuple[int, int], np.random.Generator], Rows]  # random actions [K, A]
    # What the entropy of a kind is to be whose distributions are each a ScoredPolicy, in nats: of
    # A, an entropy per dimension, and a share of the most there can be, whichever fits.
    target_entropy: Callable[[int, float, float], float] | None = None
    density: Density | None = None
    sampled: bool = True  # whether its quadrature, unless exact, is one action drawn from it


def require_entropy(kind: Kind, user: str) -> None:
    """ConfigError in the name of whoever needs it if policies of the kind have no entropy."""
    if kind.target_entropy is None:
        raise ConfigError(
            f"{user} needs to know how random a policy is, but one of the kind "
            f'"{kind.name}" does not say. Take a learner that does without, or another kind.'
        )


def require_density(kind: Kind, user: str) -> Density:
    """What the kind has of a density; if nothing, ConfigError in the name of whoever needs it."""
    if kind.density is None:
        raise ConfigError(
            f"{user} needs the probability density of the policy's actions, but a policy of the "
            f'kind "{kind.name}" has none. Take an agent that does without, or another kind.'
        )
    return kind.density
