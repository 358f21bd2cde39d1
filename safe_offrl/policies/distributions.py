"""Policies over actions: what a network's outputs mean, and how to average over it.

Two forms. A tanh-Gaussian over [-1, 1]^A: an action is ``tanh(mean + exp(log_std) * noise)``, one
independent Gaussian per action dimension. A categorical over A actions, each written as a one-hot
row [A]. Whatever averages over a policy's actions does so through :class:`Quadrature`, and need not
know which of the two it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_STD_MIN = -5.0
LOG_STD_MAX = 2.0


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal noise, on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)


class Quadrature(NamedTuple):
    """Actions that stand for a policy at B observations: ``E_pi f = sum_k weight_k f(action_k)``.

    Rows are K blocks of B, row ``k B + b`` being action k at observation b, so that a network takes
    them as they are. ``weights`` None is K = 1, a sample of weight one: then every method returns
    its argument, and an expectation costs nothing.
    """

    actions: Tensor  # [K B, A]
    log_probs: Tensor  # [K B], of these actions under the policy
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


class Gaussian(NamedTuple):
    """Tanh-Gaussian policies."""

    mean: Tensor  # [..., A], before tanh
    log_std: Tensor  # [..., A]

    def quadrature(self, noise: Tensor) -> Quadrature:
        """One reparameterised action each, driven by standard normal ``noise`` [B, A]."""
        return Quadrature(*sample(self.mean, self.log_std, noise))

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log density of given actions [..., A] -> [...]."""
        return log_prob(*self, actions)

    def kl(self, other: Policy) -> Tensor:
        """KL(self || other) in nats, [...]; closed form."""
        assert isinstance(other, Gaussian)
        return kl(*self, *other)


class Categorical(NamedTuple):
    """Policies over A one-hot actions."""

    log_probs: Tensor  # [..., A], normalised

    def quadrature(self, noise: Tensor | None = None) -> Quadrature:
        """Every action with its probability: exact, so the noise has nothing to do. [B, A] only."""
        b, a = self.log_probs.shape
        every = torch.eye(a, dtype=self.log_probs.dtype, device=self.log_probs.device)
        by_action = self.log_probs.T
        return Quadrature(every.repeat_interleave(b, 0), by_action.flatten(), by_action.exp())

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log probability of given one-hot actions [..., A] -> [...]."""
        return (self.log_probs * actions).sum(-1)

    def kl(self, other: Policy) -> Tensor:
        """KL(self || other) in nats, [...]: ``sum_a p(a) (log p(a) - log q(a))``."""
        assert isinstance(other, Categorical)
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum(-1)


Policy = Gaussian | Categorical


def sample(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Reparameterised action and its log density.

    Shapes: mean, log_std [..., A], noise broadcastable to them -> action [..., A], log_prob [...].
    The log-Jacobian of tanh is ``2 (log 2 - u - softplus(-2u))``, exact where ``log(1 - a^2)``
    underflows (SAC, arXiv:1801.01290, appendix C, in its stable form).
    """
    pre_tanh = mean + log_std.exp() * noise
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
    log_jacobian = 2.0 * (math.log(2.0) - pre_tanh - F.softplus(-2.0 * pre_tanh))
    return torch.tanh(pre_tanh), (gaussian - log_jacobian).sum(-1)


def log_prob(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """Log density of given actions [..., A] -> [...]; |a| is kept below 1 so that atanh is
    finite.
    """
    pre_tanh = torch.atanh(actions.clamp(-1.0 + 1e-5, 1.0 - 1e-5))
    noise = (pre_tanh - mean) / log_std.exp()
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
    log_jacobian = 2.0 * (math.log(2.0) - pre_tanh - F.softplus(-2.0 * pre_tanh))
    return (gaussian - log_jacobian).sum(-1)


def kl(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """KL(p || q) of two tanh-Gaussians in nats, [..., A] -> [...].

    tanh is a bijection, so this equals the KL of the Gaussians before it:
    ``log(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2``, summed over action dimensions.
    """
    variance_ratio = (2.0 * (log_std_p - log_std_q)).exp()
    shift = ((mean_p - mean_q) / log_std_q.exp()).square()
    return (log_std_q - log_std_p + 0.5 * (variance_ratio + shift - 1.0)).sum(-1)
