"""Whether a log's ends of episodes agree with how its observations move from row to row.

A flag that is held for some rows, or shifted by one, changes every rate of accidents; the
observations show it: the world does not go on where an episode has ended, and elsewhere it does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_offrl.data.content import Arrays, Flags
from safe_offrl.data_formats.breaks import MOST_BREAKS
from safe_offrl.data_formats.motion import (
    FEWEST,
    SAMPLE,
    Distances,
    Motion,
    distance,
    links,
    nearest,
    rows_of,
)

NEIGHBOURS = 10  # an episode is compared with so many before and after it
MOST_ENDS = 20_000  # only so many ends are compared, from both sides of a larger log
FEW = 0.02  # an honest log may have this share of odd ends
CERTAIN = 6.0  # chance does not reach so many standard errors in any number of logs
DOUBTFUL = 4.0


class Doubt(NamedTuple):
    """What is wrong with the ends of episodes, in a sentence, and whether it is beyond chance."""

    sentence: str
    certain: bool


def doubts(
    arrays: Arrays, motion: Motion, terminals: Flags, timeouts: Flags, *, known: bool
) -> list[Doubt]:
    """Why ends [N] may be none, or be missing; ``known``: next observations link the rows."""
    ends = terminals | timeouts
    if known:
        linked = links(motion, ends)
        if not linked[ends[:-1]].all():
            found = _ends_that_lead_on(arrays, motion, terminals, timeouts, linked)
            return found or _stray_starts(arrays, motion, terminals, timeouts)
    found = _dependent_starts(arrays, motion, terminals, timeouts)
    found += [] if found else _single_steps(motion, terminals, timeouts)
    found += _shifted(arrays, motion, terminals, "terminals")
    found += _shifted(arrays, motion, timeouts, "timeouts")
    if not any(doubt.certain for doubt in found):
        found = _stray_starts(arrays, motion, terminals, timeouts) or found
    if not known and not found:
        found += _missing_ends(arrays, motion, ends)
    return found


def overshot(motion: Motion, terminals: Flags, timeouts: Flags) -> Flags:
    """Timeouts [N] whose next observation is the first one of the next episode.

    So it is where next observations were made by shifting observations across the ends: then that
    of every end is.
    """
    linked, marked = links(motion, terminals | timeouts), (terminals | timeouts)[:-1]
    steps = motion.usual[:-1]
    none = np.zeros(len(terminals), bool)
    if not linked[marked].all() or not marked.any() or marked.all():
        return none
    # An episode may end where the next one begins, and the step across is then like any other.
    far = 1.5 * np.quantile(steps[~marked], 0.999)
    return np.append(timeouts[:-1], False) if np.median(steps[marked]) > far else none


def _ends_that_lead_on(
    arrays: Arrays, motion: Motion, terminals: Flags, timeouts: Flags, linked: Flags
) -> list[Doubt]:
    """Ends whose next observation is the following row's although that of others is not.

    In continuous states that is no coincidence, unless the row is where another episode begins.
    """
    marked = (terminals | timeouts)[:-1]
    starts = np.append(0, np.flatnonzero(marked & ~linked) + 1)[:512]
    suspects = np.flatnonzero(marked & linked)
    places = motion.scale(rows_of(arrays["observations"], starts))
    here = motion.scale(rows_of(arrays["observations"], suspects + 1))
    suspects = suspects[nearest(here, places) > motion.rounding]
    if not len(suspects):
        return []
    # Readings that never repeat do not meet by chance; those of a coarse sensor may.
    inner = np.setdiff1d(np.arange(len(marked)), np.append(starts, suspects + 1))[:SAMPLE]
    seen = rows_of(arrays["observations"], inner)
    certain = len(np.unique(seen, axis=0)) == len(seen) or len(suspects) > 0.1 * marked.sum()
    return [Doubt(_sentence(motion, terminals, timeouts, suspects), certain)]


def _dependent_starts(
    arrays: Arrays, motion: Motion, terminals: Flags, timeouts: Flags
) -> list[Doubt]:
    """Ends where the next episode begins nearer than others do.

    Where an episode begins does not depend on where the one before has ended: among the starts
    around it, the following one has any rank by its distance from the end with the same
    probability. Ranks r in [0, 1] of K ends have the mean 1/2 and the variance 1/12, whatever the
    states are; a sum of ranks (Wilcoxon, 1945) far below says that the log goes on.
    """
    marked = np.flatnonzero((terminals | timeouts)[:-1])
    if len(marked) > MOST_ENDS:
        marked = np.concatenate([marked[: MOST_ENDS // 2], marked[-MOST_ENDS // 2 :]])
    if len(marked) < 5:
        return []
    ends = motion.scale(rows_of(arrays["observations"], marked))
    starts = motion.scale(rows_of(arrays["observations"], marked + 1))
    ranks = _ranks(ends, starts, motion.rounding)
    score = (0.5 - float(ranks.mean())) * float(np.sqrt(12.0 * len(ranks)))
    if score < DOUBTFUL or ranks.mean() > 0.45:
        return []
    suspects = marked[
        (ranks <= 0.25) & (motion.jump[marked] <= _usual_jump(motion, terminals | timeouts))
    ]
    if len(suspects) < 0.5 * (ranks <= 0.25).sum():
        return []  # a slow variable goes on, but the rest begins anew
    certain = score >= CERTAIN or ranks.mean() <= 0.1
    return [Doubt(_sentence(motion, terminals, timeouts, suspects), certain)]


def _usual_jump(motion: Motion, ends: Flags) -> float:
    """How far one row may lie from the next within an episode, few exceptions apart."""
    inner = ~ends[:-1]
    if inner.sum() < FEWEST:
        return 0.25 * motion.apart
    return 1.5 * float(np.quantile(motion.jump[inner], 0.99))


def _stray_starts(arrays: Arrays, motion: Motion, terminals: Flags, timeouts: Flags) -> list[Doubt]:
    """Starts a usual step from the end before, each at a place of its own, where many share one.

    Where fewer than half share it, episodes may begin at it or anywhere: then most of those that
    begin anywhere begin far from where the one before ended.
    """
    marked = np.flatnonzero((terminals | timeouts)[:-1])[:MOST_ENDS]
    if len(marked) < 5:
        return []
    starts = motion.scale(rows_of(arrays["observations"], marked + 1))
    _, which, count = np.unique(starts, axis=0, return_inverse=True, return_counts=True)
    usual, shared = _usual_jump(motion, terminals | timeouts), count.max() / len(marked)
    if shared < 0.2 or (shared < 0.5 and usual > 0.5 * motion.apart):
        return []
    alone = count[which.reshape(-1)] == 1
    rows = marked[alone & (motion.jump[marked] <= usual)]
    if not len(rows) or (shared < 0.5 and len(rows) < 0.5 * alone.sum()):
        return []
    certain = len(rows) >= max(3.0, FEW * len(marked))
    return [Doubt(_sentence(motion, terminals, timeouts, rows), certain)]


def _ranks(ends: NDArray[np.float64], starts: NDArray[np.float64], rounding: float) -> Distances:
    """Share of the neighbours' starts that lie nearer to an end [K] than its own; ties are half."""
    own, n = distance(ends, starts), len(ends)
    nearer, compared = np.zeros(n), np.zeros(n)
    for offset in range(-NEIGHBOURS, NEIGHBOURS + 1):
        here = slice(max(0, -offset), min(n, n - offset))
        there = slice(max(0, offset), min(n, n + offset))
        if offset == 0 or here.start >= here.stop:
            continue
        other = distance(ends[here], starts[there])
        tied = np.abs(other - own[here]) <= rounding
        nearer[here] += np.where(tied, 0.5, other < own[here])
        compared[here] += 1.0
    return nearer / np.maximum(compared, 1.0)


