"""The conservative safety critic (CSC): the probability of an accident before the horizon.

An ensemble of E networks gives logits of Q_C(s, time to go, a). Every member bootstraps from its
own target, so errors do not leak between them. The first ``reference`` members learn by plain TD;
the others are also pushed up at the policy's actions with weight alpha, and alpha is found by dual
ascent such that their V_accident(s0) exceeds the reference's by a stated gap (and, online, the
accident rate that was really seen). A fixed alpha is a lottery: the same number is nothing on one
task and makes everything look deadly on the next.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safe_offrl.distributions import sample
from safe_offrl.errors import ConfigError
from safe_offrl.losses import accident_td_loss, first_accident_target, push_up_loss
from safe_offrl.nets import Actor, StackedMLP, descend_, polyak_
from safe_offrl.state import Part
from safe_offrl.types import Batch

LOG_ALPHA_MIN = -12.0  # 6e-6: no pressure to speak of, and a way back up


@dataclass(frozen=True)
class SafetyCriticConfig:
    """Settings of the safety critic.

    ``target_gap`` (probability) is how far V_accident(s0) of the pushed members shall stand above
    plain TD's; ``alpha_max`` bounds the pressure used to get there. ``positive_share`` of each
    batch are accidents, drawn on purpose and weighted back to their true frequency.
    """

    members: int = 5
    reference: int = 2
    hidden: tuple[int, ...] = (256, 256)
    learning_rate: float = 3e-4
    tau: float = 0.01
    positive_share: float = 0.125
    target_gap: float = 0.02
    alpha_init: float = 1e-3
    alpha_max: float = 0.1
    alpha_learning_rate: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what would leave no member to push, or no target to push towards."""
        if not 1 <= self.reference < self.members:
            raise ConfigError(
                f"critic.reference is {self.reference} of {self.members} members, but at least 1 "
                "must learn by plain TD and at least 1 be pushed. Try 2 of 5."
            )
        if not 0.0 < self.target_gap < 1.0:
            raise ConfigError(
                f"critic.target_gap is {self.target_gap}, but a probability strictly between 0 and "
                "1 is needed. Try 0.02."
            )
        if not (0.0 <= self.positive_share < 1.0 and 0.0 < self.alpha_init <= self.alpha_max):
            raise ConfigError(
                f"critic.positive_share is {self.positive_share} and critic.alpha_init "
                f"{self.alpha_init}, but a share in [0, 1) and an alpha in (0, alpha_max] are "
                "needed. Try 0.25 and 0.001."
            )


class RiskEstimate(NamedTuple):
    """V_accident(s0): conservative mean, its one-sided upper limit, and plain TD's mean."""

    value: float
    upper: float
    reference: float


