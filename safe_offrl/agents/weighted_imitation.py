"""Weighted imitation: ``-mean w(s, a) log pi(a|s)`` over logged actions, the actor of awr, awac and
crr, which differ in w alone.

Where penalties steer, a logged action also weighs less by its risk (agents/aversion.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from safe_offrl.agents.aversion import risk_averse
from safe_offrl.agents.protocol import Setup
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.policies.networks import Actor
from safe_offrl.policies.protocol import Quadrature, require_density
from safe_offrl.types import Batch

# w of logged actions [B], given the batch and the policy's own actions at its observations.
Weights = Callable[[Batch, Quadrature], Tensor]


class WeightedImitation:
    """Trains the actor of an agent that says how much each logged action counts."""

    def __init__(self, setup: Setup, name: str, weights: Weights, learning_rate: float) -> None:
        """``name`` is the agent's; ``weights`` take no gradient."""
        self.actor, self.generator = setup.networks.actor, setup.generator
        require_density(self.actor.kind, f"The likelihood that {name} maximises")
        self.weights = weights
        own = setup.extraction.aversion
        self._aversions = setup.aversions or (own,) * len(setup.limits)
        self.optimizer = Adam(self.actor.parameters(), learning_rate)
        self._descend = Descent(self.loss, self.optimizer, setup.compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps, besides the actor."""
        return {"actor_optimizer": self.optimizer}

    def loss(
        self,
        batch: Batch,
        noise: Tensor,
        penalties: tuple[Penalty, ...],
        anchor: Actor | None,
        kl_weight: Tensor | float,
    ) -> tuple[Tensor]:
        """``mean(-w log pi(a|s) + kl_weight KL(pi || anchor))``; without an anchor not the latter.

        ``noise`` [B, *noise_shape] drives the policy's own actions, with which w compares.
        """
        distribution = self.actor.density(batch.observations)
        with torch.no_grad():
            policy = distribution.quadrature(noise)
            weights = self.weights(batch, policy)
            weights = risk_averse(weights, batch, penalties, self._aversions, policy)
        loss = -weights * distribution.log_prob(batch.actions)
        if anchor is not None:
            with torch.no_grad():
                anchored = anchor(batch.observations)
            loss = loss + kl_weight * distribution.divergence(anchored)
        return (loss.mean(),)

    def update(self, batch: Batch, steering: Steering) -> Tensor:
        """One step of the actor; its loss."""
        noise = self.actor.noise(batch.actions.shape[:-1], self.generator)
        (loss,) = self._descend(batch, noise, *steering)
        return loss
