"""Whether a log's ends of episodes agree with how its observations move from row to row.

A flag that is held for some rows, or shifted by one, changes every rate of accidents; the
observations show it: the world does not go on where an episode has ended, and elsewhere it does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_offrl.data.content import Arrays, chunks
from safe_offrl.errors import DataError

Flags = NDArray[np.bool_]
Distances = NDArray[np.float64]

SAMPLE = 2048  # rows that stand for all where distances between any two are needed
MOST_STARTS = 512
FEWEST = 20  # rows: fewer do not tell how far one usually moves
MOST_BREAKS = 0.25  # share of the rows within episodes: more are no order of time
FEW = 0.02  # share of the ends that chance may make look wrong where only jumps are known
MANY = 0.1


class Motion(NamedTuple):
    """Distances between observations: root mean square over entries, in standard deviations.

    ``jump`` [N - 1]: from a row's observation to the following row's. ``link`` [N - 1]: from a
    row's next observation to the following row's observation, ``step`` [N] from its observation to
    its next one; both None without next observations. ``apart``: of two rows at random, the median.
    ``rounding``: below it two observations are the same. ``repeats``: whether most observations
    occur more than once, as in a grid.
    """

    jump: Distances
    link: Distances | None
    step: Distances | None
    apart: float
    rounding: float
    repeats: bool

    @property
    def usual(self) -> Distances:
        """How far a row moves [N]: its step, else the jump to the following row (of the last 0)."""
        return np.append(self.jump, 0.0) if self.step is None else self.step


def measure(arrays: Arrays) -> Motion | None:
    """Distances of a log's observations [N, O], read in chunks; None where they tell nothing.

    That is, if they never change, are too few or no numbers (which is refused elsewhere).
    """
    observations, following = arrays["observations"], arrays.get("next_observations")
    tables = [observations, *([] if following is None else [following])]
    sound = all(t.ndim == 2 and t.shape == observations.shape for t in tables)
    if not sound or len(observations) < FEWEST or any(t.dtype.kind not in "fiub" for t in tables):
        return None
    scale, rounding = _scale(observations)
    if not len(scale.entries):
        return None
    n = len(observations)
    jump, link, step = np.zeros(n - 1), np.zeros(n - 1), np.zeros(n)
    drawn = np.sort(np.random.default_rng(0).permutation(n)[:SAMPLE])
    sample = []
    for part in chunks(n):
        here = scale(observations[part.start : min(part.stop + 1, n)])
        inner = slice(part.start, min(part.stop, n - 1))
        now, later = here[: part.stop - part.start], here[1:]
        jump[inner] = _distance(now[: len(later)], later)
        sample.append(now[drawn[(drawn >= part.start) & (drawn < part.stop)] - part.start])
        if following is not None:
            then = scale(following[part])
            step[part] = _distance(now, then)
            link[inner] = _distance(then[: len(later)], later)
    some = np.concatenate(sample)
    shuffled = np.random.default_rng(1).permutation(some)
    return Motion(
        jump=jump,
        link=None if following is None else link,
        step=None if following is None else step,
        apart=float(np.median(_distance(some, shuffled))),
        rounding=rounding,
        repeats=len(np.unique(some, axis=0)) < 0.5 * len(some),
    )


class Breaks(NamedTuple):
    """Rows [N] within episodes whose next observation is not the following row's observation.

    ``cut``: the log does not go on there. ``odd``: it does, and the next observation is the one
    that is out of place.
    """

    cut: Flags
    odd: Flags


def unmarked_breaks(motion: Motion | None, ends: Flags) -> Breaks | None:
    """Where a log breaks within its episodes (``ends`` [N] marks their last rows).

    None if that is not known: it is where next observations are, and most of them are the following
    row's observation. Raises DataError where so few are that the rows cannot be in the order of
    time.
    """
    if motion is None or motion.link is None or motion.step is None:
        return None
    inner = ~ends[:-1]
    if not inner.any():
        return Breaks(np.zeros(len(ends), bool), np.zeros(len(ends), bool))
    same = motion.link <= _tolerance(motion, inner)
    broken = inner & ~same
    share = broken.sum() / inner.sum()
    if share <= MOST_BREAKS:
        far = 1.5 * float(np.quantile(motion.step[:-1][inner & same], 0.999))
        odd = broken & (motion.step[:-1] > far) & (motion.jump <= far)
        return Breaks(np.append(broken & ~odd, False), np.append(odd, False))
    link, step = (float(np.median(d[inner])) for d in (motion.link, motion.step[:-1]))
    if link > 2.0 * step or share < 0.75:
        raise DataError(
            f"{int(broken.sum()):,} of {int(inner.sum()):,} rows within episodes do not lead to "
            f"the row that follows (the first is row {int(broken.argmax())}): the rows are not in "
            "the order of time, belong to several environments in turn, or are repeated. Store one "
            "episode after the other, each row once."
        )
    return None


def _tolerance(motion: Motion, inner: Flags) -> float:
    """Below it a next observation is the following row's observation."""
    usual = float(np.median(motion.usual[:-1][inner])) if inner.any() else motion.apart
    return max(motion.rounding, 1e-3 * usual)


