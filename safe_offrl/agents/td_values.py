"""Critics of the policy that learns, by temporal differences.

    y = r + discount (1 - terminated) E_{a' ~ pi(s')} min_e Q'_e(s', a')

over target critics Q' (TD3's clipped double Q, arXiv:1802.09477, of any number of members). No
entropy in the backup. An agent may put another value of s' in the place of the expectation.
"""

from __future__ import annotations

from collections.abc import Callable

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
        next_value: Callable[..., Tensor] | None = None,
    ) -> None:
        """``next_value`` of a batch and what is drawn for it, [B], in place of the expectation."""
        self.networks, self.generator = networks, generator
        self.discount, self.tau = discount, tau
        self._next_value: Callable[..., Tensor] = next_value or self.expected_value
        self.critic_optimizer = Adam(networks.critics.parameters(), learning_rate)
        self._descend_critics = Descent(self.critic_loss, self.critic_optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {**self.networks.parts(), "critic_optimizer": self.critic_optimizer}

    def expected_value(self, batch: Batch, noise: Tensor) -> Tensor:
        """``E_{a' ~ pi(s')} min_e Q'_e(s', a')`` [B], of noise [B, *noise_shape]."""
        policy = self.networks.actor(batch.next_observations).quadrature(noise)
        return self.networks.target_value(batch.next_observations, policy)

    def critic_loss(self, batch: Batch, *drawn: object) -> tuple[Tensor]:
        """Sum over members of the mean squared error to the target of this module's docstring.

        ``drawn`` is what the next value is made of besides the batch: noise.
        """
        with torch.no_grad():
            next_value = self._next_value(batch, *drawn)
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

    def update(self, batch: Batch, *drawn: object) -> dict[str, Tensor]:
        """One step of the critics, then Polyak; scalars to log.

        Where nothing is given, noise of one action each is drawn.
        """
        if not drawn:
            drawn = (self.networks.actor.noise(batch.actions.shape[:-1], self.generator),)
        metrics = self.step(batch, *drawn)
        self.follow()
        return metrics

    def step(self, batch: Batch, *drawn: object) -> dict[str, Tensor]:
        """One step of the critics alone."""
        return {"agent/critic_loss": self._descend_critics(batch, *drawn)[0]}

    def follow(self) -> None:
        """Polyak: the target critics move towards the critics."""
        polyak_(self.networks.target_critics, self.networks.critics, self.tau)
