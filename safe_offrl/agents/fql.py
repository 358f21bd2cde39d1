"""FQL, flow Q-learning (Park et al. 2025, arXiv:2502.02538): a policy with as many modes as the
log, which the critics move from there.

A flow v learns the log's behaviour, and the actor makes an action of noise in one step:

    minimise E_{z, eps}[ weight |a - Euler(v'; s, z)|^2 - Q(s, a)/|Q| + sum lambda Q_C(s, a) ]

with a = tanh(m(s, z) + SIGMA eps) (:mod:`safe_offrl.policies.one_step`). The critics learn from the
actor's own next actions. Where it differs: FQL has no eps, v' is the flow's average, and Q is
normalised, which FQL's authors recommend for new tasks and did not use in the paper.

Online the objective is the same, as in the paper: the flow goes on learning from the batch, half of
which is the log, so that what a is held to moves as the behaviour does, and no weight has to be let
go of. An anchor adds its divergence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safe_offrl.agents.flow import BehaviourFlow
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Penalty, Steering, steered
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.nn.losses import td_target
from safe_offrl.policies.networks import Actor, polyak_
from safe_offrl.policies.one_step import ONE_STEP, OneStep
from safe_offrl.policies.protocol import normal
from safe_offrl.types import Batch


@dataclass(frozen=True)
class FQLConfig:
    """Settings of FQL as published, but for ``weight``, alpha in the paper.

    It is that of the distance from the flow, against normalised critics: with those the authors try
    .03 to 10. A small one lets an action change from one of the log's modes to another, a large one
    imitates; between the two, near 1, actions stop half-way, where the log has none. ``aggregate``
    makes one target of all critics; in the paper the minimum is for AntMaze. ``tau`` is also that
    of the flow's average.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    weight: float = 0.3
    aggregate: Literal["mean", "min"] = "mean"


class FQL:
    """Critics, flow and actor, each with an optimiser of its own; offline and online alike."""

    Config = FQLConfig
    Online: type[OnlineAgent] | None = None
    kinds = (ONE_STEP,)
    own_values = True
    return_discount: float | None = None

    def __init__(self, setup: Setup, config: FQLConfig) -> None:
        self.networks, self.generator, self.config = setup.networks, setup.generator, config
        lr, compute = config.learning_rate, setup.compute
        self.behaviour = BehaviourFlow(self.networks, lr, config.tau, self.generator, compute)
        self.critic_optimizer = Adam(self.networks.critics.parameters(), lr)
        self.actor_optimizer = Adam(self.networks.actor.parameters(), lr)
        self._descend_critics = Descent(self.critic_loss, self.critic_optimizer, compute)
        self._descend_actor = Descent(self.actor_loss, self.actor_optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            **self.networks.parts(),
            **self.behaviour.parts(),
            "critic_optimizer": self.critic_optimizer,
            "actor_optimizer": self.actor_optimizer,
        }

    def critic_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor]:
        """Sum over members of the mean squared error to ``r + g (1-d) mean Q'(s', a')``.

        ``noise`` [B, 2 A] is of the actor's actions a' at s'.
        """
        with torch.no_grad():
            policy = self.networks.actor(batch.next_observations).quadrature(noise)
            q = self.networks.target_q(batch.next_observations, policy.actions)
            next_value = q.amin(0) if self.config.aggregate == "min" else q.mean(0)
            target = td_target(batch.rewards, batch.terminated, next_value, self.config.discount)
        q = self.networks.q(batch.observations, batch.actions)
        return ((q - target).square().mean(-1).sum(),)

    def actor_loss(
        self,
        batch: Batch,
        noise: Tensor,
        penalties: tuple[Penalty, ...],
        anchor: Actor | None,
        kl_weight: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        """The objective of this module's docstring, and ``kl_weight`` times the KL from ``anchor``.

        The KL is given z, at other z than it is measured at. ``noise`` [B, 2 A] holds z, then eps.
        Mean over the batch; (loss, mean of the squared distance).
        """
        policy = self.networks.actor(batch.observations)
        assert isinstance(policy, OneStep)
        z = noise.chunk(2, dim=-1)[0]
        actions = policy.quadrature(noise)
        with torch.no_grad():
            logged = self.behaviour.actions(batch.observations, z)
        distance = (actions.actions - logged).square().mean(-1)
        loss = steered(actions, batch, self._mean_q, penalties) + self.config.weight * distance
        if anchor is not None:
            with torch.no_grad():
                anchored = anchor(batch.observations)
            assert isinstance(anchored, OneStep)
            loss = loss + kl_weight * policy.divergence_given(anchored, z)
        return loss.mean(), distance.detach().mean()

    def _mean_q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The mean of all critics [1, B]: the actor climbs it, as in the paper."""
        return self.networks.q(observations, actions).mean(0, keepdim=True)

    def update_critics(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the critics, then Polyak."""
        noise = self.networks.actor.noise(batch.actions.shape[:-1], self.generator)
        (loss,) = self._descend_critics(batch, noise)
        polyak_(self.networks.target_critics, self.networks.critics, self.config.tau)
        return {"learner/critic_loss": loss}

    def update_actor(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the flow and its average, one of the actor."""
        shape, generator = batch.actions.shape, self.generator
        x0, noise = normal(shape, generator), self.networks.actor.noise(shape[:-1], generator)
        t = torch.rand((len(batch.actions), 1), generator=generator, device=generator.device)
        flow_loss = self.behaviour.update(batch, x0, t)
        loss, distance = self._descend_actor(batch, noise, *steering)
        return {
            "learner/actor_loss": loss,
            "learner/flow_loss": flow_loss,
            "learner/distance_from_flow": distance,
        }

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of each: critics, flow, actor."""
        return self.update_critics(batch) | self.update_actor(batch, steering)


FQL.Online = FQL
