"""Mixtures of tanh-Gaussians over [-1, 1]^A: M components, one of which makes the action.

What a log does in more than one way, to pass left and to pass right, a mixture fits by maximum
likelihood without going between (density networks, Bishop 1994). An expectation over one is exact
over the components, with one reparameterised action of each.

The KL of two mixtures has no closed form. By the chain rule over (component, action) and the
data-processing inequality it is at most ``KL(w' || w) + sum_k w'_k KL(N'_k || N_k)``, component by
component, which has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from safe_offrl.policies.categorical import UNLIKELY, Categorical
from safe_offrl.policies.gaussian import (
    EDGE,
    GAUSSIAN,
    Mixture,
    before_tanh,
    log_jacobian,
    log_std_of,
    mixture_of,
)
from safe_offrl.policies.mlp import NumpyMLP, linear_layers
from safe_offrl.policies.protocol import (
    Kind,
    Noise,
    Quadrature,
    Rows,
    Vector,
    choosing_noise,
    require_density,
)

COMPONENTS = 6


class SquashedMixture(NamedTuple):
    """A mixture of tanh-Gaussians at each observation.

    Noise [..., B, M, A + 1] has a row for each component: A standard normal numbers for its action,
    then a standard Gumbel number for its being chosen.
    """

    unsquashed: Mixture  # M components, before tanh

    def act(self, noise: Tensor) -> Tensor:
        """Actions [..., B, A], each of one component.

        The largest of log weights plus Gumbel noise is a draw from the weights. Without noise it is
        the likeliest component's mean.
        """
        log_weights, parts = self.unsquashed
        scores = log_weights + noise[..., -1]
        chosen = torch.eye(scores.shape[-1], device=scores.device)[scores.argmax(-1)]
        # A sum, not a choice: NaN in any output of the network is NaN in the action.
        chosen = (chosen + 0.0 * scores).unsqueeze(-1)
        return torch.tanh((chosen * parts.unsquashed(noise[..., :-1])).sum(-2))

    def quadrature(self, noise: Tensor) -> Quadrature:
        """One reparameterised action of each component, weighted as that is."""
        return self._weighted(self._of_each(noise))

    def drawn(self, noise: Tensor) -> tuple[Quadrature, Tensor, Tensor]:
        """The quadrature; before tanh its actions [M, B, A], and the log densities [M B] there.

        These are the whole mixture's, not each component's own.
        """
        before = self._of_each(noise)
        return self._weighted(before), before, self.unsquashed.log_density(before).flatten()

    def scored(self, noise: Tensor) -> tuple[Quadrature, Tensor]:
        """The quadrature, and the log density [M B] of each action under the whole mixture."""
        quadrature, before, density = self.drawn(noise)
        return quadrature, density - log_jacobian(before).sum(-1).flatten()

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log density of given actions [..., B, A] -> [..., B]."""
        before = before_tanh(actions, EDGE)
        return self.unsquashed.log_density(before) - log_jacobian(before).sum(-1)

    def typical(self, actions: Tensor) -> Tensor:
        """Typical of a component that makes 5 % of the policy's actions at least."""
        log_weights, parts = self.unsquashed
        of_component = parts.typical(actions.unsqueeze(-2))
        return (of_component & (log_weights.exp() >= UNLIKELY)).any(-1)

    def divergence(self, other: SquashedMixture) -> Tensor:
        """``KL(w' || w) + sum_k w'_k KL(N'_k || N_k)`` [B], self' from other: at least the KL."""
        assert isinstance(other, SquashedMixture)
        log_weights, parts = self.unsquashed
        of_choice = Categorical(log_weights).divergence(Categorical(other.unsquashed.log_weights))
        of_actions = parts.divergence(other.unsquashed.parts)
        return of_choice + (log_weights.exp() * of_actions).sum(-1)

    def _of_each(self, noise: Tensor) -> Tensor:
        """An action of each component, before tanh, [M, B, A]."""
        return self.unsquashed.parts.unsquashed(noise[..., :-1]).transpose(0, 1)

    def _weighted(self, before: Tensor) -> Quadrature:
        return Quadrature(torch.tanh(before).flatten(0, 1), self.unsquashed.log_weights.exp().T)


def _outputs(a: int) -> int:
    return require_density(GAUSSIAN, "A mixture").behaviour_outputs(a, COMPONENTS)


def _in_numpy(network: nn.Module) -> Callable[[Vector, Noise], Rows]:
    net = NumpyMLP(network)

    def act(observation: Vector, noise: Noise) -> Rows:
        outputs = net(observation)
        logits, parts = np.split(outputs, [COMPONENTS])
        mean, raw = np.split(parts.reshape(COMPONENTS, -1), 2, axis=1)
        chosen = (logits + noise[:, :, -1]).argmax(axis=1)
        own = noise[np.arange(len(noise)), chosen, :-1]
        rows = np.tanh(mean[chosen] + np.exp(log_std_of(np.tanh(raw)))[chosen] * own)
        return rows if np.isfinite(outputs).all() else np.full_like(rows, np.nan)

    return act


MIXTURE = Kind(
    name="mixture",
    one_hot=False,
    exact=False,
    divergence_name="KL bound (over components)",
    divergence_unit="nats",
    noise_in_words=(
        "a row for each component: standard normal draws, one for each number of the action, then "
        "a standard Gumbel draw, -log(-log(u))"
    ),
    mean_in_words="the mean of the likeliest component",
    noise_shape=lambda a: (COMPONENTS, a + 1),
    network=lambda o, a, hidden, generator: linear_layers(o, (*hidden, _outputs(a)), generator),
    distribution=lambda network, observations: SquashedMixture(
        mixture_of(network(observations), COMPONENTS)
    ),
    in_numpy=_in_numpy,
    draw_noise=choosing_noise,
    uniform=GAUSSIAN.uniform,
    target_entropy=GAUSSIAN.target_entropy,
    density=GAUSSIAN.density,
    sampled=False,
)
