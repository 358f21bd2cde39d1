"""Discrete BCQ (Fujimoto et al. 2019, arXiv:1910.01708): Q-learning among the log's likely actions.

A model of the log's behaviour learns by cross-entropy, and the actions that it holds for likely
enough, ``pi_b(a|s) / max_a pi_b(a|s) > threshold``, are all that targets and policy may choose:

    r + discount (1 - terminated) Q'(s', argmax_{a likely at s'} Q(s', a)),    Huber's loss

(double Q-learning, as published). Q chooses by the mean of the critics, and each learns from its
own target, where the paper has one network. The model is a network of its own instead of a second
head, and its logits are not pressed to 0. The actor is that of agents/greedy.py, masked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from safe_offrl.agents.greedy import GreedyActor, of_every_action, td_targets
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.policies.categorical import CATEGORICAL
from safe_offrl.policies.mlp import linear_layers
from safe_offrl.policies.networks import polyak_
from safe_offrl.types import Batch


@dataclass(frozen=True)
class DiscreteBCQConfig:
    """Settings of discrete BCQ; ``threshold`` is the paper's tau, a share of the likeliest.

    At 0 it is double DQN, near 1 behaviour cloning. ``temperature`` of the actor, in mean
    magnitudes of Q.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    threshold: float = 0.3
    temperature: float = 0.02


class DiscreteBCQ:
    """Behaviour model, critics and actor, each with an optimiser of its own."""

    Config = DiscreteBCQConfig
    Online: type[OnlineAgent] | None = None
    kinds = (CATEGORICAL,)

    def __init__(self, setup: Setup, config: DiscreteBCQConfig) -> None:
        self.networks, self.config = setup.networks, config
        lr, networks = config.learning_rate, self.networks
        o, a = networks.layout.sizes
        self.behaviour = linear_layers(o, (*networks.sizes.actor_hidden, a), setup.generator)
        self.behaviour_optimizer = Adam(self.behaviour.parameters(), lr)
        self.critic_optimizer = Adam(networks.critics.parameters(), lr)
        self._descend_behaviour = Descent(
            self.behaviour_loss, self.behaviour_optimizer, setup.compute
        )
        self._descend_critics = Descent(self.critic_loss, self.critic_optimizer, setup.compute)
        self.greedy = GreedyActor(
            networks.actor, self.mean_q, config.temperature, lr, setup.compute, self.likely
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            **self.networks.parts(),
            "behaviour": self.behaviour,
            "behaviour_optimizer": self.behaviour_optimizer,
            "critic_optimizer": self.critic_optimizer,
            **self.greedy.parts(),
        }

    @torch.no_grad()
    def mean_q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The mean of the critics, by which it acts, [1, B]."""
        return self.networks.q(observations, actions).mean(0, keepdim=True)

    @torch.no_grad()
    def likely(self, observations: Tensor) -> Tensor:
        """Whether ``pi_b(a|s) / max_a pi_b(a|s) > threshold``: [B, O] -> bool [B, A]."""
        logits: Tensor = self.behaviour(observations)
        return (logits - logits.amax(-1, keepdim=True)).exp() > self.config.threshold

    def behaviour_loss(self, batch: Batch) -> tuple[Tensor]:
        """``-log pi_b(a|s)`` of logged actions, mean over the batch."""
        return (F.cross_entropy(self.behaviour(batch.observations), batch.actions),)

    def critic_loss(self, batch: Batch) -> tuple[Tensor]:
        """Huber loss to the target of this module's docstring, mean over batch, sum of critics."""
        networks, following = self.networks, batch.next_observations
        a = networks.layout.action_size
        with torch.no_grad():
            unlikely = ~self.likely(following)
            next_q = of_every_action(self.mean_q, following, a)[0].T
            chosen = next_q.masked_fill(unlikely, -math.inf).argmax(-1)
            next_actions = torch.eye(a, device=chosen.device)[chosen]
            next_values = networks.target_q(following, next_actions)
            targets = td_targets(batch, next_values, self.config.discount)
        q = networks.q(batch.observations, batch.actions)
        return (F.huber_loss(q, targets, reduction="none").mean(-1).sum(),)

    def update_critics(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the behaviour model, one of the critics, then Polyak."""
        (behaviour_loss,) = self._descend_behaviour(batch)
        (critic_loss,) = self._descend_critics(batch)
        polyak_(self.networks.target_critics, self.networks.critics, self.config.tau)
        return {"agent/behaviour_loss": behaviour_loss, "agent/critic_loss": critic_loss}

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """Behaviour model and critics, then the actor."""
        return self.update_critics(batch) | self.greedy.update(batch, steering)