class SafetyCritic:
    """Composed with any agent; knows transitions and an actor, nothing of rewards."""

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        horizon: int,
        config: SafetyCriticConfig,
        generator: torch.Generator,
    ) -> None:
        self.config = config
        self.horizon = horizon
        self.net = StackedMLP(
            config.members,
            observation_size + 1 + action_size,
            config.hidden,
            layer_norm=True,
            generator=generator,
        )
        # Accidents are rare: start from "unlikely" instead of from a coin flip.
        with torch.no_grad():
            self.net.output.bias.fill_(-3.0)
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.log_alpha = torch.tensor(config.alpha_init).log()
        self.optimizer = torch.optim.Adam(
            self.net.parameters(), lr=config.learning_rate, fused=True
        )
        pushed = torch.ones(config.members)
        pushed[: config.reference] = 0.0
        self._pushed = pushed

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            "safety_critic": self.net,
            "safety_target": self.target,
            "safety_optimizer": self.optimizer,
            "safety_log_alpha": self.log_alpha,
        }

    @property
    def alpha(self) -> Tensor:
        """Present conservatism, a scalar tensor."""
        return self.log_alpha.exp()

    def logits(self, observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
        """Accident logits of all members: [B, O], [B], [B, A] -> [E, B]."""
        inputs = torch.cat([observations, time_to_go.unsqueeze(-1), actions], dim=-1)
        logits: Tensor = self.net(inputs)
        return logits

    def risk(self, observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
        """Q_C, the mean probability of the pushed members: [B, O], [B], [B, A] -> [B]."""
        logits = self.logits(observations, time_to_go, actions)
        return torch.sigmoid(logits[self.config.reference :]).mean(0)

    def loss(
        self,
        batch: Batch,
        weights: Tensor,
        actor: Actor,
        initial_observations: Tensor,
        noise: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """TD loss + alpha * push-up; reads only.

        ``weights`` [B] undo the stratified sampling; ``noise`` drives the policy's actions at next
        observations [B, A], observations [B, A] and initial observations [S, A].
        Returns (scalar loss, V of the pushed members at s0, V of the reference members at s0).
        """
        with torch.no_grad():
            next_actions, _ = sample(*actor(batch.next_observations), noise[0])
            next_time_to_go = (batch.time_to_go - 1.0 / self.horizon).clamp_min(0.0)
            next_inputs = torch.cat(
                [batch.next_observations, next_time_to_go.unsqueeze(-1), next_actions], dim=-1
            )
            next_values = torch.sigmoid(self.target(next_inputs))
            shape = next_values.shape
            targets = first_accident_target(
                batch.accidents.expand(shape),
                batch.terminated.expand(shape),
                next_time_to_go.expand(shape),
                next_values,
            )
            policy_actions, _ = sample(*actor(batch.observations), noise[1])
            initial_actions, _ = sample(*actor(initial_observations), noise[2])
        size = len(batch.rewards)
        # One pass of the network over logged actions, policy actions, and policy actions at s0.
        logits = self.logits(
            torch.cat([batch.observations, batch.observations, initial_observations]),
            torch.cat(
                [batch.time_to_go, batch.time_to_go, batch.time_to_go.new_ones(len(noise[2]))]
            ),
            torch.cat([batch.actions, policy_actions, initial_actions]),
        )
        td = accident_td_loss(logits[:, :size], targets, weights)
        push = push_up_loss(logits[:, size : 2 * size], weights)
        loss = (td + self.alpha * self._pushed * push).sum()
        at_start = torch.sigmoid(logits[:, 2 * size :].detach()).mean(-1)
        return (
            loss,
            at_start[self.config.reference :].mean(),
            at_start[: self.config.reference].mean(),
        )

    def update(
        self,
        batch: Batch,
        weights: Tensor,
        actor: Actor,
        initial_observations: Tensor,
        generator: torch.Generator,
        floor: float = 0.0,
    ) -> dict[str, Tensor]:
        """One gradient step, one Polyak step, one step of dual ascent on alpha.

        ``floor`` is an accident probability that was really seen; the estimate is kept above it.
        """
        size = batch.actions.shape
        noise = (
            torch.randn(size, generator=generator),
            torch.randn(size, generator=generator),
            torch.randn(len(initial_observations), size[-1], generator=generator),
        )
        loss, value, reference = self.loss(batch, weights, actor, initial_observations, noise)
        descend_(self.optimizer, loss)
        polyak_(self.target, self.net, self.config.tau)
        wanted = (reference + self.config.target_gap).clamp(min=floor, max=1.0)
        # Unit steps would crawl: the shortfall is measured in gaps, and alpha moves in its
        # logarithm.
        shortfall = ((wanted - value) / self.config.target_gap).clamp(-1.0, 1.0)
        self.log_alpha += self.config.alpha_learning_rate * shortfall
        self.log_alpha.clamp_(LOG_ALPHA_MIN, math.log(self.config.alpha_max))
        return {
            "csc/loss": loss.detach(),
            "csc/v_accident": value,
            "csc/v_reference": reference,
            "csc/alpha": self.alpha,
        }

    @torch.no_grad()
    def estimate(
        self, actor: Actor, initial_observations: Tensor, generator: torch.Generator
    ) -> RiskEstimate:
        """V_accident(s0) of the policy over a sample of start states [S, O].

        The upper limit adds 1.645 standard errors: spread between the pushed members, and between
        start states. It is a limit on the critic's own uncertainty, not a certificate.
        """
        mean, log_std = actor(initial_observations)
        actions, _ = sample(mean, log_std, torch.randn(mean.shape, generator=generator))
        ones = initial_observations.new_ones(len(initial_observations))
        values = torch.sigmoid(self.logits(initial_observations, ones, actions))
        pushed = values[self.config.reference :]
        members = pushed.mean(1)
        variance = pushed.mean(0).var() / len(ones)
        if len(members) > 1:
            variance = variance + members.var() / len(members)
        value = members.mean()
        return RiskEstimate(
            value=float(value),
            upper=float(value + 1.645 * variance.sqrt()),
            reference=float(values[: self.config.reference].mean()),
        )
