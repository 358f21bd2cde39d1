"""Best of N proposals: a frozen generator F proposes N actions ``a_i = F(s, w_i)`` of independent
normal noise, and one of them is taken with probability ``softmax_i l(s, a_i)``.

The scorer l is all that learns. Every action is one of F's, which makes the log's behaviour:
however l chooses, no action leaves the log, as far as F has learnt it. Given the proposals the
choice is a categorical distribution, so that an expectation over it is exact, and its entropy lies
between 0 and log N. Two policies that share F propose the same: by the chain rule and the
data-processing inequality

    KL(pi'(a|s) || pi(a|s)) <= E_proposals KL(softmax l' || softmax l),

a closed form given the proposals, and from the behaviour, l = 0, no more than log N. The few
actions that F has between two modes are proposed too, and taken if they score best.

Noise of exactly zero, which is no draw, stands for proposals that are the same at every state. So
the action without noise is a best one, not that between two modes to which F may lead zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from safe_offrl.compute.state import seeded
from safe_offrl.policies.gaussian import GAUSSIAN
from safe_offrl.policies.latent import NEARLY_NOTHING, REACH, generate
from safe_offrl.policies.mlp import NumpyMLP, linear_layers
from safe_offrl.policies.protocol import (
    Kind,
    Noise,
    Quadrature,
    Rows,
    Vector,
    choosing_noise,
    normal,
)

PROPOSALS_MADE = 16  # N, of which one is taken


class ProposalNetwork(nn.Module):
    """The scorer, and the generator, which no loss of an actor moves.

    ``fixed`` [2, N, A] are the noise of proposals at which policies are compared, and of the first
    half the action without noise is made. A constant, which no checkpoint keeps: each half is drawn
    from N(0, I), the second as the mirror image of the first, which cancels much of the error.
    """

    fixed: Tensor

    def __init__(self, scorer: nn.Sequential, generator: nn.Sequential, fixed: Tensor) -> None:
        super().__init__()
        self.scorer = scorer  # [B, O + A] -> [B, 1]
        self.generator = generator.requires_grad_(False)  # [B, O + A] -> [B, A], before tanh
        self.register_buffer("fixed", fixed, persistent=False)


class Proposals(NamedTuple):
    """What proposes at each observation, and what chooses."""

    network: ProposalNetwork
    observations: Tensor  # [B, O]

    def act(self, noise: Tensor) -> Tensor:
        """Actions [..., B, A] of noise [..., B, N, A + 1]: normal, in the last column Gumbel.

        The largest of scores plus Gumbel noise is a draw from their softmax.
        """
        actions = self._propose(noise[..., :-1])
        scores = self._scores(actions) + noise[..., -1].movedim(-1, 0)
        chosen = scores.argmax(0, keepdim=True).unsqueeze(-1).expand_as(actions[:1])
        return actions.gather(0, chosen)[0]

    def quadrature(self, noise: Tensor) -> Quadrature:
        """Every proposal with its probability; normal noise [B, N, A + 1], its last column idle."""
        return self.scored(noise)[0]

    def scored(self, noise: Tensor) -> tuple[Quadrature, Tensor]:
        """Every proposal with its probability, and the log of it [N B]."""
        actions = self._propose(noise[..., :-1])
        log_probs = self._log_probs(actions)
        return Quadrature(actions.flatten(0, 1), log_probs.exp()), log_probs.flatten()

    def divergence(self, other: Proposals) -> Tensor:
        """KL of the choice [B], which on average over proposals bounds the KL over actions of two
        policies that share F.

        The average is estimated at two fixed sets of proposals: a quarter off at one state is
        usual, and a tenth on average over states. No gradient reaches the other policy.
        """
        assert isinstance(other, Proposals)
        size = len(self.observations)
        actions = self._propose(self.network.fixed.unsqueeze(1).expand(-1, size, -1, -1))
        mine = self._log_probs(actions)
        with torch.no_grad():
            theirs = other._log_probs(actions)
        return (mine.exp() * (mine - theirs)).sum(0).mean(0)

    def _propose(self, noise: Tensor) -> Tensor:
        """[..., B, N, A] -> actions [N, ..., B, A]."""
        w = torch.where(noise == 0.0, self.network.fixed[0], noise)
        return generate(self.network.generator, self.observations, w.movedim(-2, 0))

    def _scores(self, actions: Tensor) -> Tensor:
        """l [N, ..., B]."""
        seen = self.observations.expand(*actions.shape[:-1], -1)
        scores: Tensor = self.network.scorer(torch.cat([seen, actions], dim=-1))
        return scores.squeeze(-1)

    def _log_probs(self, actions: Tensor) -> Tensor:
        return torch.log_softmax(self._scores(actions), dim=0)


def _distribution(network: nn.Module, observations: Tensor) -> Proposals:
    assert isinstance(network, ProposalNetwork)
    return Proposals(network, observations)


def _network(o: int, a: int, hidden: Sequence[int], generator: torch.Generator) -> ProposalNetwork:
    """A policy that begins near an even choice, the behaviour, once F has learnt."""
    scorer = linear_layers(o + a, (*hidden, 1), generator, layer_norm=True)
    last = scorer[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(NEARLY_NOTHING)
        last.bias.zero_()
    # What all scores have in common is nothing to a softmax: Adam would turn the rounding of a
    # gradient of zero into steps. So this bias stays, and with LayerNorm no other is alike.
    last.bias.requires_grad_(False)
    proposing = linear_layers(o + a, (*hidden, a), generator, layer_norm=True)
    half = normal((PROPOSALS_MADE, a), seeded(0)).to(generator.device)
    return ProposalNetwork(scorer, proposing, torch.stack([half, -half]))


def _in_numpy(network: nn.Module) -> Callable[[Vector, Noise], Rows]:
    assert isinstance(network, ProposalNetwork)
    scorer, generator = NumpyMLP(network.scorer), NumpyMLP(network.generator)
    fixed = network.fixed[0].cpu().numpy()

    def act(observation: Vector, noise: Noise) -> Rows:
        k, n, columns = noise.shape
        w = np.where(noise[..., :-1] == 0.0, fixed, noise[..., :-1]).reshape(k * n, columns - 1)
        seen = np.broadcast_to(observation, (k * n, len(observation)))
        before = generator(np.concatenate([seen, w.clip(-REACH, REACH)], axis=1))
        actions = np.tanh(before)
        scores = scorer(np.concatenate([seen, actions], axis=1)).reshape(k, n) + noise[..., -1]
        rows = actions.reshape(k, n, -1)[np.arange(k), scores.argmax(axis=1)]
        finite = np.isfinite(before).reshape(k, -1).all(axis=1) & np.isfinite(scores).all(axis=1)
        rows[~finite] = np.nan
        return rows

    return act


PROPOSALS = Kind(
    name="proposals",
    one_hot=False,
    exact=False,
    divergence_name="KL bound (over the choice)",
    divergence_unit="nats",
    noise_in_words="standard normal draws, but standard Gumbel draws, -log(-log(u)), in the last "
    "column",
    mean_in_words=f"the highest scored of {PROPOSALS_MADE} fixed proposals",
    noise_shape=lambda a: (PROPOSALS_MADE, a + 1),
    network=_network,
    distribution=_distribution,
    in_numpy=_in_numpy,
    draw_noise=choosing_noise,
    uniform=GAUSSIAN.uniform,
    target_entropy=lambda a, per_dimension, share: share * math.log(PROPOSALS_MADE),
)
