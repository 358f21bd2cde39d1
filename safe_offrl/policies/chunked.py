"""Policies that plan: the best of N proposals of h actions at once, of which the first is executed.

What proposes and what chooses is as in policies/proposals.py, but of plans: F makes h actions of a
state and noise. Q-chunking (arXiv:2507.07969) executes a whole plan; here there are new plans at
every step, so that shield, guard and safety critic judge every action in the state that it is taken
in, and a policy has no memory. What is lost is that a plan is carried through.

The first action is a function of the plan, so by the data-processing inequality no two policies
that share F are further apart in actions than in their choice of a plan, whose KL is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safe_offrl.policies.networks import Networks
from safe_offrl.policies.proposals import PROPOSALS, PROPOSALS_MADE, ProposalNetwork, Proposals
from safe_offrl.policies.protocol import Noise, Quadrature, Rows, Vector

CHUNK = 5  # h, actions of a plan


class Chunked(NamedTuple):
    """The first actions of plans."""

    plans: Proposals  # of h A numbers, the first action's first

    def act(self, noise: Tensor) -> Tensor:
        """Actions [..., B, A] of noise [..., B, N, h A + 1], as that of proposals."""
        return self._first(self.plans.act(noise))

    def quadrature(self, noise: Tensor) -> Quadrature:
        """The first action of every plan with the plan's probability."""
        plans = self.plans.quadrature(noise)
        return plans._replace(actions=self._first(plans.actions))

    def divergence(self, other: Chunked) -> Tensor:
        """KL of the choice of a plan [B], see :meth:`Proposals.divergence`."""
        assert isinstance(other, Chunked)
        return self.plans.divergence(other.plans)

    def _first(self, plans: Tensor) -> Tensor:
        return plans[..., : plans.shape[-1] // CHUNK]


def _distribution(network: nn.Module, observations: Tensor) -> Chunked:
    assert isinstance(network, ProposalNetwork)
    return Chunked(Proposals(network, observations))


def _network(o: int, a: int, hidden: Sequence[int], generator: torch.Generator) -> nn.Module:
    return PROPOSALS.network(o, CHUNK * a, hidden, generator)


def _in_numpy(network: nn.Module) -> Callable[[Vector, Noise], Rows]:
    plan = PROPOSALS.in_numpy(network)

    def act(observation: Vector, noise: Noise) -> Rows:
        plans = plan(observation, noise)
        return plans[:, : plans.shape[1] // CHUNK]

    return act


CHUNKED = PROPOSALS._replace(
    name="chunked",
    divergence_name="KL bound (over the choice of a plan)",
    mean_in_words=f"the first action of the highest scored of {PROPOSALS_MADE} fixed plans",
    noise_shape=lambda a: PROPOSALS.noise_shape(CHUNK * a),
    network=_network,
    distribution=_distribution,
    in_numpy=_in_numpy,
    target_entropy=None,  # RLPD's critics know single actions alone
)


def networks_of_plans(networks: Networks, generator: torch.Generator) -> Networks:
    """Networks whose actions are plans: new critics, and an actor that is the same as theirs.

    What that learns or keeps, the policy does: both have one scorer and one generator.
    """
    o, a = networks.layout.sizes
    plans = Networks(o, CHUNK * a, networks.sizes, generator, PROPOSALS)
    plans.actor.layers = networks.actor.layers
    return plans
