"""Flow matching: a model of the log's behaviour with as many modes as that has, and what makes its
actions in one step.

A flow v leads noise to the log's actions (flow matching, arXiv:2210.02747, with straight paths); a
generator F(s, w) learns to do in one step what Euler's method does with the flow in ten (FQL,
arXiv:2502.02538). Neither knows of values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import EAGER, Compute, Descent
from safe_offrl.compute.state import Part
from safe_offrl.policies.latent import generate
from safe_offrl.policies.mlp import linear_layers
from safe_offrl.policies.networks import Networks, polyak_
from safe_offrl.types import Batch

EULER_STEPS = 10  # of the flow from noise to an action, as in FQL


class BehaviourFlow:
    """The flow and its average, whose actions tremble less from step to step."""

    def __init__(
        self,
        networks: Networks,
        learning_rate: float,
        tau: float,
        generator: torch.Generator,
        compute: Compute = EAGER,
    ) -> None:
        """``tau`` is that of the average."""
        self.tau = tau
        o, a = networks.layout.sizes
        widths = (*networks.sizes.actor_hidden, a)
        self.flow = linear_layers(o + a + 1, widths, generator, layer_norm=True)
        # The border between two modes trembles with each step of the flow. Of a step that moves, a
        # regression makes a slope, which is actions between the modes: F learns from an average.
        self.target_flow = copy.deepcopy(self.flow).requires_grad_(False)
        self.flow_optimizer = Adam(self.flow.parameters(), learning_rate)
        self._descend = Descent(self.flow_loss, self.flow_optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            "flow": self.flow,
            "target_flow": self.target_flow,
            "flow_optimizer": self.flow_optimizer,
        }

    def flow_loss(self, batch: Batch, x0: Tensor, t: Tensor) -> tuple[Tensor]:
        """``|v(s, x_t, t) - (a - x0)|^2`` at ``x_t = (1-t) x0 + t a``, mean over batch and action.

        ``x0`` [B, A] is standard normal, ``t`` [B, 1] uniform in [0, 1] (FQL, arXiv:2502.02538).
        """
        x_t = (1.0 - t) * x0 + t * batch.actions
        error = velocity(self.flow, batch.observations, x_t, t) - (batch.actions - x0)
        return (error.square().mean(),)

    def actions(self, observations: Tensor, w: Tensor) -> Tensor:
        """Where the average leads from noise w, in [-1, 1]: [B, O], [B, A] -> [B, A]."""
        return integrate(self.target_flow, observations, w)

    def update(self, batch: Batch, x0: Tensor, t: Tensor) -> Tensor:
        """One step of the flow, then of its average; the loss."""
        (loss,) = self._descend(batch, x0, t)
        polyak_(self.target_flow, self.flow, self.tau)
        return loss


class Distillation:
    """Teaches the frozen generator of a policy's network to make another's actions in one step."""

    def __init__(
        self,
        frozen: nn.Module,
        teacher: Callable[[Tensor, Tensor], Tensor],
        learning_rate: float,
        compute: Compute = EAGER,
    ) -> None:
        """``teacher`` makes actions [B, A] of observations [B, O] and noise [B, A]."""
        self.action_generator = learnable(frozen)
        self._teacher = teacher
        self.generator_optimizer = Adam(self.action_generator.parameters(), learning_rate)
        self._descend = Descent(self.distillation_loss, self.generator_optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps; the generator is part of the actor."""
        return {"generator_optimizer": self.generator_optimizer}

    def distillation_loss(self, observations: Tensor, w: Tensor) -> tuple[Tensor]:
        """``|F(s, w) - teacher(s, w)|^2``, mean over batch and action (FQL, arXiv:2502.02538)."""
        with torch.no_grad():
            target = self._teacher(observations, w)
        error = generate(self.action_generator, observations, w) - target
        return (error.square().mean(),)

    def update(self, observations: Tensor, w: Tensor) -> Tensor:
        """One step of the generator, at standard normal noise [B, A]; the loss."""
        return self._descend(observations, w)[0]


def velocity(flow: nn.Module, observations: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """v(s, x, t) of a flow: [B, O], [B, A], [B, 1] -> [B, A]."""
    v: Tensor = flow(torch.cat([observations, x, t], dim=-1))
    return v


def integrate(flow: nn.Module, observations: Tensor, w: Tensor) -> Tensor:
    """The action [B, A] to which a flow leads from noise w [B, A], by Euler's method.

    Where it leads outside of [-1, 1] it is clipped.
    """
    x = w
    for step in range(EULER_STEPS):
        t = torch.full_like(w[:, :1], step / EULER_STEPS)
        x = x + velocity(flow, observations, x, t) / EULER_STEPS
    return x.clamp(-1.0, 1.0)


def learnable(frozen: nn.Module) -> nn.Module:
    """A policy's frozen generator as a module that takes gradients, of the same memory.

    What an optimiser does to the one is done to the other, and the policy's stays frozen.
    """
    twin = copy.deepcopy(frozen).requires_grad_()
    for mine, theirs in zip(twin.parameters(), frozen.parameters(), strict=True):
        mine.data = theirs.data
    return twin
