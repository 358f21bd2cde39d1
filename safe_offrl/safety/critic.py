"""The conservative safety critic (CSC): the probability of an accident, or the expected cost.

An ensemble of E networks gives logits of Q_C(s, time to go, a); what that is a probability or a
share of says :mod:`safe_offrl.safety.outlook`. Every member bootstraps from its own target, so
errors do not leak between them. The first ``reference`` members learn by plain TD; the others are
also pushed up at the policy's actions with weight alpha, and alpha is found by dual ascent such
that their V_accident(s0) exceeds the reference members' by a stated gap (and, online, the accident
rate that was really seen). A fixed alpha is a lottery: the same number is nothing on one task and
makes everything look deadly on the next.

The pushed members are for judging; the plain ones compare actions, for the shield and for the
policy that learns online. The push lifts the policy's own actions above their neighbours: so an
estimate errs on the safe side, and so a gradient leads away from what the policy does, wherever
that is. (Offline, where alpha ends near 0, it made no difference which members steer.) The two
roles are not to be joined: what the learner descends flatters the learner.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import EAGER, Compute, Descent
from safe_offrl.compute.state import Part
from safe_offrl.errors import ConfigError
from safe_offrl.limits import Limit
from safe_offrl.nn.losses import accident_td_loss, push_up_loss
from safe_offrl.policies.networks import EVERY, Actor, Members, StackedMLP, polyak_, timed_inputs
from safe_offrl.safety.outlook import UNLIKELY_LOGIT, AccidentAhead, CostAhead, Outlook
from safe_offrl.stats.fixed import standard_errors
from safe_offrl.types import Batch, States

LOG_ALPHA_MIN = -12.0  # 6e-6: no pressure to speak of, and a way back up


@dataclass(frozen=True)
class SafetyCriticConfig:
    """Settings of the safety critic.

    ``target_gap`` (in the unit of the constraint's share: a probability, or a share of the largest
    possible episode cost) is how far the estimate of the pushed members shall stand above plain
    TD's; ``alpha_max`` bounds the pressure used to get there. ``positive_share`` of each batch are
    accidents, drawn on purpose and weighted back to their true frequency. For the cost constraint
    only: its critic looks 1 / (1 - ``cost_discount``) steps ahead and learns from
    ``cost_steps``-step returns. Where what matters is seen in few of many inputs (a lidar, on a new
    layout in every episode) one-step targets let it learn the layouts of the log by heart;
    ``weight_decay`` (decoupled, AdamW, arXiv:1711.05101) is against the same.
    """

    members: int = 5
    reference: int = 2
    hidden: tuple[int, ...] = (256, 256)
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    tau: float = 0.01
    positive_share: float = 0.125
    target_gap: float = 0.02
    alpha_init: float = 1e-3
    alpha_max: float = 0.1
    alpha_learning_rate: float = 0.01
    cost_discount: float = 0.99
    cost_steps: int = 20

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
        if not 0.0 < self.cost_discount < 1.0:
            raise ConfigError(
                f"critic.cost_discount is {self.cost_discount}, but a number strictly between 0 "
                "and 1 is needed. Try 0.99."
            )
        if self.cost_steps < 1 or self.weight_decay < 0.0:
            raise ConfigError(
                f"critic.cost_steps is {self.cost_steps} and critic.weight_decay "
                f"{self.weight_decay}, but at least 1 and at least 0 are needed. Try 20 and 0.1."
            )


def outlook_on(limit: Limit, horizon: int, cost_max: float, config: SafetyCriticConfig) -> Outlook:
    """What the critic of this constraint looks at; ``cost_max`` is the largest cost of a step."""
    if limit.constraint == "accident":
        return AccidentAhead(horizon)
    return CostAhead(horizon, cost_max, config.cost_discount, config.cost_steps)


class RiskEstimate(NamedTuple):
    """The constrained quantity: conservative mean, one-sided upper limit, reference members' mean.

    In the critic's unit: V_accident(s0), or the cost of an episode as a share of its largest.
    """

    value: float
    upper: float
    reference: float


class SafetyCritic:
    """Composed with any agent; knows transitions and an actor, nothing of rewards."""

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        outlook: Outlook,
        config: SafetyCriticConfig,
        generator: torch.Generator,
        compute: Compute = EAGER,
    ) -> None:
        self.config = config
        self.outlook = outlook
        self.net = StackedMLP(
            config.members,
            observation_size + 1 + action_size,
            config.hidden,
            layer_norm=True,
            generator=generator,
        )
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        self.start_from(UNLIKELY_LOGIT)
        self.log_alpha = torch.tensor(config.alpha_init, device=generator.device).log()
        self.optimizer = Adam(self.net.parameters(), config.learning_rate, config.weight_decay)
        self.plain, self.pushed = slice(config.reference), slice(config.reference, None)
        self._descend = Descent(self.loss, self.optimizer, compute)

    @torch.no_grad()
    def start_from(self, logit: float) -> None:
        """Set every value to about this logit, before training: the log's mean cost, for example.

        A value far from it is a thousand updates away, and all bootstrap from it meanwhile.
        """
        for net in (self.net, self.target):
            net.output.bias.fill_(logit)

    def in_memory(self) -> SafetyCritic:
        """Itself, or what of it is on a GPU copied to the computer's memory: for use with numpy."""
        if self.log_alpha.device.type == "cpu":
            return self
        found = copy.copy(self)
        found.net = copy.deepcopy(self.net).cpu()
        return found

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

    def logits(
        self, observations: Tensor, time_to_go: Tensor, actions: Tensor, members: Members = EVERY
    ) -> Tensor:
        """Accident logits of the members asked for: [B, O], [B], [B, A] -> [M, B]."""
        logits: Tensor = self.net(timed_inputs(observations, time_to_go, actions), members)
        return logits

    def risk(self, observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
        """Q_C for estimates, the mean of the pushed members: [B, O], [B], [B, A] -> [B]."""
        logits = self.logits(observations, time_to_go, actions, self.pushed)
        return torch.sigmoid(logits).mean(0)

    def plain_risk(self, observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
        """Q_C for comparing actions, the mean of the members that learn by plain TD; as above."""
        logits = self.logits(observations, time_to_go, actions, self.plain)
        return torch.sigmoid(logits).mean(0)

    def risk_under(
        self, actor: Actor, observations: Tensor, time_to_go: Tensor, noise: Tensor
    ) -> Tensor:
        """E_pi Q_C at observations [B, O], the policy's actions driven by noise [B, A] -> [B]."""
        policy = actor(observations).quadrature(noise)
        risk = self.risk(policy.repeat(observations), policy.repeat(time_to_go), policy.actions)
        return policy.expect(risk)

    def loss(
        self,
        batch: Batch,
        weights: Tensor,
        actor: Actor,
        states: States,
        noise: tuple[Tensor, Tensor, Tensor],
        spans: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """TD loss + alpha * push-up; reads only.

        ``weights`` [B] undo the stratified sampling; ``noise`` drives the policy's actions at next
        observations, observations and the estimate ``states``; ``spans`` [B] are the steps between
        the two observations, 1 if None.
        Returns (scalar loss, estimate of the pushed members, estimate of the reference members).
        """
        if spans is None:
            spans = torch.ones_like(batch.time_to_go)
        with torch.no_grad():
            # Bellman targets.
            left = (batch.time_to_go - spans / self.outlook.horizon).clamp_min(0.0)
            next_values = _values(self.target, actor, batch.next_observations, left, noise[0])
            targets = self.outlook.targets(batch, left, next_values, spans)
            # The policy's own actions.
            policy = actor(batch.observations).quadrature(noise[1])
            # Estimates of every member, which the dual ascent on alpha compares.
            estimates = states.total(_values(self.net, actor, *states[:2], noise[2]))
        # TD loss at the logged actions.
        logged = self.logits(batch.observations, batch.time_to_go, batch.actions)
        td = accident_td_loss(logged, targets, weights)
        # Push-up loss. The reference members are not pushed: their logits would be for nothing.
        acted = self.logits(
            policy.repeat(batch.observations),
            policy.repeat(batch.time_to_go),
            policy.actions,
            self.pushed,
        )
        push = push_up_loss(acted, policy.spread(weights))
        loss = td.sum() + self.alpha * push.sum()
        return loss, estimates[self.pushed].mean(), estimates[self.plain].mean()

    def update(
        self,
        batch: Batch,
        weights: Tensor,
        actor: Actor,
        states: States,
        generator: torch.Generator,
        floor: float = 0.0,
        spans: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One gradient step, one Polyak step, one step of dual ascent on alpha.

        ``floor`` is what was really seen (accident rate, or share of the largest cost); the
        estimate is kept above it. ``spans`` are :meth:`loss`'s.
        """
        # Gradient step and Polyak step.
        size = batch.actions.shape[:-1]
        noise = (
            actor.noise(size, generator),
            actor.noise(size, generator),
            actor.noise(states.time_to_go.shape, generator),
        )
        loss, value, plain = self._descend(batch, weights, actor, states, noise, spans)
        polyak_(self.target, self.net, self.config.tau)
        # Dual ascent on the logarithm of alpha. Unit steps would crawl: the shortfall is in gaps.
        wanted = (plain + self.config.target_gap).clamp(min=floor, max=1.0)
        shortfall = ((wanted - value) / self.config.target_gap).clamp(-1.0, 1.0)
        self.log_alpha += self.config.alpha_learning_rate * shortfall
        self.log_alpha.clamp_(LOG_ALPHA_MIN, math.log(self.config.alpha_max))
        return {
            "csc/loss": loss,
            "csc/estimate": value,
            "csc/estimate_plain_td": plain,
            "csc/alpha": self.alpha,
        }

    @torch.no_grad()
    def estimate(
        self, actor: Actor, states: States, generator: torch.Generator, confidence: float
    ) -> RiskEstimate:
        """The constrained quantity under the policy, over a sample of estimate states.

        The upper limit adds the standard errors of a one-sided ``confidence`` (1.645 at 0.95):
        spread between the pushed members, and between states. It is a limit on the critic's own
        uncertainty, not a certificate.
        """
        noise = actor.noise(states.time_to_go.shape, generator)
        values = _values(self.net, actor, *states[:2], noise)
        pushed = values[self.pushed]
        members = states.total(pushed)
        variance = pushed.mean(0).var() * states.squared_weights
        if len(members) > 1:
            variance = variance + members.var() / len(members)
        value = members.mean()
        return RiskEstimate(
            value=float(value),
            upper=float(value + standard_errors(confidence) * variance.sqrt()),
            reference=float(states.total(values[self.plain]).mean()),
        )


def _values(
    net: StackedMLP, actor: Actor, observations: Tensor, time_to_go: Tensor, noise: Tensor
) -> Tensor:
    """E_pi Q_C of every member: [B, O], [B], noise [B, A] of the policy's actions -> [E, B]."""
    policy = actor(observations).quadrature(noise)
    inputs = timed_inputs(policy.repeat(observations), policy.repeat(time_to_go), policy.actions)
    return policy.expect(torch.sigmoid(net(inputs)))
