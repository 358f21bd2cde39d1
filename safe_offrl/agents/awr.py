"""AWR (Peng et al. 2019, arXiv:1910.00177): imitation of what led to more than is usual.

    maximise E_{(s, a) ~ log}[ min(exp(A / temperature), 20) log pi(a|s) ],  A = G - V(s, t)

(algorithm 1), A standardised over the batch, as in the authors' code. G is the log's own
return-to-go, TD(lambda) at lambda = 1 where the paper takes .95: a batch holds single steps, and
their returns. These end with the logged episode, so V, fitted to them, sees the time that is left.
The policy is a mixture, the paper's a Gaussian. Critics are learnt afterwards, by alignment.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.agents.weighted_imitation import WeightedImitation
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.nn.losses import exponential_weight
from safe_offrl.policies.categorical import CATEGORICAL
from safe_offrl.policies.mixture import MIXTURE
from safe_offrl.policies.networks import StackedMLP
from safe_offrl.policies.protocol import Quadrature
from safe_offrl.types import Batch

NEARLY_ALIKE = 1e-5  # standard deviation of advantages, which nothing is divided by less than


@dataclass(frozen=True)
class AWRConfig:
    """Settings of AWR as published; ``discount`` is that of the returns-to-go in its batches."""

    learning_rate: float = 3e-4
    discount: float = 0.99
    temperature: float = 1.0
    weight_limit: float = 20.0


class AWR:
    """State value V by regression on returns, and the actor by what exceeds it."""

    Config = AWRConfig
    Online: type[OnlineAgent] | None = None
    kinds = (MIXTURE, CATEGORICAL)

    def __init__(self, setup: Setup, config: AWRConfig) -> None:
        networks, self.config = setup.networks, config
        self.actor = networks.actor
        self.imitation = WeightedImitation(setup, "awr", self.weights, config.learning_rate)
        self.value = StackedMLP(
            1,
            networks.layout.observation_size + 1,
            networks.sizes.critic_hidden,
            layer_norm=networks.sizes.layer_norm,
            generator=setup.generator,
        )
        self.value_optimizer = Adam(self.value.parameters(), config.learning_rate)
        self._descend_value = Descent(self.value_loss, self.value_optimizer, setup.compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            "actor": self.actor,
            "value": self.value,
            "value_optimizer": self.value_optimizer,
            **self.imitation.parts(),
        }

    def advantages(self, batch: Batch) -> Tensor:
        """``G - V(s, time to go)`` of logged actions, [B]."""
        inputs = torch.cat([batch.observations, batch.time_to_go.unsqueeze(-1)], dim=-1)
        value: Tensor = self.value(inputs)[0]
        return batch.return_to_go - value

    def value_loss(self, batch: Batch) -> tuple[Tensor]:
        """Mean of ``(G - V)^2``."""
        return (self.advantages(batch).square().mean(),)

    def weights(self, batch: Batch, policy: Quadrature) -> Tensor:
        """``min(exp(A / temperature), 20)``, A standardised over the batch, [B]."""
        advantages = self.advantages(batch)
        spread = advantages.std(correction=0).clamp_min(NEARLY_ALIKE)
        standardised = (advantages - advantages.mean()) / spread
        return exponential_weight(
            standardised, 1.0 / self.config.temperature, self.config.weight_limit
        )

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """V, then the actor."""
        (value_loss,) = self._descend_value(batch)
        return {
            "agent/value_loss": value_loss,
            "actor/loss": self.imitation.update(batch, steering),
        }
