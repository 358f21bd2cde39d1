"""Latent policies, ``a = F(s, w)``: a Gaussian over the noise w of a frozen generator F of actions.

F makes the log's behaviour of standard normal noise, as many modes as that has: whatever the
Gaussian over w does, actions stay, as far as F has learnt it, where the log has some (DSRL,
arXiv:2506.15799). Between two modes F is steep but continuous: a few actions lie there. Two
policies that share F are no further apart in actions than in noise, by the data-processing
inequality ``KL(pi'(a|s) || pi(a|s)) <= KL(pi'(w|s) || pi(w|s))``, and the latter is in closed form.

w is not squashed, for then ``F(s, N(0, I))`` is the log's behaviour, and the KL from N(0, I) bounds
the KL from the log. What keeps w where F has learnt is a mean within DSRL's magnitude of 1.5, which
a tanh approaches without a dead gradient, and F itself, which clips w at 3: with that it is still a
function of w, so both bounds hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from safe_offrl.policies.gaussian import (
    GAUSSIAN,
    Gaussian,
    log_density,
    log_std_of,
    raw_log_std,
)
from safe_offrl.policies.mlp import NumpyMLP, linear_layers
from safe_offrl.policies.protocol import Kind, Noise, Quadrature, Rows, Vector

MAGNITUDE = 1.5  # of the mean of w, in each dimension
REACH = 3.0  # F takes what is further out for this; 0.3 % of standard normal draws are
NEARLY_NOTHING = 0.01  # what the Gaussian's last layer begins with, as a share of the usual
# Of the noise N(0, I) has the most entropy that a policy should have, of actions in [-1, 1] the
# uniform distribution; nats per dimension. A target is as far below the one as below the other.
MORE_ENTROPY = 0.5 * math.log(2.0 * math.pi * math.e) - math.log(2.0)


class LatentNetwork(nn.Module):
    """The Gaussian's network, and the generator, which no loss of an actor moves."""

    def __init__(self, policy: nn.Sequential, generator: nn.Sequential) -> None:
        super().__init__()
        self.policy = policy  # [B, O] -> [B, 2 A]
        self.generator = generator.requires_grad_(False)  # [B, O + A] -> [B, A], before tanh


def generate(generator: nn.Module, observations: Tensor, w: Tensor) -> Tensor:
    """F(s, w) in [-1, 1]: [B, O], [..., B, A] -> [..., B, A]."""
    seen = observations.expand(*w.shape[:-1], -1)
    return torch.tanh(generator(torch.cat([seen, w.clamp(-REACH, REACH)], dim=-1)))


class Latent(NamedTuple):
    """A Gaussian over w at each observation, and what makes actions of w."""

    over_noise: Gaussian  # [B, A] each
    generator: nn.Module
    observations: Tensor  # [B, O]

    def act(self, noise: Tensor) -> Tensor:
        """Actions [..., B, A] of standard normal noise [..., B, A], from which w is made."""
        return generate(self.generator, self.observations, self.over_noise.unsquashed(noise))

    def quadrature(self, noise: Tensor) -> Quadrature:
        """One reparameterised action each."""
        return Quadrature(self.act(noise))

    def scored(self, noise: Tensor) -> tuple[Quadrature, Tensor]:
        """One reparameterised action each, and the log density of its w."""
        density = log_density(noise, self.over_noise.log_std).sum(-1)
        return Quadrature(self.act(noise)), density

    def divergence(self, other: Latent) -> Tensor:
        """KL over w [B], which bounds the KL over actions of two policies that share F."""
        assert isinstance(other, Latent)
        return self.over_noise.divergence(other.over_noise)


def _distribution(network: nn.Module, observations: Tensor) -> Latent:
    assert isinstance(network, LatentNetwork)
    mean, raw = torch.tanh(network.policy(observations)).chunk(2, dim=-1)
    over_noise = Gaussian(MAGNITUDE * mean, log_std_of(raw))
    return Latent(over_noise, network.generator, observations)


def _network(o: int, a: int, hidden: Sequence[int], generator: torch.Generator) -> LatentNetwork:
    """A policy that begins near N(0, I) at every observation, the behaviour, once F has learnt."""
    policy = linear_layers(o, (*hidden, 2 * a), generator)
    last = policy[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(NEARLY_NOTHING)
        last.bias[:a] = 0.0
        last.bias[a:] = raw_log_std(0.0)
    return LatentNetwork(policy, linear_layers(o + a, (*hidden, a), generator, layer_norm=True))


def _in_numpy(network: nn.Module) -> Callable[[Vector, Noise], Rows]:
    assert isinstance(network, LatentNetwork)
    policy, generator = NumpyMLP(network.policy), NumpyMLP(network.generator)

    def act(observation: Vector, noise: Noise) -> Rows:
        outputs = policy(observation)
        mean, raw = np.split(np.tanh(outputs), 2)
        w = MAGNITUDE * mean + np.exp(log_std_of(raw)) * noise
        seen = np.broadcast_to(observation, (len(w), len(observation)))
        before = generator(np.concatenate([seen, w.clip(-REACH, REACH)], axis=1))
        rows = np.tanh(before)
        finite = np.isfinite(outputs).all() & np.isfinite(before).all(axis=1)
        rows[~finite] = np.nan  # else tanh would make an action of infinity
        return rows

    return act


LATENT = Kind(
    name="latent",
    one_hot=False,
    exact=False,
    divergence_name="KL bound (over the noise)",
    divergence_unit="nats",
    noise_in_words=GAUSSIAN.noise_in_words,
    mean_in_words="what the generator makes of the mean of its noise",
    noise_shape=lambda a: (a,),
    network=_network,
    distribution=_distribution,
    in_numpy=_in_numpy,
    draw_noise=GAUSSIAN.draw_noise,
    uniform=GAUSSIAN.uniform,
    target_entropy=lambda a, per_dimension, share: a * (per_dimension + MORE_ENTROPY),
)
