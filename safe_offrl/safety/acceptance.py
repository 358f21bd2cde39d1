"""The acceptance step: only a candidate that passes both constraints may act.

Learner and deployed policy are separate. The learner proposes; the candidate is pulled back towards
the policy that acts until KL and what is constrained, V_accident(s0) or the expected cost, are
within their limits, or refused. The constraints hold for MEASURED values: the KL is exact on the
visited observations, the rest is the safety critic's conservative estimate, in the critic's unit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from safe_offrl.errors import ConfigError
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import Actor
from safe_offrl.safety.critic import SafetyCritic
from safe_offrl.types import Constraint, States, Visited


@dataclass(frozen=True)
class AcceptanceConfig:
    """``shrink`` and ``tries`` of the backtracking, ``tail`` quantile of the KL over observations.

    The mean KL is bounded by delta in both directions; its ``tail`` quantile by ``tail_ratio``
    delta, so that a change concentrated on few observations does not hide in the mean.
    """

    shrink: float = 0.7
    tries: int = 8
    tail: float = 0.95
    tail_ratio: float = 5.0

    def __post_init__(self) -> None:
        """Refuse a backtracking that would not get anywhere."""
        if not (0.0 < self.shrink < 1.0 and self.tries >= 1):
            raise ConfigError(
                f"acceptance.shrink is {self.shrink} and acceptance.tries {self.tries}, but a "
                "factor in (0, 1) and at least 1 try are needed. Try 0.7 and 8."
            )
        if not (0.0 < self.tail < 1.0 and self.tail_ratio > 0.0):
            raise ConfigError(
                f"acceptance.tail is {self.tail} and acceptance.tail_ratio {self.tail_ratio}, but "
                "a quantile in (0, 1) and a ratio above 0 are needed. Try 0.95 and 5."
            )


class Decision(NamedTuple):
    """What was measured and decided; ``fraction`` is 0 when the deployed policy stays.

    ``v_previous`` and ``v_candidate`` are in the safety critic's unit, shares in [0, 1];
    :class:`safe_offrl.train.iteration.Iteration` has them in the unit of the limit.
    """

    accepted: bool
    fraction: float
    reason: str
    kl_forward_mean: float  # KL(candidate || deployed)
    kl_reverse_mean: float  # KL(deployed || candidate)
    kl_forward_tail: float
    kl_reverse_tail: float
    v_previous: float  # upper estimate of what is constrained, deployed policy
    v_candidate: float  # the same for the candidate that was decided on
    further: tuple[tuple[float, float], ...] = ()  # both, of each limit behind the first
    divergence: str = "KL"  # what the fields kl_* hold, of another kind of policy another one
    divergence_unit: str = "nats"

    @property
    def kl_mean(self) -> float:
        """The larger of both directions; NaN if either is."""
        return float(np.max([self.kl_forward_mean, self.kl_reverse_mean]))

    @property
    def kl_tail(self) -> float:
        """The larger tail quantile of both directions; NaN if either is."""
        return float(np.max([self.kl_forward_tail, self.kl_reverse_tail]))

    @property
    def estimates(self) -> tuple[tuple[float, float], ...]:
        """Of each limit: (v_previous, v_candidate)."""
        return ((self.v_previous, self.v_candidate), *self.further)


class Judge(NamedTuple):
    """What a candidate is held against for one limit.

    ``visited`` are transitions of the latest episodes, the deployed policy's and perhaps those of
    the one or two before it, of which those count that matter to the limit; ``states`` those of
    the critic's estimate.
    """

    limit: Limit
    critic: SafetyCritic
    visited: Visited
    states: States


def interpolate(previous: Actor, learner: Actor, fraction: float) -> Actor:
    """A new actor with parameters ``previous + fraction (learner - previous)``."""
    candidate = copy.deepcopy(previous)
    with torch.no_grad():
        torch._foreach_lerp_(list(candidate.parameters()), list(learner.parameters()), fraction)
    return candidate


@torch.no_grad()
def measure_divergence(
    candidate: Actor, previous: Actor, observations: Tensor, tail: float
) -> Tensor:
    """[4]: mean of D(c || p), mean of D(p || c), then both ``tail`` quantiles, over [B, O]."""
    c, p = candidate(observations), previous(observations)
    both = torch.stack([c.divergence(p), p.divergence(c)])
    return torch.cat([both.mean(1), both.quantile(tail, dim=1)])


@torch.no_grad()
def risk_change(
    candidate: Actor, previous: Actor, critic: SafetyCritic, visited: Visited, noise: Tensor
) -> float:
    """Mean change of the risk of an action when the candidate replaces the previous policy.

    ``E_visited[Q_C(s, a') - Q_C(s, a)]``, a' from the candidate, a from the previous policy, both
    driven by the same ``noise`` [B, A], over the states that count: behind an accident nothing can
    change whether there was one. Times ``outlook.change_per_action`` it is the first-order change
    of V_accident(s0), or of the expected cost (performance difference lemma, Kakade & Langford
    2002; CPO, arXiv:1705.10528).
    """
    mine, theirs = (
        critic.risk_under(actor, visited.batch.observations, visited.batch.time_to_go, noise)
        for actor in (candidate, previous)
    )
    changes = (mine - theirs) * visited.counted
    return float(changes.sum() / visited.counted.sum().clamp_min(1.0))


def _probability(value: float) -> float:
    """Clip to [0, 1]. Python's min and max would turn a NaN into 0, "safe"; this keeps it NaN."""
    return float(np.clip(value, 0.0, 1.0))


def upper_estimates(
    actor: Actor, judges: Sequence[Judge], confidence: float, generator: torch.Generator
) -> list[float]:
    """Of what each limit constrains under a policy, in [0, 1] or NaN."""
    return [
        _probability(critic.estimate(actor, states, generator, confidence).upper)
        for _, critic, _, states in judges
    ]


def measure(
    candidate: Actor,
    previous: Actor,
    judges: Sequence[Judge],
    v_previous: Sequence[float],
    noise: Tensor,
    tail: float,
) -> Decision:
    """What a change from the previous policy to the candidate would mean; nothing decided yet.

    ``v_previous`` are the estimates of the previous policy, one a judge.
    """
    observations = judges[0].visited.batch.observations  # the same for all
    kls = measure_divergence(candidate, previous, observations, tail).tolist()
    estimates = []
    for (_, critic, visited, _), before in zip(judges, v_previous, strict=True):
        change = critic.outlook.change_per_action(visited.per_episode)
        change *= risk_change(candidate, previous, critic, visited, noise)
        estimates.append((before, _probability(before + change)))
    first, *further = estimates
    return Decision(
        accepted=False,
        fraction=0.0,
        reason="",
        kl_forward_mean=kls[0],
        kl_reverse_mean=kls[1],
        kl_forward_tail=kls[2],
        kl_reverse_tail=kls[3],
        v_previous=first[0],
        v_candidate=first[1],
        further=tuple(further),
        divergence=candidate.kind.divergence_name,
        divergence_unit=candidate.kind.divergence_unit,
    )


def decide(
    previous: Actor,
    learner: Actor,
    judges: Sequence[Judge],
    config: AcceptanceConfig,
    *,
    kl_limit: float | None,
    constrain_safety: bool,
    confidence: float,
    generator: torch.Generator,
) -> tuple[Decision, Actor]:
    """Backtrack from the learner towards the deployed policy until every constraint holds.

    ``kl_limit`` None switches the KL constraint off; ``confidence`` is that of the upper estimates.
    While the deployed policy itself is not below a limit, a candidate must have a lower estimate of
    it. Returns the decision and the policy to act.
    """
    noise = previous.noise(judges[0].visited.batch.actions.shape[:-1], generator)
    v_previous = upper_estimates(previous, judges, confidence, generator)
    fraction, decision = 1.0, None
    for _ in range(config.tries):
        candidate = interpolate(previous, learner, fraction)
        # The candidate, measured.
        decision = measure(candidate, previous, judges, v_previous, noise, config.tail)
        # Limits that it must keep.
        constraints = []
        if kl_limit is not None:
            tail_limit = config.tail_ratio * kl_limit
            constraints += [
                Constraint(decision.divergence, decision.kl_mean, kl_limit),
                Constraint(f"{decision.divergence} tail", decision.kl_tail, tail_limit),
            ]
        exceeds = False
        for judge, (before, after) in zip(judges, decision.estimates, strict=True):
            limit = judge.limit
            if constrain_safety and not after < before:  # else it improves
                name = limit.quantity.symbol
                constraints.append(Constraint(name, after * limit.scale, limit.value))
            exceeds |= constrain_safety and not after < limit.share
        # The first acceptable candidate acts; another is pulled back further.
        failed = next((c for c in constraints if not c.satisfied), None)
        if failed is None:
            reason = "improves on a policy above the limit" if exceeds else "every constraint holds"
            return decision._replace(accepted=True, fraction=fraction, reason=reason), candidate
        reason = f"{failed.name} {failed.value:.3g} is not below {failed.limit:.3g}"
        decision = decision._replace(reason=reason)
        fraction *= config.shrink
    assert decision is not None  # tries >= 1
    return decision, previous
