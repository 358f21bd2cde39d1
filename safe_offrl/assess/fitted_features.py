"""What a fitted evaluation sees of a step: features learnt from the log, for one fixed policy.

Small networks learn the policy's risk and return by temporal differences. Only what their last
hidden layers see is kept; :mod:`safe_offrl.assess.fitted_evaluation` solves for the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from safe_offrl.data.dataset import FLOAT32_EPS, Dataset
from safe_offrl.limits import Limit
from safe_offrl.nn.losses import first_accident_target, td_target
from safe_offrl.policies.networks import Actor, StackedMLP, polyak_, timed_inputs
from safe_offrl.types import Batch

RISK, RETURN = 0, 1  # the two quantities, in this order wherever there is an axis of them
HALVES = 2
ROWS_PER_FEATURE = 20  # a system of more unknowns would fit the noise of its half of the log
TellShare = Callable[[float], None]  # is told the share of the work that is done


@dataclass(frozen=True)
class FittedConfig:
    """How the features are learnt, and how often the episodes are weighed anew.

    ``networks`` of two hidden layers for each quantity and half; the second is at most ``width``
    wide, less where a half of the log has few rows. ``groups`` of episodes in each half are weighed
    together. ``ridge`` is a prior worth so many steps of the log. ``actions`` are drawn from a
    continuous policy for each expectation over it.
    """

    networks: int = 3
    width: int = 64
    steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 2e-3
    tau: float = 0.03
    ridge: float = 1.0
    groups: int = 100
    replicates: int = 200
    actions: int = 4


class Steps(NamedTuple):
    """Logged steps as the evaluation sees them."""

    batch: Batch  # [B, ...]
    outcomes: Tensor  # [2, B], what a step adds to risk and return
    next_time_to_go: Tensor  # [B]
    next_actions: Tensor  # [B, A], the log's own; whatever at the end of an episode

    def targets(self, next_values: Tensor, limit: Limit) -> Tensor:
        """Bellman targets of both quantities, next values [2, ..., B] -> [2, ..., B]."""
        risk, returns = next_values
        shape = risk.shape
        outcomes = [x.expand(shape) for x in self.outcomes]
        ended, left = self.batch.terminated.expand(shape), self.next_time_to_go.expand(shape)
        if limit.quantity.until_accident:
            risk = first_accident_target(outcomes[RISK], ended, left, risk)
        else:
            risk = td_target(outcomes[RISK], ended, risk * (left > 1e-6), 1.0)
        return torch.stack([risk, td_target(outcomes[RETURN], ended, returns * (left > 1e-6), 1.0)])

    def continuation(self, limit: Limit) -> Tensor:
        """Weight of the next value in each target, 0 or 1: [2, B]."""
        nothing = torch.zeros_like(self.outcomes)
        # Rewards have no part in it; beside large ones the 1 would be lost.
        unpaid = self._replace(outcomes=torch.stack([self.outcomes[RISK], nothing[RETURN]]))
        return unpaid.targets(nothing + 1.0, limit) - unpaid.targets(nothing, limit)


def take(dataset: Dataset, limit: Limit, index: Tensor) -> Steps:
    """The steps of these rows [B]. The risk's outcome is in units of ``limit.scale``."""
    batch = dataset.layout.unpack(dataset.rows[index])
    following = dataset.rows[(index + 1).clamp_max(len(dataset.rows) - 1)]
    risk = limit.quantity.select(batch.accidents, batch.costs) / limit.scale
    return Steps(
        batch,
        torch.stack([risk, batch.rewards]),
        (batch.time_to_go - 1.0 / dataset.horizon).clamp_min(0.0),
        dataset.layout.unpack(following).actions,
    )


