"""SPIBB (Laroche et al. 2019, arXiv:1712.06924) and Soft-SPIBB (Nadjahi et al. 2019,
arXiv:1907.05079): tabular, and with high probability not much worse than whoever logged.

A log is counted and planned in as agents/tabular.py says. Where an action was logged ``n_wedge``
times or less, SPIBB (its Pi_b form) keeps the behaviour's probability of it; what is left goes to
the best other action. Soft-SPIBB moves as much probability as
``sum_a e(s, a) |pi - pi_b| <= epsilon`` lets it, ``e = sqrt(2 ln(2 S A / delta) / N(s, a))``, by
the greedy transfers of its algorithm 1. pi_b is estimated from the counts too, as by Simao et al.
2020 (arXiv:1909.05236).

An actor imitates what was planned. With limits it imitates the best of the same policies for
``Q/|Q| - sum lambda Q_C``, Q that of the plan; what is guaranteed of the return is so without them.
The critics that the online phase starts from are learnt afterwards, by alignment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.tabular import Counts, Imitation, Improve
from safe_offrl.policies.categorical import CATEGORICAL


@dataclass(frozen=True)
class SPIBBConfig:
    """Settings of SPIBB: ``n_wedge`` is the count up to which an action is left to the log."""

    learning_rate: float = 1e-3
    discount: float = 0.99
    n_wedge: int = 10


@dataclass(frozen=True)
class SoftSPIBBConfig:
    """Settings of Soft-SPIBB: how much may be moved, and how sure e(s, a) is to be, at 1 - delta.

    At ``delta`` 1 e is an order of magnitude and no bound. What the actor learns is then tuned by
    ``epsilon`` alone: 0 is the behaviour, and a large one the best plan of what was logged.
    """

    learning_rate: float = 1e-3
    discount: float = 0.99
    epsilon: float = 1.0
    delta: float = 1.0


def bootstrapped(counts: Counts, n_wedge: int) -> Improve:
    """SPIBB's step: pi_b where ``N(s, a) <= n_wedge``, the rest to the best action elsewhere."""
    known = counts.pairs > n_wedge
    kept = counts.behaviour.masked_fill(known, 0.0)
    free = torch.where(known.any(1), 1.0 - kept.sum(1), 0.0)

    def improve(values: Tensor, states: Tensor) -> Tensor:
        best = values.masked_fill(~known[states], -math.inf).argmax(1, keepdim=True)
        return kept[states].scatter_add(1, best, free[states].unsqueeze(1))

    return improve


def errors(counts: Counts, delta: float) -> Tensor:
    """e(s, a) = sqrt(2 ln(2 S A / delta) / N(s, a)) [S, A], infinite where nothing was logged."""
    return (2.0 * math.log(2.0 * counts.pairs.numel() / delta) / counts.pairs).sqrt()


def transferred(values: Tensor, behaviour: Tensor, e: Tensor, epsilon: float) -> Tensor:
    """Algorithm 1 of Soft-SPIBB: values of actions, pi_b and e, each [B, A] -> pi [B, A].

    From the worst action upwards, probability goes to where it gains most per error, no more than
    half of what is left of ``epsilon`` being spent on either. What is left is counted anew for each
    transfer: counted once an action that gives, as in the authors' code, it can be overspent.
    """
    policy = behaviour.clone()
    budget, rows = torch.full_like(policy[:, 0], epsilon), torch.arange(len(policy))
    for worse in values.argsort(stable=True, dim=1).T:
        gain = (values - values[rows, worse].unsqueeze(1)) / e
        for better in gain.argsort(stable=True, dim=1, descending=True).T:
            larger = torch.maximum(e[rows, worse], e[rows, better])
            moved = torch.minimum(policy[rows, worse], budget / (2.0 * larger))
            moved = torch.where(gain[rows, better] > 0.0, moved, 0.0)
            policy[rows, worse] -= moved
            policy[rows, better] += moved
            spent = moved * (e[rows, worse] + e[rows, better])
            budget = (budget - torch.where(moved > 0.0, spent, 0.0)).clamp_min(0.0)
    return policy


class SPIBB:
    """The plan of SPIBB, made once, and the actor that imitates it."""

    Config = SPIBBConfig
    Online: type[OnlineAgent] | None = None
    kinds = (CATEGORICAL,)

    def __init__(self, setup: Setup, config: SPIBBConfig) -> None:
        counts = Counts.of(setup.dataset, "spibb")
        improve = bootstrapped(counts, config.n_wedge)
        self.imitation = Imitation(setup, counts, improve, config.discount, config.learning_rate)
        self.parts, self.update = self.imitation.parts, self.imitation.update


class SoftSPIBB:
    """The plan of Soft-SPIBB, made once, and the actor that imitates it."""

    Config = SoftSPIBBConfig
    Online: type[OnlineAgent] | None = None
    kinds = (CATEGORICAL,)

    def __init__(self, setup: Setup, config: SoftSPIBBConfig) -> None:
        counts = Counts.of(setup.dataset, "soft_spibb")
        e = errors(counts, config.delta)

        def improve(values: Tensor, states: Tensor) -> Tensor:
            return transferred(values, counts.behaviour[states], e[states], config.epsilon)

        self.imitation = Imitation(setup, counts, improve, config.discount, config.learning_rate)
        self.parts, self.update = self.imitation.parts, self.imitation.update
