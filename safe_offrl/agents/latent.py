"""Latent steering: a policy with as many modes as the log, which stays within the log's support.

A flow learns the log's behaviour, a generator F makes its actions in one step, and the actor, a
Gaussian over F's noise, is steered by gradients through F (DSRL, arXiv:2506.15799, with FQL's
one-step generator, arXiv:2502.02538, and IQL's values, which never ask about unlogged actions):

    minimise E_{w ~ pi}[ -Q(s, a)/|Q| + sum lambda Q_C(s, a) ] + weight KL(pi || N(0, I))

with a = F(s, w). F(s, N(0, I)) is the behaviour, so the KL, in closed form, bounds the one from the
log. All learn in the same steps. Online F stays as it is, and RLPD goes on with the actor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_offrl.agents.flow import BehaviourFlow, Distillation
from safe_offrl.agents.iql import IQLConfig, IQLValues
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Penalty, Steering, steered
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.policies.gaussian import Gaussian
from safe_offrl.policies.latent import LATENT, Latent, LatentNetwork
from safe_offrl.policies.protocol import normal
from safe_offrl.types import Batch


@dataclass(frozen=True)
class LatentConfig:
    """Settings of latent steering: of IQL's values as published, and one of its own.

    ``tau`` is also that of the flow's average. ``kl_weight`` of KL(pi || N(0, I)) over the noise,
    in nats, against the normalised critics: the larger, the nearer to the log.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    expectile: float = 0.7
    kl_weight: float = 0.1


class LatentSteering:
    """Values, flow, generator and actor, each with an optimiser of its own."""

    Config = LatentConfig
    Online: type[OnlineAgent] | None = None
    kinds = (LATENT,)

    def __init__(self, setup: Setup, config: LatentConfig) -> None:
        self.networks, self.generator, self.config = setup.networks, setup.generator, config
        lr, compute, self.actor = config.learning_rate, setup.compute, setup.networks.actor
        network = self.actor.layers
        assert isinstance(network, LatentNetwork)
        values = IQLConfig(lr, config.discount, config.tau, config.expectile)
        self.values = IQLValues(self.networks, values, self.generator, compute)
        self.behaviour = BehaviourFlow(self.networks, lr, config.tau, self.generator, compute)
        self.distillation = Distillation(network.generator, self.behaviour.actions, lr, compute)
        self.actor_optimizer = Adam(self.actor.parameters(), lr)
        self._descend_actor = Descent(self.actor_loss, self.actor_optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            **self.values.parts(),
            **self.behaviour.parts(),
            **self.distillation.parts(),
            "actor_optimizer": self.actor_optimizer,
        }

    def actor_loss(
        self, batch: Batch, noise: Tensor, penalties: tuple[Penalty, ...]
    ) -> tuple[Tensor, Tensor]:
        """The objective of this module's docstring, mean over the batch; (loss, mean KL)."""
        policy = self.actor(batch.observations)
        assert isinstance(policy, Latent)
        over_noise = policy.over_noise
        zeros = torch.zeros_like(over_noise.mean)
        divergence = over_noise.divergence(Gaussian(zeros, zeros))
        loss = steered(policy.quadrature(noise), batch, self.networks.q, penalties)
        loss = loss + self.config.kl_weight * divergence
        return loss.mean(), divergence.detach().mean()

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of each: values, flow, generator, actor."""
        _, metrics = self.values.update(batch)
        shape, generator = batch.actions.shape, self.generator
        x0, w, noise = (normal(shape, generator) for _ in range(3))
        t = torch.rand((len(batch.actions), 1), generator=generator, device=generator.device)
        flow_loss = self.behaviour.update(batch, x0, t)
        distillation_loss = self.distillation.update(batch.observations, w)
        actor_loss, divergence = self._descend_actor(batch, noise, steering.penalties)
        return metrics | {
            "actor/loss": actor_loss,
            "actor/kl_to_log": divergence,
            "actor/flow_loss": flow_loss,
            "actor/distillation_loss": distillation_loss,
        }