class Features:
    """phi(s, t, a) of the networks of one half, and their mean over a policy's actions."""

    def __init__(self, net: StackedMLP, members: Tensor, actor: Actor, draws: int) -> None:
        self._net = net
        self._members = members
        self._actor = actor
        self._draws = 1 if actor.kind.exact else draws

    @torch.no_grad()
    def of(self, observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
        """[B, O], [B], [B, A] -> [B, D]; the last feature is 1."""
        seen = self._net.features(timed_inputs(observations, time_to_go, actions), self._members)
        flat = seen.transpose(0, 1).flatten(1)
        return torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)

    @torch.no_grad()
    def under_policy(
        self, observations: Tensor, time_to_go: Tensor, generator: torch.Generator
    ) -> Tensor:
        """E_pi phi: [B, O], [B] -> [B, D]; exact for discrete actions."""
        distribution = self._actor(observations)
        total = torch.zeros(())
        for _ in range(self._draws):
            policy = distribution.quadrature(self._actor.noise(time_to_go.shape, generator))
            rows = policy.repeat(observations), policy.repeat(time_to_go), policy.actions
            total = total + policy.expect(self.of(*rows).T).T
        return total / self._draws


def learn_features(
    dataset: Dataset,
    actor: Actor,
    limit: Limit,
    half_of_row: Tensor,
    config: FittedConfig,
    generator: torch.Generator,
    progress: TellShare,
) -> StackedMLP:
    """Learn both quantities by temporal differences; the networks.

    Members are ordered by quantity, half and number; those of half h learn from rows of half h
    alone (``half_of_row`` [N]). The squared error, not the cross-entropy: the features are to be
    linear in a probability.
    """
    # Networks and optimiser.
    members = 2 * HALVES * config.networks
    rows = len(dataset.rows)
    fewest = int(torch.bincount(half_of_row, minlength=HALVES).min())
    features = fewest // (ROWS_PER_FEATURE * 2 * config.networks)
    inputs = dataset.layout.observation_size + 1 + dataset.layout.action_size
    net = StackedMLP(
        members,
        inputs,
        (config.width, min(config.width, max(4, features))),
        layer_norm=True,
        generator=generator,
    )
    target = copy.deepcopy(net).requires_grad_(False)
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)
    # One learning rate fits both quantities in units of their spread over episodes.
    scale = torch.tensor([_spread(x) for x in episode_totals(dataset, limit)])
    half_of_member = torch.arange(HALVES).repeat_interleave(config.networks).repeat(2)
    for step in range(config.steps):
        # Learning rate, which falls to 0 over the second half.
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, 2.0 * (1.0 - step / config.steps))
        # Batch and targets.
        index = torch.randint(rows, (config.batch_size,), generator=generator)
        steps = take(dataset, limit, index)
        targets = _targets(steps, actor, limit, target, scale, generator)
        # Squared errors, each member's on its own half.
        mine = HALVES * (half_of_row[index] == half_of_member.unsqueeze(1)).float()
        batch = steps.batch
        learnt = net(timed_inputs(batch.observations, batch.time_to_go, batch.actions))
        errors = F.mse_loss(learnt, targets.flatten(0, 1), reduction="none")
        # Gradient step.
        gradients = torch.autograd.grad((errors * mine).mean(1).sum(), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        polyak_(target, net, config.tau)
        if (step + 1) % 200 == 0:
            progress((step + 1) / config.steps)
    return net


@torch.no_grad()
def _targets(
    steps: Steps,
    actor: Actor,
    limit: Limit,
    target: StackedMLP,
    scale: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """What the members of the networks learn, [2, M / 2, B], in units of ``scale`` [2]."""
    batch = steps.batch
    noise = actor.noise(batch.time_to_go.shape, generator)
    policy = actor(batch.next_observations).quadrature(noise)
    ahead = policy.repeat(batch.next_observations), policy.repeat(steps.next_time_to_go)
    values = policy.expect(target(timed_inputs(*ahead, policy.actions))).unflatten(0, (2, -1))
    unit = scale.view(2, 1, 1)
    targets = steps.targets(values * unit, limit) / unit
    targets[RISK].clamp_(0.0, 1.0 / float(scale[RISK]))
    return targets


def episode_totals(dataset: Dataset, limit: Limit) -> tuple[np.ndarray, np.ndarray]:
    """Risk, in units of ``limit.scale``, and return of each logged episode, [M] each."""
    accidents = dataset.episode_accidents.astype(np.float64)
    risk = limit.quantity.select(accidents, dataset.episode_costs) / limit.scale
    return risk, dataset.episode_returns


def _spread(values: np.ndarray) -> float:
    """Standard deviation; of values that differ by rounding errors at most their size, or 1."""
    spread, size = float(values.std()), float(np.abs(values).max())
    return spread if spread > FLOAT32_EPS * size else size or 1.0
