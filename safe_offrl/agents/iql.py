"""IQL (Kostrikov et al. 2021, arXiv:2110.06169): values without ever asking about unlogged actions.

Its values are as published; offline the actor comes from agents/extraction.py instead of plain AWR,
online, as a baseline, from AWR.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_offrl.agents.extraction import Extraction
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import EAGER, Compute, Descent
from safe_offrl.compute.state import Part, named
from safe_offrl.nn.losses import expectile_loss, exponential_weight, td_target
from safe_offrl.policies.networks import Networks, StackedMLP, polyak_
from safe_offrl.policies.protocol import require_density
from safe_offrl.types import Batch


@dataclass(frozen=True)
class IQLConfig:
    """Settings of IQL as published for MuJoCo; expectile .9 on AntMaze.

    ``inverse_temperature`` and ``weight_limit`` are those of the actor online (AWR); offline
    extraction has its own.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    expectile: float = 0.7
    inverse_temperature: float = 3.0
    weight_limit: float = 100.0


class IQLValues:
    """State value V by expectile regression, critics from V."""

    def __init__(
        self,
        networks: Networks,
        config: IQLConfig,
        generator: torch.Generator,
        compute: Compute = EAGER,
    ) -> None:
        self.networks = networks
        self.config = config
        self.value = StackedMLP(
            1,
            networks.layout.observation_size,
            networks.sizes.critic_hidden,
            layer_norm=networks.sizes.layer_norm,
            generator=generator,
        )
        lr = config.learning_rate
        self.value_optimizer = Adam(self.value.parameters(), lr)
        self.critic_optimizer = Adam(networks.critics.parameters(), lr)
        self._descend_value = Descent(self.value_loss, self.value_optimizer, compute)
        self._descend_critics = Descent(self.critic_loss, self.critic_optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            **self.networks.parts(),
            "value": self.value,
            "value_optimizer": self.value_optimizer,
            "critic_optimizer": self.critic_optimizer,
        }

    def value_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Expectile regression of V towards the minimum target critic (eq. 5); (loss, it [B])."""
        target_q = self.networks.target_q(batch.observations, batch.actions).amin(0)
        value = self.value(batch.observations)[0]
        return expectile_loss(target_q - value, self.config.expectile).mean(), target_q

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over members of the squared error to ``r + discount (1 - terminated) V(s')``.

        Returns (loss, V(s) [B]).
        """
        with torch.no_grad():
            both = torch.cat([batch.observations, batch.next_observations])
            value, next_value = self.value(both)[0].chunk(2)
            target = td_target(batch.rewards, batch.terminated, next_value, self.config.discount)
        q = self.networks.q(batch.observations, batch.actions)
        return (q - target).square().mean(-1).sum(), value

    def update(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """V, then the critics with the new V, then Polyak; (advantages [B], scalars to log)."""
        value_loss, target_q = self._descend_value(batch)
        critic_loss, value = self._descend_critics(batch)
        polyak_(self.networks.target_critics, self.networks.critics, self.config.tau)
        return target_q - value, {"agent/value_loss": value_loss, "agent/critic_loss": critic_loss}


class OnlineIQL:
    """IQL that goes on online (section 5.3 of the paper): the same values, and AWR for the actor.

    Nothing restrains it but the data, half of which is the log.
    """

    own_values = True
    return_discount: float | None = None

    def __init__(self, setup: Setup, config: IQLConfig) -> None:
        self.networks = setup.networks
        require_density(self.networks.actor.kind, "The regression of iql's actor online")
        self.values = IQLValues(setup.networks, config, setup.generator, setup.compute)
        self.config = config
        self.actor_optimizer = Adam(self.networks.actor.parameters(), config.learning_rate)
        self._descend_actor = Descent(self.actor_loss, self.actor_optimizer, setup.compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {**self.values.parts(), "actor_optimizer": self.actor_optimizer}

    def actor_loss(self, batch: Batch) -> tuple[Tensor]:
        """Advantage-weighted regression (eq. 7): ``-min(exp(beta A), limit) log pi(a|s)``, mean."""
        with torch.no_grad():
            target_q = self.networks.target_q(batch.observations, batch.actions).amin(0)
            advantages = target_q - self.values.value(batch.observations)[0]
            weights = exponential_weight(
                advantages, self.config.inverse_temperature, self.config.weight_limit
            )
        log_prob = self.networks.actor.density(batch.observations).log_prob(batch.actions)
        return (-(weights * log_prob).mean(),)

    def update_critics(self, batch: Batch) -> dict[str, Tensor]:
        """V, then the critics."""
        return self.values.update(batch)[1]

    def update_actor(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One actor step; the constraints of other learners have no place in it."""
        (loss,) = self._descend_actor(batch)
        return {"learner/actor_loss": loss}


class IQL:
    """IQL offline: its values, and the actor extracted from them."""

    Config = IQLConfig
    Online: type[OnlineAgent] | None = OnlineIQL

    def __init__(self, setup: Setup, config: IQLConfig) -> None:
        networks, generator, compute = setup.networks, setup.generator, setup.compute
        self.values = IQLValues(networks, config, generator, compute)
        self.extraction = Extraction(
            networks, setup.extraction, generator, compute, setup.aversions
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return self.values.parts() | named("extraction", self.extraction.parts())

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """V and the critics, then the actor by its advantages."""
        advantages, metrics = self.values.update(batch)
        return metrics | self.extraction.update(batch, advantages, steering)
