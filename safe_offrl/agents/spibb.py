"""SPIBB (Laroche et al. 2019, arXiv:1712.06924) and Soft-SPIBB (Nadjahi et al. 2019,
arXiv:1907.05079): tabular, and with high probability not much worse than whoever logged.

A log is counted and planned in as agents/tabular.py says. Where an action was logged ``n_wedge``
times or less, SPIBB (its Pi_b form) keeps the behaviour's probability of it; what is left goes to
the best other action. Soft-SPIBB moves as much probability as
``sum_a e(s, a) |pi - pi_b| <= epsilon`` lets it, ``e = sqrt(2 ln(2 S A / delta) / N(s, a))``, by
the greedy transfers of its algorithm 1. pi_b is estimated from the counts too, as by Simao et al.
2020 (arXiv:1909.05236).

An actor imitates the table. With limits the table is tilted, ``pi exp(-sum lambda Q_C)``; what is
guaranteed of the return is guaranteed without them. The critics that the online phase starts from
are learnt afterwards, by alignment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.tabular import Counts, Floats, Imitation, Improve, count, iterate
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

    At ``delta`` 1, as in the paper's experiments, e is an order of magnitude and no bound.
    """

    learning_rate: float = 1e-3
    discount: float = 0.99
    epsilon: float = 1.0
    delta: float = 1.0


def bootstrapped(counts: Counts, n_wedge: int) -> Improve:
    """SPIBB's step: pi_b where ``N(s, a) <= n_wedge``, the rest to the best action elsewhere."""
    known = counts.pairs > n_wedge
    kept = np.where(known, 0.0, counts.behaviour)
    some = known.any(1)

    def improve(q: Floats, _: Floats) -> Floats:
        best = np.where(known, q, -np.inf).argmax(1)
        policy = kept.copy()
        policy[some, best[some]] += 1.0 - kept[some].sum(1)
        return policy

    return improve


def errors(counts: Counts, delta: float) -> Floats:
    """e(s, a) = sqrt(2 ln(2 S A / delta) / N(s, a)) [S, A], infinite where nothing was logged."""
    with np.errstate(divide="ignore"):
        e: Floats = np.sqrt(2.0 * math.log(2.0 * counts.pairs.size / delta) / counts.pairs)
    return e


def transferred(q: Floats, behaviour: Floats, e: Floats, epsilon: float) -> Floats:
    """Algorithm 1 of Soft-SPIBB in one state: Q, pi_b and e, each [A] -> pi [A].

    From the worst action upwards, probability goes to where it gains most per error.
    """
    policy, budget = behaviour.copy(), epsilon
    for worse in q.argsort(kind="stable"):
        movable = min(policy[worse], budget / (2.0 * e[worse]))
        gain = (q - q[worse]) / e
        for better in (-gain).argsort(kind="stable"):
            if gain[better] <= 0.0:
                break
            moved = min(movable, budget / (2.0 * e[better]))
            policy[worse] -= moved
            policy[better] += moved
            movable -= moved
            budget = max(0.0, budget - moved * (e[worse] + e[better]))
    return policy


def softly(counts: Counts, epsilon: float, delta: float) -> Improve:
    """Soft-SPIBB's step; a state keeps its policy where the transfers would be no gain on it."""
    e = errors(counts, delta)

    def improve(q: Floats, policy: Floats) -> Floats:
        found = np.stack(
            [transferred(*of, epsilon) for of in zip(q, counts.behaviour, e, strict=True)]
        )
        gains = ((found - policy) * q).sum(1) > 0.0
        return np.where(gains[:, None], found, policy)

    return improve


class SPIBB:
    """The table of SPIBB, found once, and the actor that imitates it."""

    Config = SPIBBConfig
    Online: type[OnlineAgent] | None = None
    kinds = (CATEGORICAL,)

    def __init__(self, setup: Setup, config: SPIBBConfig) -> None:
        counts = count(setup.dataset, "spibb")
        table = iterate(counts, config.discount, bootstrapped(counts, config.n_wedge))
        self.imitation = Imitation(setup, table, counts, config.learning_rate)
        self.parts, self.update = self.imitation.parts, self.imitation.update


class SoftSPIBB:
    """The table of Soft-SPIBB, found once, and the actor that imitates it."""

    Config = SoftSPIBBConfig
    Online: type[OnlineAgent] | None = None
    kinds = (CATEGORICAL,)

    def __init__(self, setup: Setup, config: SoftSPIBBConfig) -> None:
        counts = count(setup.dataset, "soft_spibb")
        table = iterate(counts, config.discount, softly(counts, config.epsilon, config.delta))
        self.imitation = Imitation(setup, table, counts, config.learning_rate)
        self.parts, self.update = self.imitation.parts, self.imitation.update