def idle_starts(motion: Motion, ends: Flags) -> str:
    """That the first row of every episode alone goes nowhere, "" if it does; ``ends`` [N]."""
    starts = np.append(True, ends[:-1])
    idle = motion.usual <= motion.rounding
    if starts.sum() < 5 or idle[starts].mean() < 0.9 or idle[~starts].mean() > 0.05:
        return ""
    return (
        f"the first row of {int(idle[starts].sum()):,} episodes leads to the same observation "
        "again, and hardly another does: if an environment was only reset there, it is no step."
    )


def _single_steps(motion: Motion, terminals: Flags, timeouts: Flags) -> list[Doubt]:
    """Many episodes of a single step, each a usual step away from where the one before ended."""
    ends = terminals | timeouts
    inner = ~ends[:-1]
    if inner.sum() < FEWEST:
        return []
    usual = float(np.quantile(motion.jump[inner], 0.9))
    rows = np.flatnonzero(ends[:-1] & ends[1:] & (motion.jump <= usual))
    if not len(rows) or len(rows) < 0.1 * ends.sum():
        return []
    return [Doubt(_sentence(motion, terminals, timeouts, rows), certain=False)]


def _shifted(arrays: Arrays, motion: Motion, flags: Flags, name: str) -> list[Doubt]:
    """Flags [N] that stand a row beside where the log jumps.

    That is certain where they stand on the very place in which the log begins.
    """
    rows = np.flatnonzero(flags[1:-2]) + 1
    inner = ~flags[:-1]
    if len(rows) < 5 or inner.sum() < FEWEST:
        return []
    usual = max(float(np.median(motion.jump[inner])), motion.rounding)
    far, near = motion.jump >= 2.0 * usual, motion.jump[rows] <= 1.5 * usual
    before, after = (float((near & far[rows + s]).mean()) for s in (-1, 1))
    chance = max(float(far[inner].mean()), 1.0 / len(rows))
    score = (max(before, after) - chance) / np.sqrt(chance * (1.0 - chance) / len(rows))
    if max(before, after) < 0.3 or score < DOUBTFUL:
        return []
    which = "late" if before > after else "early"
    first = motion.scale(rows_of(arrays["observations"], np.array([0])))
    at_first, after_it = (
        distance(motion.scale(rows_of(arrays["observations"], r)), first) <= motion.rounding
        for r in (rows, rows + 1)
    )
    return [
        Doubt(
            f"the log jumps a row {'before' if before > after else 'after'} where {name} mark ends "
            f"of episodes (the first in row {rows[0]}), and goes on there, as if they were a row "
            f"{which}",
            certain=bool(at_first.mean() > 0.5 and after_it.mean() < 0.1),
        )
    ]


