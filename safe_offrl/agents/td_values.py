"""Critics of the policy that learns, by temporal differences: those of awac and crr.

    y = r + discount (1 - terminated) E_{a' ~ pi(s')} min_e Q'_e(s', a')

over target critics Q' (TD3's clipped double Q, arXiv:1802.09477, of any number of members). No
entropy in the backup.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import EAGER, Compute, Descent
from safe_offrl.compute.state import Part
from safe_offrl.nn.losses import td_target
from safe_offrl.policies.networks import Networks, polyak_
from safe_offrl.policies.protocol import Quadrature
from safe_offrl.types import Batch


class TDValues:
    """The networks' critics, their targets and their optimiser."""

    def __init__(
        self,
        networks: Networks,
        generator: torch.Generator,
        compute: Compute = EAGER,
        *,
        learning_rate: float,
        discount: float,
        tau: float,
    ) -> None:
        self.networks, self.generator = networks, generator
        self.discount, self.tau = discount, tau
        self.critic_optimizer = Adam(networks.critics.parameters(), learning_rate)
        self._descend_critics = Descent(self.critic_loss, self.critic_optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {**self.networks.parts(), "critic_optimizer": self.critic_optimizer}

    def critic_loss(self, batch: Batch, next_noise: Tensor) -> tuple[Tensor]:
        """Sum over members of the mean squared error to the target of this module's docstring.

        ``next_noise`` [B, *noise_shape] drives the policy's actions at s'.
        """
        with torch.no_grad():
            policy = self.networks.actor(batch.next_observations).quadrature(next_noise)
            next_value = self.networks.target_value(batch.next_observations, policy)
            target = td_target(batch.rewards, batch.terminated, next_value, self.discount)
        q = self.networks.q(batch.observations, batch.actions)
        return ((q - target).square().mean(-1).sum(),)

    def advantages(self, batch: Batch, policy: Quadrature) -> Tensor:
        """``min_e Q_e(s, a) - E_{a' ~ pi(s)} min_e Q_e(s, a')`` of logged actions, [B].

        ``policy`` stands for pi at the batch's observations.
        """
        of_policy = self.networks.q(policy.repeat(batch.observations), policy.actions).amin(0)
        logged = self.networks.q(batch.observations, batch.actions).amin(0)
        return logged - policy.expect(of_policy)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the critics, then Polyak; scalars to log."""
        noise = self.networks.actor.noise(batch.actions.shape[:-1], self.generator)
        (loss,) = self._descend_critics(batch, noise)
        polyak_(self.networks.target_critics, self.networks.critics, self.tau)
        return {"agent/critic_loss": loss}