class Doubt(NamedTuple):
    """What is wrong with the ends of episodes, in a sentence, and whether it is beyond chance."""

    sentence: str
    certain: bool


def doubts(
    arrays: Arrays, motion: Motion | None, terminals: Flags, timeouts: Flags, known: bool
) -> list[Doubt]:
    """Why ends may be none [N], or be missing; ``known``: next observations link the rows."""
    if motion is None:
        return []
    ends = terminals | timeouts
    marked = np.flatnonzero(ends[:-1])
    inner = ~ends[:-1]
    far = _unusual(motion, inner)
    linked = ends[:-1].copy()
    if known and motion.link is not None:
        linked &= motion.link <= _tolerance(motion, inner)
    goes_on = linked & (motion.usual[:-1] <= far)
    sure = marked[~goes_on[marked]] + 1  # rows at which episodes do begin
    starts = _rows(arrays["observations"], np.append(0, sure)[:MOST_STARTS])
    suspects = np.flatnonzero(goes_on)
    # Where some ends do not lead on, one that does is no coincidence.
    exact = known and not linked[marked].all()
    if not exact and _restless(motion, inner):
        return []
    near = _near_starts(arrays, motion, starts, suspects + 1, exact)
    suspects = suspects[~near]
    found = []
    if len(suspects):
        share = len(suspects) / max(len(marked), 1)
        certain = share > MANY or (exact and not motion.repeats)
        if certain or share > FEW:
            found.append(
                Doubt(_goes_on(motion, ends, terminals, suspects, len(marked), far), certain)
            )
    if not known and inner.sum() >= FEWEST:
        found += _missing_ends(arrays, motion, ends, starts, far)
    return found


def overshot(motion: Motion, terminals: Flags, timeouts: Flags) -> Flags:
    """Timeouts [N] whose next observation is the first one of the next episode.

    So it is where next observations were made by shifting observations across the ends.
    """
    inner = ~(terminals | timeouts)[:-1]
    assert motion.link is not None
    if _restless(motion, inner):
        return np.zeros(len(terminals), bool)
    linked = motion.link <= _tolerance(motion, inner)
    return np.append(timeouts[:-1] & linked & (motion.usual[:-1] > _unusual(motion, inner)), False)


def _restless(motion: Motion, inner: Flags) -> bool:
    """Whether a step within an episode leads as far as to any other row: none is unusual."""
    return bool(inner.any() and np.median(motion.usual[:-1][inner]) > 0.5 * motion.apart)


def _unusual(motion: Motion, inner: Flags) -> float:
    """A move beyond this is no step within an episode."""
    moves = motion.usual[:-1][inner]
    if len(moves) < FEWEST:
        return 0.2 * motion.apart
    if motion.step is None:  # unmarked ends may be among them
        return float(np.quantile(moves, 0.9))
    return 1.5 * float(np.quantile(moves, 0.999))


def _near_starts(
    arrays: Arrays, motion: Motion, starts: NDArray[Any], rows: NDArray[np.int64], exact: bool
) -> Flags:
    """Whether the rows [K] are where other episodes begin: there, or as near as these lie."""
    scale, _ = _scale(arrays["observations"])
    first = scale(starts)
    radius = motion.rounding if exact else max(motion.rounding, _spacing(first))
    result = np.zeros(len(rows), bool)
    for part in chunks(len(rows)):
        here = scale(_rows(arrays["observations"], rows[part]))
        nearest = np.full(len(here), np.inf)
        for start in first:
            np.minimum(nearest, _distance(here, start[None]), out=nearest)
        result[part] = nearest <= radius
    return result


