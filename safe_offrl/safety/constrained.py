"""One limit of a run with what keeps it: a safety critic, and a multiplier that it moves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from safe_offrl.agents.steering import Penalty
from safe_offrl.compute.state import Part, named
from safe_offrl.limits import Limit
from safe_offrl.safety.critic import SafetyCritic
from safe_offrl.safety.multiplier import Multiplier, PIDMultiplier


class Constrained(NamedTuple):
    """A limit, and who estimates and steers what it limits."""

    limit: Limit
    critic: SafetyCritic
    multiplier: Multiplier | PIDMultiplier

    def penalty(self, *, plain: bool) -> Penalty:
        """What it asks of an actor; ``plain`` is by the members that learn by plain TD."""
        risk = self.critic.plain_risk if plain else self.critic.risk
        return Penalty(risk, self.multiplier.value)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps that both phases have."""
        return {**self.critic.parts(), "multiplier": self.multiplier.value}


def constrained_parts(
    constraints: Iterable[Constrained], *, controlled: bool = False
) -> dict[str, Part]:
    """What a checkpoint keeps of them: the first by plain names, a further one under its limit's.

    ``controlled``: with what the multipliers keep besides their values.
    """
    parts: dict[str, Part] = {}
    for i, constraint in enumerate(constraints):
        more: dict[str, Tensor] = constraint.multiplier.parts() if controlled else {}
        own = {**constraint.parts(), **more}
        parts |= named(f"limit_{constraint.limit.constraint}", own) if i else own
    return parts


def metric_name(metric: str, limit: Limit, *, first: bool) -> str:
    """A curve of one limit: of a further one, with its name behind."""
    return metric if first else f"{metric}/{limit.constraint}"