def _missing_ends(arrays: Arrays, motion: Motion, ends: Flags) -> list[Doubt]:
    """Rows within episodes that move as far as from one episode to the next."""
    inner, marked = ~ends[:-1], ends[:-1]
    if inner.sum() < FEWEST or not marked.any():
        return []
    reset = float(np.median(motion.jump[marked]))
    rows = np.flatnonzero(inner & (motion.jump >= 0.9 * reset))
    ordinary = 3.0 * float(np.quantile(motion.jump[inner], 0.9))
    if reset <= ordinary or len(rows) < max(1.0, 0.02 * marked.sum()):
        return []
    starts = np.append(0, np.flatnonzero(marked) + 1)[:512]
    places = motion.scale(rows_of(arrays["observations"], starts))
    spread = float(np.median(distance(places, np.median(places, axis=0)[None])))
    here = motion.scale(rows_of(arrays["observations"], rows + 1))
    # It is certain where all episodes begin at one place and so many rows lead there.
    same = spread < 0.05 * motion.apart and np.median(nearest(here, places)) < 0.1 * motion.apart
    return [
        Doubt(
            f"{len(rows):,} rows within episodes (the first is row {rows[0]}) move as far as from "
            "one episode to the next, as if terminals or timeouts were missing, or rows were",
            certain=bool(same) and len(rows) > MOST_BREAKS * marked.sum(),
        )
    ]


def _sentence(motion: Motion, terminals: Flags, timeouts: Flags, rows: NDArray[np.int64]) -> str:
    """That the log goes on after these ends, and what that looks like."""
    ends = terminals | timeouts
    names = {"terminals": terminals, "timeouts": timeouts}
    kinds = " and ".join(name for name, flags in names.items() if flags[rows].any())
    following = rows[rows + 1 < len(motion.jump)] + 1
    if float(ends[np.minimum(rows + 1, len(ends) - 1)].mean()) > 0.3:
        why = "as if a flag were held for several rows or set on all of them"
    elif len(following) and np.median(motion.jump[following]) > 3.0 * np.median(motion.jump[rows]):
        why = "as if they stood a row early, or a row that resets the environment came after each"
    else:
        why = "as if the log were cut into pieces"
    return (
        f"{len(rows):,} of {int(ends[:-1].sum()):,} ends of episodes ({kinds}; the first in row "
        f"{rows[0]}) are followed by a row that goes on where they stop, {why}"
    )
