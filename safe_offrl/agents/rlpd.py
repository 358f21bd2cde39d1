"""RLPD (Ball et al. 2023, arXiv:2302.02948): the online learner, and the value pre-alignment before
it.

SAC with a LayerNorm critic ensemble: the target is the minimum over a random subset of two members
drawn without replacement, the actor climbs the MEAN of all, truncation bootstraps. Two additions,
both off when their weights are zero: in the actor's loss lambda times each safety critic's risk,
and a KL penalty that keeps the learner within reach of the policy that acts. Where actions are
discrete every expectation over the policy is exact (SAC-Discrete, Christodoulou 2019,
arXiv:1910.07207).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import EAGER, Compute, Descent
from safe_offrl.compute.state import Part
from safe_offrl.nn.losses import td_target
from safe_offrl.policies.networks import EVERY, Actor, Members, Networks, polyak_
from safe_offrl.types import Batch


@dataclass(frozen=True)
class RLPDConfig:
    """Settings of RLPD as published; ``subset`` is 1 for AntMaze and pixels in the paper.

    ``target_entropy`` per action dimension: -0.5 is RLPD's -|A|/2. ``discrete_entropy`` takes its
    place where actions are discrete, as a share of log A, the most there can be. SAC-Discrete's .98
    is nearly uniform; at .3 the best of four actions has a probability of about .91. No entropy in
    the backup.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    subset: int = 2
    target_entropy: float = -0.5
    discrete_entropy: float = 0.3
    temperature_init: float = 0.01


class RLPD:
    """The online learner; takes over the networks that an offline agent has trained."""

    own_values = False
    return_discount: float | None = None

    def __init__(
        self,
        networks: Networks,
        config: RLPDConfig,
        generator: torch.Generator,
        compute: Compute = EAGER,
        *,
        least_scale: float = 1e-6,
    ) -> None:
        """``least_scale`` is what the actor's Q is divided by at least."""
        self.networks = networks
        self.config = config
        self.generator = generator
        self._least_scale = least_scale
        action_size = networks.layout.action_size
        device = next(networks.actor.parameters()).device
        self.log_temperature = torch.tensor(config.temperature_init, device=device).log()
        self.log_temperature.requires_grad_()
        target_entropy = networks.actor.kind.target_entropy
        self._target_entropy = (
            target_entropy(action_size, config.target_entropy, config.discrete_entropy)
            if target_entropy is not None
            else math.nan  # then it learns values alone, and this is not asked for
        )
        lr = config.learning_rate
        self.actor_optimizer = Adam(networks.actor.parameters(), lr)
        self.critic_optimizer = Adam(networks.critics.parameters(), lr)
        self.temperature_optimizer = Adam([self.log_temperature], lr)
        self._descend_critics = Descent(self.critic_loss, self.critic_optimizer, compute)
        self._descend_actor = Descent(self.actor_loss, self.actor_optimizer, compute)
        self._descend_temperature = Descent(
            self.temperature_loss, self.temperature_optimizer, replace(EAGER, device=compute.device)
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            **self.networks.parts(),
            "log_temperature": self.log_temperature,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "temperature_optimizer": self.temperature_optimizer,
        }

    def critic_loss(self, batch: Batch, noise: Tensor, members: Members) -> tuple[Tensor]:
        """Sum over members of the mean squared TD error; ``members`` [subset] form the target."""
        with torch.no_grad():
            policy = self.networks.actor(batch.next_observations).quadrature(noise)
            next_value = self.networks.target_value(batch.next_observations, policy, members)
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
        """``E_pi[-Q/|Q| + temperature log pi + sum lambda Q_C] + kl_weight KL(pi||anchor)``, mean.

        Q is divided by its mean magnitude (TD3+BC, arXiv:2106.06860, eq. 5), so that temperature,
        lambda and kl_weight mean the same on every reward scale. log pi is whatever density the
        policy scores itself by. Returns (loss, mean log pi).
        """
        distribution = self.networks.actor.scored(batch.observations)
        policy, log_probs = distribution.scored(noise)
        observations = policy.repeat(batch.observations)
        q = self.networks.q(observations, policy.actions).mean(0)
        scale = policy.expect(q.detach().abs()).detach().mean()
        scale = scale.clamp_min(self._least_scale)
        loss = -q / scale + self.log_temperature.detach().exp() * log_probs
        for risk, multiplier in penalties:
            time_to_go = policy.repeat(batch.time_to_go)
            loss = loss + multiplier * risk(observations, time_to_go, policy.actions)
        loss = policy.expect(loss)
        if anchor is not None:
            with torch.no_grad():
                anchored = anchor(batch.observations)
            loss = loss + kl_weight * distribution.divergence(anchored)
        return loss.mean(), policy.expect(log_probs).detach().mean()

    def temperature_loss(self, log_prob: Tensor) -> tuple[Tensor]:
        """A barrier on ``-log pi`` (scalar mean): too little entropy raises the temperature."""
        return (-self.log_temperature.exp() * (log_prob + self._target_entropy),)

    def update_critics(self, batch: Batch) -> dict[str, Tensor]:
        """One TD step of all critics under the present actor; alone it is value pre-alignment."""
        generator = self.generator
        noise = self.networks.actor.noise(batch.actions.shape[:-1], generator)
        critics = self.networks.critics.members
        members: Members = EVERY
        if self.config.subset < critics:  # else there is nothing to choose, and nothing to copy
            drawn = torch.randperm(critics, generator=generator, device=generator.device)
            members = drawn[: self.config.subset]
        (loss,) = self._descend_critics(batch, noise, members)
        polyak_(self.networks.target_critics, self.networks.critics, self.config.tau)
        return {"learner/critic_loss": loss}

    def update_actor(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One actor step and one temperature step."""
        noise = self.networks.actor.noise(batch.actions.shape[:-1], self.generator)
        loss, log_prob = self._descend_actor(batch, noise, *steering)
        self._descend_temperature(log_prob)
        return {
            "learner/actor_loss": loss,
            "learner/entropy": -log_prob,
            "learner/temperature": self.log_temperature.detach().exp(),
        }
