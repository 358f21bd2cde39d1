"""One line where a run does what people ask about: what it means, and what to change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from safe_offrl.limits import Limit
from safe_offrl.safety.multiplier import LagrangianConfig

PATIENCE = 10  # decisions in a row that refuse, before a line says so


class Reasons:
    """Looks at each decision of an online phase; says a reason where its cause first appears.

    ``steered``: the safety constraint is on. Lambda may leave 0 and come back many times: a line
    that has been read once says nothing new.
    """

    def __init__(self, config: LagrangianConfig, limit: Limit, *, steered: bool) -> None:
        self._config, self._limit, self._steered = config, limit, steered
        self._said: set[str] = set()  # causes
        self._refusals: list[str] = []

    def take(self, iteration: Mapping[str, Any]) -> list[str]:
        """Lines about this decision, a line of iterations.jsonl; [] if there is nothing to say."""
        replaced = iteration["accepted"] or iteration["rolled_back"]
        refusals = [] if replaced else [*self._refusals, iteration["reason"]]
        self._refusals = refusals[-PATIENCE:]
        found = self._of_lambda(float(iteration["multiplier"])) if self._steered else {}
        if len(self._refusals) == PATIENCE:
            found["refused"] = self._of_refusals(iteration.get("divergence", "KL"))
        new = {cause: text for cause, text in found.items() if cause not in self._said}
        self._said |= set(new)
        return list(new.values())

    def _of_lambda(self, value: float) -> dict[str, str]:
        aim, maximum = self._config.aim, self._config.maximum
        aimed = self._limit.quantity.text(aim * self._limit.value)
        if value <= 0.0:
            return {
                "zero": "lambda is 0: risk does not steer the learner while what lambda follows is "
                f"below {aimed} (lagrangian.aim x the limit); lower lagrangian.aim for more margin"
            }
        if value >= maximum:
            return {
                "cap": f"lambda is at its cap of {maximum:g} (lagrangian.maximum), where risk can "
                f"weigh no more; if estimates stay above {aimed}, raise the cap, or ask "
                "`safe-offrl inspect` whether anybody in the log keeps the limit"
            }
        return {}

    def _of_refusals(self, divergence: str) -> str:
        # "KL tail 0.3 is not below 0.25" is for "KL tail"; an alarm refuses by itself.
        named = Counter(
            reason.partition(" is not below ")[0].rpartition(" ")[0] or reason
            for reason in self._refusals
        )
        name, times = named.most_common(1)[0]
        if name == f"{divergence} tail":
            advice = "on a few states the learner moves too far: raise acceptance.tail_ratio"
        elif name == divergence:
            advice = "the learner moves further than delta allows: raise safety.delta"
        else:
            advice = "lower lagrangian.aim or raise lagrangian.maximum, so that it is more careful"
        return f"the last {PATIENCE} proposals were refused, {times} of them for {name}: {advice}"
