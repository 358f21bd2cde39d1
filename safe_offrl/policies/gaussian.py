"""Tanh-Gaussian policies over [-1, 1]^A: ``tanh(mean + exp(log_std) * noise)``, one independent
Gaussian per action dimension.

The squash, its log-Jacobian and the Gaussian log density are written here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor, nn
from torch.nn import functional as F

from safe_offrl.policies.mlp import NumpyMLP, linear_layers
from safe_offrl.policies.protocol import Density, Kind, Noise, Quadrature, Rows, Vector

LOG_STD_MIN = -5.0
LOG_STD_MAX = 2.0
EDGE = 1e-5  # |a| is kept this far below 1, so that it has a finite pre-image
LOGGED_EDGE = 1e-3  # the same where a model is fitted to logged actions, many of which saturate
LIKELY = 0.95  # of a policy's actions: those that are typical of it

Numbers = TypeVar("Numbers", Tensor, NDArray[np.float32])


def log_std_of(unit: Numbers) -> Numbers:
    """[-1, 1] -> [-5, 2], for tanh of a network's output: no gradient dies at a clip."""
    return LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (unit + 1.0)


def raw_log_std(log_std: float) -> float:
    """The network's output that becomes this one, strictly between -5 and 2."""
    return math.atanh(2.0 * (log_std - LOG_STD_MIN) / (LOG_STD_MAX - LOG_STD_MIN) - 1.0)


def log_density(noise: Tensor, log_std: Tensor) -> Tensor:
    """Log density before tanh, dimension by dimension, of ``mean + exp(log_std) noise``."""
    return -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)


def log_jacobian(before: Tensor) -> Tensor:
    """``log tanh'(u)``, dimension by dimension: ``2 (log 2 - u - softplus(-2u))``.

    Exact where ``log(1 - a^2)`` underflows (SAC, arXiv:1801.01290, appendix C, in its stable form).
    """
    return 2.0 * (math.log(2.0) - before - F.softplus(-2.0 * before))


def before_tanh(actions: Tensor, edge: float) -> Tensor:
    """The inverse of the squash, of actions kept ``edge`` below 1."""
    return torch.atanh(actions.clamp(-1.0 + edge, 1.0 - edge))