def _spacing(points: NDArray[np.float64]) -> float:
    """How far most of the points [K, O] lie from their nearest neighbour; 0 of fewer than 2."""
    if len(points) < 2:
        return 0.0
    nearest = []
    for k, point in enumerate(points):
        others = _distance(np.delete(points, k, axis=0), point[None])
        nearest.append(others.min())
    return float(np.quantile(nearest, 0.95))


def _goes_on(
    motion: Motion, ends: Flags, terminals: Flags, rows: NDArray[np.int64], marked: int, far: float
) -> str:
    """The sentence for ends after which the log goes on."""
    kinds = [
        name
        for name, some in (("terminals", terminals[rows]), ("timeouts", ~terminals[rows]))
        if some.any()
    ]
    held = float(ends[rows + 1].mean()) > 0.5
    again = rows[rows + 1 < len(motion.usual) - 1] + 1
    repeated = not held and motion.step is not None and len(again) > 0
    if held:
        why = "as if a flag were held for several rows or set on all of them"
    elif repeated and float((motion.usual[again] > far).mean()) > 0.5:
        why = (
            "as if after each end there were a row of an environment that resets itself, or flags "
            "were set one row too early"
        )
    else:
        why = "as if flags were set one row too early, or the log were cut into pieces"
    return (
        f"{len(rows):,} of {marked:,} ends of episodes ({' and '.join(kinds)}; the first in row "
        f"{rows[0]}) are followed by a row that goes on where they stop, {why}"
    )


def _missing_ends(
    arrays: Arrays, motion: Motion, ends: Flags, starts: NDArray[Any], far: float
) -> list[Doubt]:
    """Rows within episodes that jump to where episodes begin, where all begin at one place."""
    scale, _ = _scale(arrays["observations"])
    radius = max(motion.rounding, _spacing(scale(starts)))
    jumps = np.flatnonzero(~ends[:-1] & (motion.jump > 3.0 * far))
    if radius > 0.1 * motion.apart or len(starts) < 2 or not len(jumps):
        return []
    rows = jumps[_near_starts(arrays, motion, starts, jumps + 1, exact=False)]
    if not len(rows):
        return []
    share = len(rows) / max(int(ends.sum()), 1)
    return [
        Doubt(
            f"{len(rows):,} rows within episodes jump to where episodes begin (the first is row "
            f"{rows[0]}), as if ends were not marked",
            certain=share > MANY,
        )
    ]


class _Scale(NamedTuple):
    """Entries of an observation that vary, and what one is measured by."""

    entries: NDArray[np.int64]
    centre: NDArray[np.float64]
    spread: NDArray[np.float64]

    def __call__(self, rows: NDArray[Any]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore", over="ignore"):
            varying = np.asarray(rows, np.float64)[:, self.entries]
            return np.asarray((varying - self.centre) / self.spread)


def _scale(observations: NDArray[Any]) -> tuple[_Scale, float]:
    """How to measure observations, and what float32 rounds off in that measure."""
    n, size = observations.shape
    total, square, largest = np.zeros(size), np.zeros(size), np.zeros(size)
    with np.errstate(invalid="ignore", over="ignore"):
        for part in chunks(n):
            rows = np.asarray(observations[part], np.float64)
            total += rows.sum(axis=0)
            largest = np.maximum(largest, np.abs(rows).max(axis=0))
        centre = total / n
        for part in chunks(n):
            square += np.square(np.asarray(observations[part], np.float64) - centre).sum(axis=0)
        spread = np.sqrt(square / n)
        digits = 4.0 * float(np.finfo(np.float32).eps)
        varies = np.isfinite(spread) & (spread > digits * largest)
    entries = np.flatnonzero(varies)
    if not len(entries):
        return _Scale(entries, centre[entries], spread[entries]), 0.0
    rounding = digits * float((largest[entries] / spread[entries]).max())
    return _Scale(entries, centre[entries], spread[entries]), max(rounding, 1e-6)


def _rows(observations: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    """Some rows, in ascending order, also of a file that is not in memory."""
    return np.asarray(observations[np.unique(rows)])


def _distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> Distances:
    return np.asarray(np.sqrt(np.square(a - b).mean(axis=1)))
