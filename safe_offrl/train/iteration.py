"""One round of the online phase as a line of iterations.jsonl: what was measured and decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from safe_offrl.safety.acceptance import Decision
from safe_offrl.safety.constrained import Constrained


class FurtherLimit(NamedTuple):
    """What an iteration measured of a limit behind the first; as there."""

    constraint: str
    limit: float
    v_previous: float
    v_candidate: float
    multiplier: float
    alpha: float


class Iteration(NamedTuple):
    """One round of collect, update, propose; what was measured and decided.

    ``v_previous`` and ``v_candidate`` are in the unit of the limit, a probability or a cost per
    episode; :class:`safe_offrl.safety.acceptance.Decision` has them as shares in [0, 1].
    """

    index: int  # type: ignore[assignment]  # tuple has a method of this name
    step: int  # interactions charged so far
    version: int  # of the policy that acts from now on
    accepted: bool
    fraction: float
    reason: str
    kl_forward_mean: float
    kl_reverse_mean: float
    kl_forward_tail: float
    kl_reverse_tail: float
    v_previous: float
    v_candidate: float
    constraint: str
    limit: float
    delta: float
    constraints_satisfied: bool
    multiplier: float
    kl_weight: float
    alpha: float
    rolled_back: bool
    metrics: dict[str, float]
    divergence: str  # what the fields kl_* hold; in lines of earlier versions KL, in nats
    divergence_unit: str
    further: tuple[FurtherLimit, ...] = ()

    @classmethod
    def from_decision(
        cls,
        decision: Decision,
        constraints: Sequence[Constrained],
        *,
        delta: float,
        tail_ratio: float,
        rolled_back: bool,
        **rest: Any,
    ) -> Iteration:
        """From a decision, its shares times the scales of the limits; ``rest`` are fields as above.

        ``constraints_satisfied`` is about the policy that acts from now on: the candidate, or the
        one that stays as it was, which is at no distance from itself.
        """
        # Constraints, of the policy that acts from now on.
        shares = [constraint.limit.share for constraint in constraints]
        if decision.accepted or rolled_back:
            near = decision.kl_mean < delta and decision.kl_tail < tail_ratio * delta
            acting = [after for _, after in decision.estimates]
        else:
            near, acting = True, [before for before, _ in decision.estimates]
        satisfied = near and all(v < share for v, share in zip(acting, shares, strict=True))
        # Estimates in the units of the limits.
        first, *further = (
            FurtherLimit(
                limit.constraint,
                limit.value,
                before * limit.scale,
                after * limit.scale,
                float(multiplier.value),
                float(critic.alpha),
            )
            for (limit, critic, multiplier), (before, after) in zip(
                constraints, decision.estimates, strict=True
            )
        )
        fields = decision._asdict() | first._asdict() | {"further": tuple(further)}
        return cls(
            **fields,
            delta=delta,
            constraints_satisfied=satisfied,
            rolled_back=rolled_back,
            **rest,
        )


def untested(limits: int) -> Decision:
    """The decision on a learner that acts without an acceptance step, under so many limits."""
    return UNTESTED._replace(further=((math.nan, math.nan),) * (limits - 1))


UNTESTED = Decision(
    accepted=True,
    fraction=1.0,
    reason="no acceptance step: the learner acts",
    kl_forward_mean=math.nan,
    kl_reverse_mean=math.nan,
    kl_forward_tail=math.nan,
    kl_reverse_tail=math.nan,
    v_previous=math.nan,
    v_candidate=math.nan,
)