class Gaussian(NamedTuple):
    """A tanh-Gaussian at each observation."""

    mean: Tensor  # [..., A], before tanh
    log_std: Tensor  # [..., A]

    def unsquashed(self, noise: Tensor) -> Tensor:
        """Before tanh, of standard normal noise [..., A]."""
        return self.mean + self.log_std.exp() * noise

    def noise_of(self, before: Tensor) -> Tensor:
        """The inverse of :meth:`unsquashed`."""
        return (before - self.mean) / self.log_std.exp()

    def act(self, noise: Tensor) -> Tensor:
        """Actions of standard normal noise, [..., A] each."""
        return torch.tanh(self.unsquashed(noise))

    def quadrature(self, noise: Tensor) -> Quadrature:
        """One reparameterised action each."""
        return Quadrature(self.act(noise))

    def scored(self, noise: Tensor) -> tuple[Quadrature, Tensor]:
        """One reparameterised action each, and its log density."""
        before = self.unsquashed(noise)
        density = log_density(noise, self.log_std) - log_jacobian(before)
        return Quadrature(torch.tanh(before)), density.sum(-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log density of given actions [..., A] -> [...]."""
        before = before_tanh(actions, EDGE)
        density = log_density(self.noise_of(before), self.log_std) - log_jacobian(before)
        return density.sum(-1)

    def drawn(self, noise: Tensor) -> tuple[Quadrature, Tensor, Tensor]:
        """One reparameterised action each; before tanh it [B, A], and its log density there [B]."""
        before = self.unsquashed(noise)
        density = log_density(noise, self.log_std).sum(-1)
        return Quadrature(torch.tanh(before)), before, density

    def typical(self, actions: Tensor) -> Tensor:
        """Within the ellipsoid, before tanh, that holds 95 % of the policy's actions."""
        noise = self.noise_of(before_tanh(actions, EDGE))
        reach = 2.0 * special.gammaincinv(actions.shape[-1] / 2.0, LIKELY)  # chi-squared
        return noise.square().sum(-1) <= reach

    def divergence(self, other: Gaussian) -> Tensor:
        """KL(self || other), [..., A] -> [...].

        tanh is a bijection, so this equals the KL of the Gaussians before it:
        ``log(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2``, summed over dimensions.
        """
        assert isinstance(other, Gaussian)
        variance_ratio = (2.0 * (self.log_std - other.log_std)).exp()
        shift = ((self.mean - other.mean) / other.log_std.exp()).square()
        return (other.log_std - self.log_std + 0.5 * (variance_ratio + shift - 1.0)).sum(-1)


class Unsquashed(Protocol):
    """A policy whose actions are the tanh of something that has a density as well."""

    def drawn(self, noise: Tensor) -> tuple[Quadrature, Tensor, Tensor]:
        """The quadrature; before tanh its actions [(K), B, A], their log densities there [K B]."""


class Mixture(NamedTuple):
    """K Gaussians of which one acts, before tanh; densities too are before tanh."""

    log_weights: Tensor  # [B, K]
    parts: Gaussian  # [B, K, A]

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log density of logged actions [B, A], before tanh -> [B]."""
        return self.log_density(before_tanh(actions, LOGGED_EDGE))

    def log_ratio(self, policy: Unsquashed, noise: Tensor) -> tuple[Quadrature, Tensor]:
        """A policy's quadrature, and ``log pi - log mixture`` of each of its actions [K B]."""
        # Both densities are before tanh: its Jacobian cancels in the ratio.
        quadrature, before, density = policy.drawn(noise)
        return quadrature, density - self.log_density(before).flatten()

    def unsquashed(self, noise: Tensor, uniform: Tensor) -> Tensor:
        """Draws before tanh, of standard normal noise [N, B, A] and uniform numbers [N, B].

        The latter choose which Gaussian acts.
        """
        reached = uniform.unsqueeze(-1) >= self.log_weights.exp().cumsum(-1)[:, :-1]
        chosen = F.one_hot(reached.sum(-1), self.log_weights.shape[-1]).to(noise.dtype)
        mean, log_std = (torch.einsum("nbk,bka->nba", chosen, x) for x in self.parts)
        return Gaussian(mean, log_std).unsquashed(noise)

    def log_density(self, before: Tensor) -> Tensor:
        """[..., B, A] -> [..., B]."""
        noise = self.parts.noise_of(before.unsqueeze(-2))
        density = log_density(noise, self.parts.log_std)
        return torch.logsumexp(self.log_weights + density.sum(-1), dim=-1)


def _from_outputs(outputs: Tensor) -> Gaussian:
    """Of a network's outputs [..., 2 A]: the means, then what becomes standard deviations."""
    mean, raw = outputs.chunk(2, dim=-1)
    return Gaussian(mean, log_std_of(torch.tanh(raw)))


def _in_numpy(network: nn.Module) -> Callable[[Vector, Noise], Rows]:
    net = NumpyMLP(network)

    def act(observation: Vector, noise: Noise) -> Rows:
        mean, raw = np.split(net(observation), 2)
        return np.tanh(mean + np.exp(log_std_of(np.tanh(raw))) * noise)

    return act


def mixture_of(outputs: Tensor, components: int) -> Mixture:
    """A density network's mixture (Bishop 1994): weights, then outputs as of a policy for each."""
    logits, parts = outputs[:, :components], outputs[:, components:]
    of_each = _from_outputs(parts.unflatten(-1, (components, -1)))
    return Mixture(torch.log_softmax(logits, dim=-1), of_each)


GAUSSIAN = Kind(
    name="gaussian",
    one_hot=False,
    exact=False,
    divergence_name="KL",
    divergence_unit="nats",
    noise_in_words="standard normal draws",
    mean_in_words="the policy's mean",
    noise_shape=lambda a: (a,),
    network=lambda o, a, hidden, generator: linear_layers(o, (*hidden, 2 * a), generator),
    distribution=lambda network, observations: _from_outputs(network(observations)),
    in_numpy=_in_numpy,
    draw_noise=lambda shape, rng: rng.standard_normal(shape, dtype=np.float32),
    uniform=lambda shape, rng: rng.uniform(-1.0, 1.0, shape).astype(np.float32),
    target_entropy=lambda a, per_dimension, share: per_dimension * a,
    density=Density(
        behaviour_outputs=lambda a, components: components * (1 + 2 * a),
        behaviour=mixture_of,
    ),
)
