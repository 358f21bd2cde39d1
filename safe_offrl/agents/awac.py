"""AWAC (Nair et al. 2020, arXiv:2006.09359): critics of the policy, and imitation by advantage.

    maximise E_{(s, a) ~ log}[ w log pi(a|s) ],  w = B softmax((Q(s, a) - V(s)) / temperature)

over each batch of B, V(s) = E_{a ~ pi} Q(s, a), Q the least of the critics (algorithm 1). The
softmax is the authors' code's: w is 1 on average whatever the scale of Q; CORL's clipped
``exp(A / temperature)`` is not. The policy is a mixture, theirs a Gaussian; V is exact over its
components, theirs from one action. We have no weight decay, and batches as large as everybody's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.agents.td_values import TDValues
from safe_offrl.agents.weighted_imitation import WeightedImitation
from safe_offrl.compute.state import Part
from safe_offrl.policies.categorical import CATEGORICAL
from safe_offrl.policies.mixture import MIXTURE
from safe_offrl.policies.protocol import Quadrature
from safe_offrl.types import Batch


@dataclass(frozen=True)
class AWACConfig:
    """Settings of AWAC as published for MuJoCo; ``temperature`` is its lambda, in units of Q."""

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    temperature: float = 2.0


class OnlineAWAC:
    """AWAC as it goes on online, on batches that hold the log as well: the losses are the same.

    It takes over what alignment has left, which are critics of the policy, as its own are. What the
    paper does not have is the KL from the policy that acts.
    """

    own_values = False
    return_discount: float | None = None

    def __init__(self, setup: Setup, config: AWACConfig) -> None:
        self.temperature, lr = config.temperature, config.learning_rate
        self.imitation = WeightedImitation(setup, "awac", self.weights, lr)
        self.values = TDValues(
            setup.networks,
            setup.generator,
            setup.compute,
            learning_rate=lr,
            discount=config.discount,
            tau=config.tau,
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return self.values.parts() | self.imitation.parts()

    def weights(self, batch: Batch, policy: Quadrature) -> Tensor:
        """``B softmax((Q(s, a) - V(s)) / temperature)`` over the batch, [B]."""
        advantages = self.values.advantages(batch, policy)
        return len(advantages) * torch.softmax(advantages / self.temperature, dim=0)

    def update_critics(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the critics."""
        return self.values.update(batch)

    def update_actor(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the actor."""
        return {"learner/actor_loss": self.imitation.update(batch, steering)}


class AWAC:
    """AWAC offline, on batches of the log."""

    Config = AWACConfig
    Online: type[OnlineAgent] | None = OnlineAWAC
    kinds = (MIXTURE, CATEGORICAL)

    def __init__(self, setup: Setup, config: AWACConfig) -> None:
        self.learner = OnlineAWAC(setup, config)
        self.values, self.imitation = self.learner.values, self.learner.imitation
        self.parts = self.learner.parts

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """The critics, then the actor."""
        metrics = self.values.update(batch)
        return metrics | {"actor/loss": self.imitation.update(batch, steering)}
