"""One line where a run does what people ask about: what it means, and what to change."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from safe_offrl.limits import Limit
from safe_offrl.safety.multiplier import LagrangianConfig
from safe_offrl.types import Episode

PATIENCE = 10  # decisions in a row that refuse, before a line says so
EPISODES = 20  # so many are looked at for hand-overs


class Reasons:
    """Looks at each decision of an online phase; says a reason where its cause first appears.

    ``steered`` are the limits that steer the learner, each with the settings of its lambda. Lambda
    may leave 0 and come back many times: a line that has been read once says nothing new.
    """

    def __init__(self, steered: Iterable[tuple[Limit, LagrangianConfig]]) -> None:
        self._steered = list(steered)
        self._said: set[str] = set()  # causes
        self._refusals: list[str] = []
        self._handed_over: list[bool] = []  # of the latest episodes

    def restore(self, episodes: Iterable[Episode], iterations: Iterable[Mapping[str, Any]]) -> None:
        """Take in what happened before a resume, and what was said of it."""
        waiting = deque(iterations)
        for episode in episodes:
            while waiting and waiting[0]["step"] < episode.total_steps:
                self.take(waiting.popleft())
            self.see(episode)
        for line in waiting:
            self.take(line)

    def see(self, episode: Episode) -> None:
        """Take in an episode, for the next decision."""
        self._handed_over = [*self._handed_over, episode.guarded_steps > 0][-EPISODES:]

    def take(self, iteration: Mapping[str, Any]) -> list[str]:
        """Lines about this decision, a line of iterations.jsonl; [] if there is nothing to say."""
        replaced = iteration["accepted"] or iteration["rolled_back"]
        refusals = [] if replaced else [*self._refusals, iteration["reason"]]
        self._refusals = refusals[-PATIENCE:]
        found = {
            f"{cause} of {limit.constraint}": text
            for (limit, config), line in zip(
                self._steered, [iteration, *iteration.get("further", [])], strict=False
            )
            for cause, text in self._of_lambda(limit, config, float(line["multiplier"])).items()
        }
        if len(self._refusals) == PATIENCE:
            found["refused"] = self._of_refusals(iteration.get("divergence", "KL"))
        if 2 * sum(self._handed_over) > EPISODES:
            found["handed over"] = self._of_hand_overs()
        new = {cause: text for cause, text in found.items() if cause not in self._said}
        self._said |= set(new)
        return list(new.values())

    def _of_lambda(self, limit: Limit, config: LagrangianConfig, value: float) -> dict[str, str]:
        aim, maximum = config.aim, config.maximum
        aimed = limit.quantity.text(aim * limit.value)
        name = "lambda" if len(self._steered) == 1 else f"lambda of {limit.constraint}"
        if value <= 0.0:
            return {
                "zero": f"{name} is 0: risk does not steer the learner while what lambda follows "
                f"is below {aimed} (lagrangian.aim x the limit); lower lagrangian.aim for more "
                "margin"
            }
        if value >= maximum:
            return {
                "cap": f"{name} is at its cap of {maximum:g} (lagrangian.maximum), where risk can "
                f"weigh no more; if estimates stay above {aimed}, raise the cap, or ask "
                "`safe-offrl inspect` whether anybody in the log keeps the limit"
            }
        return {}

    def _of_hand_overs(self) -> str:
        return (
            f"the guard handed over in {sum(self._handed_over)} of the last {EPISODES} episodes: "
            "the policy alone would exceed its limit there, and the fallback earns less; lower "
            "lagrangian.aim, so that it learns to need no guard, or guarding.caution (1 at least) "
            "if episodes cost much less than the limit"
        )

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
