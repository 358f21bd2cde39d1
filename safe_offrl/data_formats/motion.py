"""How a log's observations move from row to row, measured so that any units and sizes compare."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_offrl.data.content import Arrays, Flags, chunks

Distances = NDArray[np.float64]

SAMPLE = 2048  # so many rows stand for all where distances between any two are needed
FEWEST = 20  # fewer rows do not tell how far one usually moves


class Scale(NamedTuple):
    """Entries of an observation that vary, and what one is measured by."""

    entries: NDArray[np.int64]
    centre: NDArray[np.float64]
    spread: NDArray[np.float64]

    def __call__(self, rows: NDArray[Any]) -> NDArray[np.float64]:
        """Rows [K, O] -> [K, entries] in standard deviations from the mean."""
        with np.errstate(invalid="ignore", over="ignore"):
            varying = np.asarray(rows, np.float64)[:, self.entries]
            return np.asarray((varying - self.centre) / self.spread)


class Motion(NamedTuple):
    """Distances between observations: root mean square over entries, in standard deviations.

    ``jump`` [N - 1]: from a row's observation to the following row's. ``link`` [N - 1]: from a
    row's next observation to the following row's observation, ``step`` [N] from its observation to
    its next one; both None without next observations. ``apart``: of two rows at random, the median.
    ``rounding``: below it two observations are the same. ``repeats``: whether most observations
    occur several times, as in a grid.
    """

    scale: Scale
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


def measure_motion(arrays: Arrays) -> Motion | None:
    """Distances of a log's observations [N, O], read in chunks; None where they tell nothing.

    That is, if they never change, are too few or no numbers (which is refused elsewhere).
    """
    # Whether there is anything to measure.
    observations, following = arrays["observations"], arrays.get("next_observations")
    tables = [observations, *([] if following is None else [following])]
    sound = all(t.ndim == 2 and t.shape == observations.shape for t in tables)
    if not sound or len(observations) < FEWEST or any(t.dtype.kind not in "fiub" for t in tables):
        return None
    scale, rounding = _scale(observations)
    if not len(scale.entries):
        return None
    # Distances, chunk by chunk.
    n = len(observations)
    jump, link, step = np.zeros(n - 1), np.zeros(n - 1), np.zeros(n)
    drawn = np.sort(np.random.default_rng(0).permutation(n)[:SAMPLE])
    sample = []
    for part in chunks(n):
        here = scale(observations[part.start : min(part.stop + 1, n)])
        inner = slice(part.start, min(part.stop, n - 1))
        now, later = here[: part.stop - part.start], here[1:]
        jump[inner] = distance(now[: len(later)], later)
        sample.append(now[drawn[(drawn >= part.start) & (drawn < part.stop)] - part.start])
        if following is not None:
            then = scale(following[part])
            step[part] = distance(now, then)
            link[inner] = distance(then[: len(later)], later)
    # The distance between any two.
    some = np.concatenate(sample)
    shuffled = np.random.default_rng(1).permutation(some)
    return Motion(
        scale=scale,
        jump=jump,
        link=None if following is None else link,
        step=None if following is None else step,
        apart=float(np.median(distance(some, shuffled))),
        rounding=rounding,
        repeats=len(np.unique(some, axis=0)) < 0.25 * len(some),
    )


def distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> Distances:
    """Root mean square difference of scaled rows [K, entries], or of one with all: [K]."""
    return np.asarray(np.sqrt(np.square(a - b).mean(axis=1)))


def rows_of(observations: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    """Rows [K] in ascending order, also of a file that is not in memory."""
    return np.asarray(observations[rows])


def links(motion: Motion, ends: Flags) -> Flags:
    """Rows [N - 1] whose next observation is the following row's observation."""
    assert motion.link is not None
    return motion.link <= tolerance(motion, ~ends[:-1])


def tolerance(motion: Motion, inner: Flags) -> float:
    """Below it a next observation is the following row's observation."""
    usual = float(np.median(motion.usual[:-1][inner])) if inner.any() else motion.apart
    return max(motion.rounding, 1e-4 * usual)


def nearest(points: NDArray[np.float64], others: NDArray[np.float64]) -> Distances:
    """Distance of each of the points [K, entries] from the nearest of the others."""
    nearest = np.full(len(points), np.inf)
    for other in others:
        np.minimum(nearest, distance(points, other[None]), out=nearest)
    return nearest


class Copies(NamedTuple):
    """``episodes`` of a log that are, number by number, an earlier one again.

    ``in_a_row``: those that follow each other as their originals do, as in rows that are there
    twice; chance repeats one here and one there.
    """

    episodes: int
    in_a_row: int


def copies_of_episodes(arrays: Arrays, starts: NDArray[np.int64]) -> Copies:
    """Which of a log's episodes are copies; ``starts`` [M + 1] are their first rows, then N."""
    keys = ("observations", "actions", "rewards")
    position = np.arange(starts[-1]) - np.repeat(starts[:-1], np.diff(starts))
    sums = np.zeros(starts[-1], np.uint64)
    with np.errstate(over="ignore"):
        for part in chunks(int(starts[-1])):
            columns = [np.asarray(arrays[key][part], np.float32) for key in keys]
            block = np.column_stack(columns).view(np.uint32).astype(np.uint64)
            weights = np.random.default_rng(2).integers(1, 2**62, block.shape[1], np.uint64)
            mixed = (block * (2 * weights + 1)).sum(axis=1, dtype=np.uint64)
            mixed ^= mixed >> np.uint64(29)
            order = 2 * position[part].astype(np.uint64) + 1
            sums[part] = mixed * order * np.uint64(0x9E3779B97F4A7C15)
        totals = np.add.reduceat(sums, starts[:-1])
    keys_of = np.column_stack([totals, np.diff(starts).astype(np.uint64)])
    _, first, which = np.unique(keys_of, axis=0, return_index=True, return_inverse=True)
    original = first[which.reshape(-1)]
    copied = original < np.arange(len(original))
    follows = copied[1:] & copied[:-1] & (np.diff(original) == 1)
    in_a_row = np.append(follows, False) | np.append(False, follows)
    return Copies(int(copied.sum()), int(in_a_row.sum()))


def _scale(observations: NDArray[Any]) -> tuple[Scale, float]:
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
    scale = Scale(entries, centre[entries], spread[entries])
    if not len(entries):
        return scale, 0.0
    return scale, max(digits * float((largest[entries] / spread[entries]).max()), 1e-6)
