"""Ensemble-DQN and REM (Agarwal et al. 2020, arXiv:1907.04543), for discrete actions.

Ensemble-DQN: each head k learns ``r + discount max_a Q_k'(s', a)`` from its own target head, and
the mean of all acts. REM: so does ``Q = sum_k alpha_k Q_k``, its alpha drawn anew for each batch,
the same in prediction and target. The loss is Huber's, as in both. The first is the second with
every head by itself for a mixture, so they are one loss.

alpha are uniform draws divided by their sum, as in the paper: on the simplex, and nearer to its
middle than a uniform distribution on it. Heads here are separate networks with LayerNorm, 5 to 10,
instead of 200 heads of one; targets follow by Polyak averages instead of copies. The actor is that
of agents/greedy.py.
"""

from __future__ import annotations

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
from safe_offrl.policies.networks import polyak_
from safe_offrl.types import Batch


@dataclass(frozen=True)
class DQNConfig:
    """Settings of Ensemble-DQN and REM; ``temperature`` of the actor, in mean magnitudes of Q."""

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    temperature: float = 0.02


class DQN:
    """Ensemble-DQN: every head learns from itself; or, ``mixed``, REM."""

    Config = DQNConfig
    Online: type[OnlineAgent] | None = None
    kinds = (CATEGORICAL,)

    def __init__(self, setup: Setup, config: DQNConfig, *, mixed: bool = False) -> None:
        self.networks, self.generator, self.config = setup.networks, setup.generator, config
        self.mixed = mixed
        lr, networks = config.learning_rate, self.networks
        self.critic_optimizer = Adam(networks.critics.parameters(), lr)
        self._descend_critics = Descent(self.critic_loss, self.critic_optimizer, setup.compute)
        self.greedy = GreedyActor(
            networks.actor, self.mean_q, config.temperature, lr, setup.compute
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            **self.networks.parts(),
            "critic_optimizer": self.critic_optimizer,
            **self.greedy.parts(),
        }

    @torch.no_grad()
    def mean_q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The mean of the heads, by which both act, [1, B]."""
        return self.networks.q(observations, actions).mean(0, keepdim=True)

    def mixtures(self) -> Tensor:
        """Weights of the heads [M, E] in each of M mixtures that learn: each alone, or one draw."""
        heads, device = self.networks.critics.members, self.generator.device
        if not self.mixed:
            return torch.eye(heads, device=device)
        alpha = torch.rand((1, heads), generator=self.generator, device=device)
        return alpha / alpha.sum()

    def critic_loss(self, batch: Batch, mixtures: Tensor) -> tuple[Tensor]:
        """Huber loss of ``Q - (r + discount (1 - terminated) max_a Q'(s', a))``, mean over batch.

        Q and Q' are mixtures [M, E] of the heads and of the target heads; summed over mixtures.
        """
        networks = self.networks
        with torch.no_grad():
            actions = networks.layout.action_size
            next_q = of_every_action(networks.target_q, batch.next_observations, actions)
            next_values = torch.einsum("me,eab->mab", mixtures, next_q).amax(1)
            targets = td_targets(batch, next_values, self.config.discount)
        q = mixtures @ networks.q(batch.observations, batch.actions)
        return (F.huber_loss(q, targets, reduction="none").mean(-1).sum(),)

    def update_critics(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the heads, then Polyak."""
        (loss,) = self._descend_critics(batch, self.mixtures())
        polyak_(self.networks.target_critics, self.networks.critics, self.config.tau)
        return {"agent/critic_loss": loss}

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """The heads, then the actor."""
        return self.update_critics(batch) | self.greedy.update(batch, steering)


class REM:
    """Random ensemble mixture: Ensemble-DQN with a random mixture of its heads."""

    Config = DQNConfig
    Online: type[OnlineAgent] | None = None
    kinds = (CATEGORICAL,)

    def __init__(self, setup: Setup, config: DQNConfig) -> None:
        self.dqn = DQN(setup, config, mixed=True)
        self.parts, self.update = self.dqn.parts, self.dqn.update
