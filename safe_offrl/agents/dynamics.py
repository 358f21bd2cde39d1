"""An ensemble of probabilistic networks that say what a step does (PETS, arXiv:1805.12114).

Of an observation and an action each member predicts a Gaussian over the change of the observation
and the reward, with learnt bounds of its log variance, and how likely the step ends the episode, is
an accident, and what share of the largest cost it costs, of each cost signal too. Changes and
rewards are in units of their standard deviations in the log, so that no loss and no uncertainty
depends on how large they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safe_offrl.data.dataset import Dataset
from safe_offrl.policies.networks import StackedLinear
from safe_offrl.types import Batch

MEMBERS = 7
BETA = 0.5  # of beta-NLL
BOUNDS_WEIGHT = 0.01  # of what pulls the bounds of the log variance together, as in PETS
SCALE_ROWS = 100_000  # transitions, about, that the units are measured on


class Prediction(NamedTuple):
    """What E members expect of steps, in units of the log; D is the observation and the reward."""

    mean: Tensor  # [E, B, D], of the change and the reward
    log_variance: Tensor  # [E, B, D]
    logits: Tensor  # [E, B, 3 + K], of termination, an accident, and shares of the largest costs


class Dynamics(nn.Module):
    """The members as batched products, and the units that they predict in."""

    center: Tensor
    scale: Tensor
    largest_costs: Tensor

    def __init__(self, dataset: Dataset, hidden: Sequence[int], generator: torch.Generator) -> None:
        """``dataset`` is the log, normalised: of it come units and sizes."""
        super().__init__()
        o, a = dataset.layout.sizes
        device, size, layers = generator.device, o + a, list[nn.Module]()
        for width in hidden:
            layers += [StackedLinear(MEMBERS, size, width, generator), nn.SiLU()]
            size = width
        costs = [dataset.cost_max, *dataset.signals_max.values()]
        self._sizes = [o + 1, o + 1, 2 + len(costs)]
        self.layers = nn.Sequential(
            *layers, StackedLinear(MEMBERS, size, sum(self._sizes), generator)
        )
        self.least = nn.Parameter(torch.full((o + 1,), -10.0, device=device))
        self.most = nn.Parameter(torch.full((o + 1,), 0.5, device=device))
        changes = changes_of(dataset.sample(SCALE_ROWS, 0).transitions)
        std = changes.std(0, correction=0)
        self.register_buffer("center", changes.mean(0).to(device))
        self.register_buffer("scale", torch.where(std > 1e-6, std, 1.0).to(device))
        self.register_buffer("largest_costs", torch.tensor(costs, device=device))

    def __call__(self, observations: Tensor, actions: Tensor) -> Prediction:
        """Typed entry to ``forward``; torch declares Any."""
        return super().__call__(observations, actions)

    def forward(self, observations: Tensor, actions: Tensor) -> Prediction:
        """Of steps [B, ...] that are the same for all members, or of each one's own, [E, B, ...].

        The log variance is bounded from both sides by softplus: no gradient dies there.
        """
        x = torch.cat([observations, actions], dim=-1)
        outputs: Tensor = self.layers(x.expand(MEMBERS, *x.shape[-2:]))
        mean, raw, logits = outputs.float().split(self._sizes, dim=-1)
        log_variance = self.most - F.softplus(self.most - raw)
        log_variance = self.least + F.softplus(log_variance - self.least)
        return Prediction(mean, log_variance, logits)

    def losses(self, batch: Batch, beta: float = 0.0) -> Tensor:
        """``mean_D[(x - mean)^2 / variance + log variance]`` and cross-entropies, of members [E].

        Steps are as in :meth:`forward`. Costs enter the cross-entropy as shares of the largest,
        whose expectation minimises it. ``beta`` weighs the first term by ``variance^beta``, without
        a gradient through that.
        """
        mean, log_variance, logits = self(batch.observations, batch.actions)
        targets = (changes_of(batch) - self.center) / self.scale
        errors = (targets - mean).square() * (-log_variance).exp() + log_variance
        errors = errors * (beta * log_variance).detach().exp()
        costs = batch.costs.unsqueeze(-1)
        if batch.signals is not None:
            costs = torch.cat([costs, batch.signals], dim=-1)
        shares = (costs / self.largest_costs).clamp(0.0, 1.0)
        events = torch.stack([batch.terminated, batch.accidents], dim=-1)
        outcomes = torch.cat([events, shares], dim=-1).expand(logits.shape)
        entropies = F.binary_cross_entropy_with_logits(logits, outcomes, reduction="none")
        return errors.mean((-2, -1)) + entropies.sum(-1).mean(-1)

    def loss(self, batch: Batch) -> tuple[Tensor]:
        """The members' losses, and what pulls the bounds of the variance together; summed.

        PETS has no beta. But where a number hardly ever changes, and then by much, likelihood alone
        learns to call the change noise (beta-NLL, arXiv:2203.09168): of what PointHazard-v0 shows
        of its hazards nothing was predicted after 2,500 steps, and with beta most of it after 500.
        """
        bounds = (self.most - self.least).sum()
        return (self.losses(batch, BETA).sum() + BOUNDS_WEIGHT * bounds,)

    def step(
        self, start: Batch, prediction: Prediction, members: Tensor, noise: Tensor, chance: Tensor
    ) -> Batch:
        """Draw what the actions of ``start`` [B] do, each by one of ``members`` [B].

        ``noise`` [B, D] is standard normal. ``chance`` [B], uniform in [0, 1), decides on
        termination and accident alike: an accident that always ends the episode ends it here too.
        Costs are those to be expected.
        """
        rows = torch.arange(len(members), device=members.device)
        mean, log_variance, logits = (values[members, rows] for values in prediction)
        drawn = self.center + self.scale * (mean + (0.5 * log_variance).exp() * noise)
        likely = torch.sigmoid(logits)
        costs = likely[:, 2:] * self.largest_costs
        events = (chance.unsqueeze(-1) < likely[:, :2]).float()
        return start._replace(
            rewards=drawn[:, -1],
            accidents=events[:, 1],
            costs=costs[:, 0],
            next_observations=start.observations + drawn[:, :-1],
            terminated=events[:, 0],
            signals=None if start.signals is None else costs[:, 1:],
        )


def changes_of(batch: Batch) -> Tensor:
    """What the Gaussians are over, ``(s' - s, r)``: [..., D]."""
    changes = batch.next_observations - batch.observations
    return torch.cat([changes, batch.rewards.unsqueeze(-1)], dim=-1)


def uncertainty(prediction: Prediction) -> Tensor:
    """``max_i |Sigma_i|`` (MOPO, arXiv:2005.13239), a root mean square over the D numbers, [B].

    1 where nothing is known of a step but what the log's steps are like. Sigma_i are a member's
    deviations from the mean of all members, ``variance_i + (mean_i - mean)^2``, where the paper has
    its variance alone: that is the same everywhere if the noise is, inside of the log and outside.
    """
    distance = prediction.mean - prediction.mean.mean(0)
    squares = prediction.log_variance.exp() + distance.square()
    return squares.mean(-1).amax(0).sqrt()


def disagreement(prediction: Prediction) -> Tensor:
    """``max_ij |f_i - f_j|`` of the members' means (MOReL, arXiv:2005.05951, eq. 2), [B]."""
    means = prediction.mean.transpose(0, 1)
    return torch.cdist(means, means).amax((-2, -1))
