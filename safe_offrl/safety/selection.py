"""Which of the policies that have acted a run hands over: chosen by what their episodes did.

Estimates do not tell a version from its neighbours, and the last one is only where the learner
happened to stop. So the end of the budget tests: nobody learns, the best version so far acts, and
each of its episodes may show another one to be better.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from safe_offrl.compute.state import Part
from safe_offrl.errors import ConfigError
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import Actor
from safe_offrl.safety.shield import Shield

ENOUGH = 3  # episodes that say anything of a version


@dataclass(frozen=True)
class SelectionConfig:
    """The last ``share`` of the budget tests versions that have acted; 0: the last one is kept.

    One episode says little of a version, but each differs from the next by less than delta: those
    of up to ``neighbours`` accepted before and after it count as well. The best ``kept`` of the
    versions can be chosen.
    """

    share: float = 0.1
    neighbours: int = 2
    kept: int = 8

    def __post_init__(self) -> None:
        """Refuse a share that leaves nothing to learn in, and a choice among none."""
        if not 0.0 <= self.share < 1.0:
            raise ConfigError(
                f"selection.share is {self.share}, but a share of the budget in [0, 1) is needed. "
                "Try 0.1, or 0 to hand over the last policy untested."
            )
        if self.neighbours < 0 or self.kept < 1:
            raise ConfigError(
                f"selection.neighbours is {self.neighbours} and selection.kept {self.kept}, but 0 "
                "and 1 at least are needed. Try 2 and 8."
            )


class Evidence(NamedTuple):
    """What episodes did: their number, and sums of their returns and outcomes (one a limit)."""

    episodes: int
    total_return: float
    outcomes: tuple[float, ...]

    @property
    def mean_return(self) -> float:
        """Return of an episode."""
        return self.total_return / self.episodes

    @property
    def mean_outcomes(self) -> tuple[float, ...]:
        """Outcome of an episode for each limit, in [0, 1]."""
        return tuple(outcome / self.episodes for outcome in self.outcomes)

    @classmethod
    def summed(cls, several: Iterable[Evidence], limits: int) -> Evidence:
        """All of them together; none of them is no episode."""
        total = cls(0, 0.0, (0.0,) * limits)
        for one in several:
            sums = zip(total.outcomes, one.outcomes, strict=True)
            total = cls(
                total.episodes + one.episodes,
                total.total_return + one.total_return,
                tuple(a + b for a, b in sums),
            )
        return total


class Candidate(NamedTuple):
    """A version that has acted, with its own shield."""

    version: int  # under which it acted first
    actor: Actor
    shield: Shield


class Selection:
    """Remembers the best versions of a run and what the episodes of all of them did.

    Versions stand at places: one that was accepted stands next to the one that it came from, one
    that an alarm put back stands apart from it. ``neighbours`` places away, evidence still counts.
    """

    def __init__(self, config: SelectionConfig, limits: Sequence[Limit]) -> None:
        self.config = config
        self._limits = limits
        self._place = 0  # of the version that acts
        self._candidates: dict[int, Candidate] = {}
        self._evidence: dict[int, Evidence] = {}
        self._tests: dict[int, int] = {}  # test episodes of those that were tested

    def see(
        self,
        version: int,
        actor: Actor,
        shield: Shield,
        episode_return: float,
        outcomes: Sequence[float],
        *,
        testing: bool,
    ) -> None:
        """Take in an episode of the version that acts; ``outcomes`` in [0, 1], one a limit."""
        place = self._place
        if place not in self._candidates:
            self._candidates[place] = Candidate(
                version, copy.deepcopy(actor).requires_grad_(False), copy.deepcopy(shield)
            )
        new = Evidence(1, episode_return, tuple(outcomes))
        known = [self._evidence[place]] if place in self._evidence else []
        self._evidence[place] = Evidence.summed([*known, new], len(self._limits))
        if testing:
            self._tests[place] = self._tests.get(place, 0) + 1
        self._forget()

    def moved(self, *, back: bool) -> None:
        """Another version acts from now on: the next one, or one that an alarm put ``back``."""
        self._place = max(self._evidence, default=0) + (self.config.neighbours if back else 0) + 1

    def around(self, place: int) -> Evidence:
        """Of the version at a place and its neighbours."""
        reach = range(place - self.config.neighbours, place + self.config.neighbours + 1)
        found = (self._evidence[p] for p in reach if p in self._evidence)
        return Evidence.summed(found, len(self._limits))

    def choose(self, *, last: bool, exceeded: bool) -> Candidate | None:
        """The version that acts from now on; None if it acts already.

        The highest return among those whose episodes keep every limit on average; of none that
        does, the one that exceeds them least. The ``last`` choice is among those that were tested.
        What is ``exceeded``, by an alarm, is what acts: it is not chosen again.
        """
        options = [p for p in self._candidates if not last or p in self._tests]
        options = [p for p in options if self.around(p).episodes >= ENOUGH]
        if exceeded:
            options = [p for p in options if p != self._place]
        best = max(options, key=lambda p: (*self._rank(p), p == self._place), default=self._place)
        if best == self._place:
            return None
        if exceeded:
            del self._candidates[self._place]
        self._place = best
        return self._candidates[best]

    def _rank(self, place: int) -> tuple[bool, float]:
        found = self.around(place)
        excess = max(
            mean / limit.share - 1.0
            for mean, limit in zip(found.mean_outcomes, self._limits, strict=True)
        )
        return (True, found.mean_return) if excess <= 0.0 else (False, -excess)

    def _forget(self) -> None:
        """Keep the best; those whose neighbours have not all acted cannot be compared yet."""
        complete = [p for p in self._candidates if abs(p - self._place) > self.config.neighbours]
        complete.sort(key=lambda p: (p in self._tests, *self._rank(p)))
        for place in complete[: max(0, len(self._candidates) - self.config.kept)]:
            del self._candidates[place]

    @property
    def tested(self) -> int:
        """Test episodes of the version that acts."""
        return self._tests.get(self._place, 0)

    def words(self) -> str:
        """Who acts, and why: a sentence without its beginning."""
        found = self.around(self._place)
        told = [
            f"{limit.quantity.per_episode} "
            f"{limit.quantity.text(mean * limit.scale)} (limit {limit.quantity.text(limit.value)})"
            for mean, limit in zip(found.mean_outcomes, self._limits, strict=True)
        ]
        return (
            f"version {self._candidates[self._place].version}: return {found.mean_return:.4g}, "
            f"{', '.join(told)} over {found.episodes} episodes of it and its neighbours"
        )

    # --- resume ---

    def parts(self) -> dict[str, Part]:
        """Policies that can still be chosen, as a checkpoint names them."""
        parts: dict[str, Part] = {}
        for place, candidate in self._candidates.items():
            parts[f"candidate.{place}"] = candidate.actor
            if candidate.shield.net is not None:
                parts[f"candidate.{place}_shield"] = candidate.shield.net
        return parts

    def info(self) -> dict[str, Any]:
        """The rest, JSON-able."""
        return {
            "place": self._place,
            "candidates": [[place, found.version] for place, found in self._candidates.items()],
            "evidence": [[p, n, ret, *sums] for p, (n, ret, sums) in self._evidence.items()],
            "tests": [[place, tests] for place, tests in self._tests.items()],
        }

    def load(self, info: Mapping[str, Any], actor: Actor, shield: Shield) -> None:
        """Continue from :meth:`info`; :meth:`parts`, of the shape of these, are restored next."""
        self._place = int(info["place"])
        self._candidates = {
            place: Candidate(version, copy.deepcopy(actor), copy.deepcopy(shield))
            for place, version in info["candidates"]
        }
        self._evidence = {p: Evidence(n, ret, tuple(sums)) for p, n, ret, *sums in info["evidence"]}
        self._tests = dict(info["tests"])
