"""Latent steering: a policy with as many modes as the log, which stays within the log's support.

A flow learns the log's behaviour, a generator F makes its actions in one step, and the actor, a
Gaussian over F's noise, is steered by gradients through F (DSRL, arXiv:2506.15799, with FQL's
one-step generator, arXiv:2502.02538, and IQL's values, which never ask about unlogged actions):

    minimise E_{w ~ pi}[ -Q(s, a)/|Q| + sum lambda Q_C(s, a) ] + weight KL(pi || N(0, I))

with a = F(s, w). F(s, N(0, I)) is the behaviour, so the KL, in closed form, bounds the one from the
log. All learn in the same steps. Online F stays as it is, and RLPD goes on with the actor.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safe_offrl.agents.iql import IQLConfig, IQLValues
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Penalty, Steering, steered
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.policies.gaussian import Gaussian
from safe_offrl.policies.latent import LATENT, Latent, LatentNetwork, generate
from safe_offrl.policies.mlp import linear_layers
from safe_offrl.policies.networks import polyak_
from safe_offrl.policies.protocol import normal
from safe_offrl.types import Batch

EULER_STEPS = 10  # of the flow from noise to an action, as in FQL


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
        lr, self.actor = config.learning_rate, setup.networks.actor
        values = IQLConfig(lr, config.discount, config.tau, config.expectile)
        self.values = IQLValues(self.networks, values, self.generator, setup.compute)
        o, a = self.networks.layout.sizes
        widths = (*self.networks.sizes.actor_hidden, a)
        self.flow = linear_layers(o + a + 1, widths, self.generator, layer_norm=True)
        # The border between two modes trembles with each step of the flow. Of a step that moves, a
        # regression makes a slope, which is actions between the modes: F learns from an average.
        self.target_flow = copy.deepcopy(self.flow).requires_grad_(False)
        self.action_generator = learnable(self.actor.layers)
        self.flow_optimizer = Adam(self.flow.parameters(), lr)
        self.generator_optimizer = Adam(self.action_generator.parameters(), lr)
        self.actor_optimizer = Adam(self.actor.parameters(), lr)
        self._descend_flow = Descent(self.flow_loss, self.flow_optimizer, setup.compute)
        self._descend_generator = Descent(
            self.distillation_loss, self.generator_optimizer, setup.compute
        )
        self._descend_actor = Descent(self.actor_loss, self.actor_optimizer, setup.compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps; the generator is part of the actor."""
        return {
            **self.values.parts(),
            "flow": self.flow,
            "target_flow": self.target_flow,
            "flow_optimizer": self.flow_optimizer,
            "generator_optimizer": self.generator_optimizer,
            "actor_optimizer": self.actor_optimizer,
        }

    def flow_loss(self, batch: Batch, x0: Tensor, t: Tensor) -> tuple[Tensor]:
        """``|v(s, x_t, t) - (a - x0)|^2`` at ``x_t = (1-t) x0 + t a``, mean over batch and action.

        ``x0`` [B, A] is standard normal, ``t`` [B, 1] uniform in [0, 1] (FQL, arXiv:2502.02538).
        """
        x_t = (1.0 - t) * x0 + t * batch.actions
        error = velocity(self.flow, batch.observations, x_t, t) - (batch.actions - x0)
        return (error.square().mean(),)

    def distillation_loss(self, observations: Tensor, w: Tensor) -> tuple[Tensor]:
        """``|F(s, w) - Euler(v'; s, w)|^2``, mean over batch and action (FQL, arXiv:2502.02538).

        v' is the flow's average; where it leads outside of [-1, 1] it is clipped.
        """
        with torch.no_grad():
            target = integrate(self.target_flow, observations, w)
        error = generate(self.action_generator, observations, w) - target
        return (error.square().mean(),)

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
        (flow_loss,) = self._descend_flow(batch, x0, t)
        polyak_(self.target_flow, self.flow, self.config.tau)
        (distillation_loss,) = self._descend_generator(batch.observations, w)
        actor_loss, divergence = self._descend_actor(batch, noise, steering.penalties)
        return metrics | {
            "actor/loss": actor_loss,
            "actor/kl_to_log": divergence,
            "actor/flow_loss": flow_loss,
            "actor/distillation_loss": distillation_loss,
        }


def velocity(flow: nn.Module, observations: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """v(s, x, t) of a flow: [B, O], [B, A], [B, 1] -> [B, A]."""
    v: Tensor = flow(torch.cat([observations, x, t], dim=-1))
    return v


def integrate(flow: nn.Module, observations: Tensor, w: Tensor) -> Tensor:
    """The action [B, A] to which a flow leads from noise w [B, A], by Euler's method."""
    x = w
    for step in range(EULER_STEPS):
        t = torch.full_like(w[:, :1], step / EULER_STEPS)
        x = x + velocity(flow, observations, x, t) / EULER_STEPS
    return x.clamp(-1.0, 1.0)


def learnable(network: nn.Module) -> nn.Module:
    """The generator of a policy's network as a module that takes gradients, of the same memory.

    What an optimiser does to the one is done to the other, and the policy's stays frozen.
    """
    assert isinstance(network, LatentNetwork)
    frozen = network.generator
    twin = copy.deepcopy(frozen).requires_grad_()
    for mine, theirs in zip(twin.parameters(), frozen.parameters(), strict=True):
        mine.data = theirs.data
    return twin
