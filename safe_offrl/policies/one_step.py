"""One-step policies, ``a = tanh(m(s, z) + SIGMA eps)``, z and eps ~ N(0, I): as many modes as the
log.

m makes an action of noise z in one step, as FQL's policy does (arXiv:2502.02538); given z a policy
is a squashed Gaussian of a small, fixed deviation, so over z it is a continuous mixture of them.
FQL has no eps. Here it explores a little, is deployed as well, and makes a KL finite: z is the same
for all policies, so by the data-processing inequality (the chain rule over (z, a))

    KL(pi'(a|s) || pi(a|s)) <= E_z |m'(s, z) - m(s, z)|^2 / (2 SIGMA^2)

which is in closed form given z. It is far from tight where the border between two modes moves: what
crosses it counts as if it had gone the whole way. There is no density and no entropy to tune.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from safe_offrl.policies.gaussian import GAUSSIAN
from safe_offrl.policies.mlp import NumpyMLP, linear_layers
from safe_offrl.policies.protocol import Kind, Noise, Quadrature, Rows, Vector

SIGMA = 0.1  # of an action before tanh, in each dimension
NOISE_POINTS = 16  # of z, over which the bound is averaged


class OneStep(NamedTuple):
    """The network m at each observation."""

    network: nn.Module  # [..., O + A] -> [..., A], before tanh
    observations: Tensor  # [B, O]

    def means(self, z: Tensor) -> Tensor:
        """m(s, z), before tanh: [..., B, A] -> [..., B, A]."""
        seen = self.observations.expand(*z.shape[:-1], -1)
        means: Tensor = self.network(torch.cat([seen, z], dim=-1))
        return means

    def act(self, noise: Tensor) -> Tensor:
        """Actions [..., B, A] of standard normal noise [..., B, 2 A]: z, then eps."""
        z, epsilon = noise.chunk(2, dim=-1)
        return torch.tanh(self.means(z) + SIGMA * epsilon)

    def quadrature(self, noise: Tensor) -> Quadrature:
        """One reparameterised action each."""
        return Quadrature(self.act(noise))

    def divergence_given(self, other: OneStep, z: Tensor) -> Tensor:
        """KL of the actions of the same z [..., B, A] -> [..., B], in nats; exact.

        Its mean over z ~ N(0, I) bounds the KL of the two policies.
        """
        assert isinstance(other, OneStep)
        shift = (self.means(z) - other.means(z)) / SIGMA
        return 0.5 * shift.square().sum(-1)

    def divergence(self, other: OneStep) -> Tensor:
        """An estimate of the bound [B]: its mean over a fixed sample of z, not over all of them.

        Whoever trains on a penalty draws other z (:meth:`divergence_given`): else it would learn to
        move where nothing is measured.
        """
        *_, bias = self.network.parameters()
        points = _points(len(bias)).to(self.observations)
        # One after the other: of all at once the layers would fill the memory.
        rows = (z.expand(len(self.observations), -1) for z in points)
        return torch.stack([self.divergence_given(other, z) for z in rows]).mean(0)


@functools.cache
def _points(a: int) -> Tensor:
    """Standard normal z and their opposites, always the same ones [NOISE_POINTS, A]."""
    half = np.random.default_rng(0).standard_normal((NOISE_POINTS // 2, a), dtype=np.float32)
    return torch.from_numpy(np.concatenate([half, -half]))


def _in_numpy(network: nn.Module) -> Callable[[Vector, Noise], Rows]:
    net = NumpyMLP(network)

    def act(observation: Vector, noise: Noise) -> Rows:
        z, epsilon = np.split(noise, 2, axis=1)
        seen = np.broadcast_to(observation, (len(z), len(observation)))
        before = net(np.concatenate([seen, z], axis=1)) + np.float32(SIGMA) * epsilon
        rows = np.tanh(before)
        rows[~np.isfinite(before).all(axis=1)] = np.nan  # else infinity would become an action
        return rows

    return act


ONE_STEP = Kind(
    name="one_step",
    one_hot=False,
    exact=False,
    divergence_name="KL bound (given the noise)",
    divergence_unit="nats",
    noise_in_words=GAUSSIAN.noise_in_words,
    mean_in_words="what the network makes of no noise, which need not be an action of any mode",
    noise_shape=lambda a: (2 * a,),
    network=lambda o, a, hidden, generator: linear_layers(
        o + a, (*hidden, a), generator, layer_norm=True
    ),
    distribution=OneStep,
    in_numpy=_in_numpy,
    draw_noise=GAUSSIAN.draw_noise,
    uniform=GAUSSIAN.uniform,
)
