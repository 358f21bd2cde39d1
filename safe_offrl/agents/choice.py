"""The choice among proposals: the best of them, softly, and by risk as well as by reward.

    minimise E[ -Q(s, a)/|Q| + sum lambda Q_C(s, a) ] + temperature KL(choice || even choice),

exact given the proposals. Its minimum is a softmax of what the actions are worth over the
temperature; as that goes to 0, the best proposal, or, with penalties, that of most value among
those of little risk. Online an anchor may add its divergence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safe_offrl.agents.steering import Penalty, Steering, steered
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import EAGER, Compute, Descent
from safe_offrl.compute.state import Part
from safe_offrl.policies.networks import Actor, Networks
from safe_offrl.policies.proposals import PROPOSALS, PROPOSALS_MADE
from safe_offrl.types import Batch


class Choice:
    """Trains what chooses among the proposals of a policy's frozen generator."""

    def __init__(
        self,
        networks: Networks,
        learning_rate: float,
        temperature: float,
        compute: Compute = EAGER,
        *,
        executed: int | None = None,
    ) -> None:
        """Of what is proposed the first ``executed`` numbers are an action, all by default."""
        self.executed = executed
        self.networks, self.temperature = networks, temperature
        self.actor_optimizer = Adam(networks.actor.parameters(), learning_rate)
        self._descend = Descent(self.actor_loss, self.actor_optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps, besides the actor."""
        return {"actor_optimizer": self.actor_optimizer}

    def actor_loss(
        self,
        batch: Batch,
        noise: Tensor,
        penalties: tuple[Penalty, ...],
        anchor: Actor | None = None,
        kl_weight: Tensor | float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """The objective of this module's docstring, mean over the batch; (loss, mean KL).

        And ``kl_weight`` times the KL from an ``anchor`` that shares the generator.

        The proposals are given, and so is what is said of them: only the probabilities learn.
        """
        distribution = self.networks.actor.scored(batch.observations)
        policy, log_probs = distribution.scored(noise)
        with torch.no_grad():
            of_each = steered(policy, batch, self.networks.q, penalties, self.executed)
        divergence = policy.expect(log_probs) + math.log(PROPOSALS_MADE)
        loss = policy.expect(of_each) + self.temperature * divergence
        if anchor is not None:
            anchored = PROPOSALS.distribution(anchor.layers, batch.observations)
            loss = loss + kl_weight * distribution.divergence(anchored)
        return loss.mean(), divergence.detach().mean()

    def update(
        self, batch: Batch, steering: Steering, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """One step of the scorer; scalars to log."""
        noise = self.networks.actor.noise(batch.actions.shape[:-1], generator)
        loss, divergence = self._descend(batch, noise, *steering)
        return {"actor/loss": loss, "actor/kl_to_log": divergence}
