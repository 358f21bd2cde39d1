"""Which of the policies that have acted a run hands over: chosen by what their episodes did.

Estimates do not tell a version from its neighbours, and the last one is only where the learner
happened to stop. So the end of the budget tests: nobody learns, the best version so far acts, and
each of its episodes may show another one to be better.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
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


class Sums(NamedTuple):
    """Of a number that each of some episodes has: how many there are, their sum, that of squares.

    >>> sums = Sums.of(1.0) + Sums.of(2.0) + Sums.of(6.0)
    >>> sums.mean, round(sums.error, 3)
    (3.0, 1.528)
    """

    episodes: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, value: float) -> Sums:
        """Of one episode."""
        return cls(1, value, value * value)

    def __add__(self, other: Sums) -> Sums:  # type: ignore[override]  # tuples would be joined
        return Sums(
            self.episodes + other.episodes, self.total + other.total, self.squares + other.squares
        )

    @property
    def mean(self) -> float:
        """Of an episode; at least one is needed."""
        return self.total / self.episodes

    @property
    def error(self) -> float:
        """Standard error of the mean, of two episodes at least."""
        n = self.episodes
        return math.sqrt(max(self.squares - self.total**2 / n, 0.0) / (n * (n - 1)))


class Evidence(NamedTuple):
    """What episodes did: their returns, and their outcomes in [0, 1] for each limit."""

    returns: Sums
    outcomes: tuple[Sums, ...]

    def __add__(self, other: Evidence) -> Evidence:  # type: ignore[override]
        outcomes = zip(self.outcomes, other.outcomes, strict=True)
        return Evidence(self.returns + other.returns, tuple(a + b for a, b in outcomes))


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
        self._none = Evidence(Sums(), (Sums(),) * len(limits))
        self._place = 0  # of the version that acts
        self._candidates: dict[int, Candidate] = {}
        self._evidence: dict[int, Evidence] = {}
        self._tests: dict[int, int] = {}  # test episodes of those that were tested

    def see(
        self,
        version: int,
        actor: Actor,
        shield: Shield,
        episode_return: float | None,
        outcomes: Sequence[float],
        *,
        testing: bool,
    ) -> None:
        """Take in an episode of the version that acts; ``outcomes`` in [0, 1], one a limit.

        The return is None of an episode whose end nobody saw: it counts for the limits alone.
        """
        place = self._place
        if place not in self._candidates:
            self._candidates[place] = Candidate(
                version, copy.deepcopy(actor).requires_grad_(False), copy.deepcopy(shield)
            )
        returns = Sums() if episode_return is None else Sums.of(episode_return)
        new = Evidence(returns, tuple(map(Sums.of, outcomes)))
        self._evidence[place] = self._evidence.get(place, self._none) + new
        if testing:
            self._tests[place] = self._tests.get(place, 0) + 1
        self._forget()

    def moved(self, *, back: bool) -> None:
        """Another version acts from now on: the next one, or one that an alarm put ``back``."""
        self._place += (self.config.neighbours if back else 0) + 1

    def around(self, place: int) -> Evidence:
        """Of the version at a place and its neighbours."""
        reach = range(place - self.config.neighbours, place + self.config.neighbours + 1)
        return sum((self._evidence.get(p, self._none) for p in reach), start=self._none)

    def choose(self, *, last: bool, exceeded: bool) -> Candidate | None:
        """The version that acts from now on; None if it acts already.

        The highest return less its standard error, among those whose episodes keep every limit
        with one standard error to spare; of none that does, the one that exceeds them least. The
        ``last`` choice is among those that were tested. What is ``exceeded``, by an alarm, is what
        acts: it is not chosen again.
        """
        options = [p for p in self._candidates if not last or p in self._tests]
        options = [p for p in options if self._rank(p)[1] > -math.inf]
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
        if found.returns.episodes < ENOUGH:
            return False, -math.inf
        upper = self.realised(place)
        excess = max(u / limit.share - 1.0 for u, limit in zip(upper, self._limits, strict=True))
        if excess > 0.0:
            return False, -excess
        return True, found.returns.mean - found.returns.error

    def realised(self, place: int | None = None) -> tuple[float, ...]:
        """Of the version that acts, or at a place: mean outcomes and a standard error more."""
        found = self.around(self._place if place is None else place)
        return tuple(sums.mean + sums.error for sums in found.outcomes)

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
            f"{limit.quantity.text(sums.mean * limit.scale)} "
            f"(limit {limit.quantity.text(limit.value)})"
            for sums, limit in zip(found.outcomes, self._limits, strict=True)
        ]
        return (
            f"version {self._candidates[self._place].version}: return {found.returns.mean:.4g}, "
            f"{', '.join(told)} over {found.returns.episodes} episodes of it and its neighbours"
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
            "evidence": [[p, ret, *several] for p, (ret, several) in self._evidence.items()],
            "tests": [[place, tests] for place, tests in self._tests.items()],
        }

    def load(self, info: Mapping[str, Any], actor: Actor, shield: Shield) -> None:
        """Continue from :meth:`info`; :meth:`parts`, of the shape of these, are restored next."""
        self._place = int(info["place"])
        self._candidates = {
            place: Candidate(version, copy.deepcopy(actor), copy.deepcopy(shield))
            for place, version in info["candidates"]
        }
        self._evidence = {
            place: Evidence(Sums(*returns), tuple(Sums(*sums) for sums in several))
            for place, returns, *several in info["evidence"]
        }
        self._tests = dict(info["tests"])
