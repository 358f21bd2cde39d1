"""QR-DQN (Dabney et al. 2018, arXiv:1710.10044): quantiles of the return, for discrete actions.

A network gives N quantiles theta_i(s, a) of every action, at the midpoints (2i - 1) / (2N), i from
1. With ``a* = argmax_a mean_j theta_j'(s', a)`` and the targets
``y_j = r + discount (1 - terminated) theta_j'(s', a*)`` the loss is
``sum_i mean_j rho_i(y_j - theta_i)`` of :func:`quantile_huber_loss` (eq. 10, algorithm 1).

Its mean is Q, by which the actor of agents/greedy.py learns. The critics that the online phase goes
on from learn that mean too, by regression at every action: they take no part in what it learns.
Targets follow by Polyak averages instead of copies, and the network has LayerNorm where critics do.
"""

from __future__ import annotations

import copy
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
class QRDQNConfig:
    """Settings of QR-DQN: ``quantiles`` N, 200 in the paper; ``temperature`` of the actor.

    The temperature is in mean magnitudes of Q.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    quantiles: int = 50
    temperature: float = 0.02


def quantile_huber_loss(quantiles: Tensor, targets: Tensor) -> Tensor:
    """``sum_i mean_j |tau_i - 1(u < 0)| H(u)``, u = target_j - quantile_i: [B, N], [B, M] -> [B].

    tau_i = (2i - 1) / (2N), and H is Huber's loss with its threshold at 1: ``u^2 / 2`` up to it,
    ``|u| - 1/2`` beyond (eq. 9 and 10).
    """
    n = quantiles.shape[-1]
    midpoints = (torch.arange(n, device=quantiles.device) + 0.5) / n
    of_quantiles, of_targets = torch.broadcast_tensors(
        quantiles.unsqueeze(-1), targets.unsqueeze(-2)
    )
    below = (of_targets < of_quantiles).to(quantiles.dtype)
    huber = F.huber_loss(of_quantiles, of_targets, reduction="none")
    return ((midpoints.unsqueeze(-1) - below).abs() * huber).mean(-1).sum(-1)


class QRDQN:
    """Quantiles, critics that follow their mean, and actor, each with an optimiser of its own."""

    Config = QRDQNConfig
    Online: type[OnlineAgent] | None = None
    kinds = (CATEGORICAL,)

    def __init__(self, setup: Setup, config: QRDQNConfig) -> None:
        self.networks, self.config = setup.networks, config
        lr, networks = config.learning_rate, self.networks
        o, a = networks.layout.sizes
        sizes = networks.sizes
        self.quantiles = linear_layers(
            o,
            (*sizes.critic_hidden, a * config.quantiles),
            setup.generator,
            layer_norm=sizes.layer_norm,
        )
        self.target_quantiles = copy.deepcopy(self.quantiles).requires_grad_(False)
        self.quantile_optimizer = Adam(self.quantiles.parameters(), lr)
        self.critic_optimizer = Adam(networks.critics.parameters(), lr)
        self._descend_quantiles = Descent(
            self.quantile_loss, self.quantile_optimizer, setup.compute
        )
        self._descend_critics = Descent(self.critic_loss, self.critic_optimizer, setup.compute)
        self.greedy = GreedyActor(
            networks.actor, self.mean_q, config.temperature, lr, setup.compute
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            **self.networks.parts(),
            "quantiles": self.quantiles,
            "target_quantiles": self.target_quantiles,
            "quantile_optimizer": self.quantile_optimizer,
            "critic_optimizer": self.critic_optimizer,
            **self.greedy.parts(),
        }

    def by_action(self, outputs: Tensor) -> Tensor:
        """A network's outputs [B, A N] as quantiles of each action [B, A, N]."""
        return outputs.unflatten(-1, (self.networks.layout.action_size, self.config.quantiles))

    @torch.no_grad()
    def mean_q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The mean of the quantiles of given actions: [B, O], [B, A] -> [1, B]."""
        q = self.by_action(self.quantiles(observations)).mean(-1)
        return (q * actions).sum(-1).unsqueeze(0)

    def quantile_loss(self, batch: Batch) -> tuple[Tensor]:
        """Quantile Huber loss of logged actions, mean over the batch; see this module's docstring.

        The mean and not the sum over the batch, the sum over quantiles as published.
        """
        with torch.no_grad():
            following = self.by_action(self.target_quantiles(batch.next_observations))
            best = following.mean(-1).argmax(-1)
            values = following[torch.arange(len(best), device=best.device), best]
            targets = td_targets(batch, values.T, self.config.discount).T
        every = self.by_action(self.quantiles(batch.observations))
        quantiles = (every * batch.actions.unsqueeze(-1)).sum(-2)
        return (quantile_huber_loss(quantiles, targets).mean(),)

    def critic_loss(self, batch: Batch) -> tuple[Tensor]:
        """Squared error of every critic to Q at every action, mean over both, sum of critics."""
        actions = self.networks.layout.action_size
        with torch.no_grad():
            target = self.by_action(self.quantiles(batch.observations)).mean(-1).T
        q = of_every_action(self.networks.q, batch.observations, actions)
        return ((q - target).square().mean((1, 2)).sum(),)

    def update_critics(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the quantiles, one of the critics, then Polyak of both."""
        (quantile_loss,) = self._descend_quantiles(batch)
        (critic_loss,) = self._descend_critics(batch)
        polyak_(self.target_quantiles, self.quantiles, self.config.tau)
        polyak_(self.networks.target_critics, self.networks.critics, self.config.tau)
        return {"agent/quantile_loss": quantile_loss, "agent/critic_loss": critic_loss}

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """Quantiles and critics, then the actor."""
        return self.update_critics(batch) | self.greedy.update(batch, steering)
