"""Where a log does not go on within its episodes, by its next observations."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from safe_offrl.data.content import Arrays, Flags
from safe_offrl.data_formats.motion import (
    FEWEST,
    SAMPLE,
    Motion,
    distance,
    nearest,
    rows_of,
    tolerance,
)
from safe_offrl.errors import DataError

MOST_BREAKS = 0.25  # rows in order of time break less often within episodes


class Breaks(NamedTuple):
    """Rows [N] within episodes whose next observation is not the following row's observation.

    ``ends``: the log does not go on there. ``gaps``: it does, with rows missing. ``odd``: it does,
    and the next observation is the one that is out of place.
    """

    ends: Flags
    gaps: Flags
    odd: Flags


def unmarked_breaks(arrays: Arrays, motion: Motion | None, ends: Flags) -> Breaks | None:
    """Where a log breaks within its episodes (``ends`` [N] marks their last rows).

    None if that is not known: it is where next observations are, and most of them are the following
    row's observation. Raises DataError where so few are that the rows cannot be in the order of
    time.
    """
    # Whether next observations can tell.
    if motion is None or motion.link is None or motion.step is None:
        return None
    inner, none = ~ends[:-1], np.zeros(len(ends), bool)
    if inner.sum() < FEWEST:
        return None  # there is nothing that next observations could lead to
    # Rows that do not lead to the row that follows.
    same = motion.link <= tolerance(motion, inner)
    broken = inner & ~same
    share = broken.sum() / inner.sum()
    # A few of them: ends, gaps or odd rows.
    if share <= MOST_BREAKS:
        steps = motion.step[:-1][inner & same]
        far = 1.5 * float(np.quantile(steps, 0.999))
        odd = broken & (motion.step[:-1] > far) & (motion.jump <= far)
        broken &= ~odd
        # The median decides for all: an episode may begin near where the last one ended.
        near = broken.any() and float(np.median(motion.jump[broken])) <= far
        leads_on = near and not _begin_at_starts(arrays, motion, ends, broken)
        found = [np.append(flags, False) for flags in (broken, odd)]
        return Breaks(none, found[0], found[1]) if leads_on else Breaks(found[0], none, found[1])
    # Most of them: an order that is not that of time.
    _require_forward(arrays, motion, inner)
    link, step = (float(np.median(d[inner])) for d in (motion.link, motion.step[:-1]))
    if link > 2.0 * step or share < 0.75:
        raise DataError(
            f"next_observations of {int(broken.sum()):,} of {int(inner.sum()):,} rows within "
            "episodes are not the observations of the row that follows (the first is row "
            f"{int(broken.argmax())}): the rows are not in order of time, belong to several "
            "environments in turn or are repeated, or terminals and timeouts mark ends of episodes "
            "where there are none. Store one episode after the other, each row once, and mark its "
            "last row."
        )
    return None


def _require_forward(arrays: Arrays, motion: Motion, inner: Flags) -> None:
    """Raise DataError if most rows lead to the row before them."""
    rows = np.flatnonzero(inner)[:SAMPLE]
    before = motion.scale(rows_of(arrays["observations"], rows))
    led_to = motion.scale(rows_of(arrays["next_observations"], rows + 1))
    if np.median(distance(before, led_to)) <= motion.rounding:
        raise DataError(
            "The next observation of most rows is the observation of the row before: the rows are "
            "in reverse order of time. Store each episode from its first step to its last."
        )


def _begin_at_starts(arrays: Arrays, motion: Motion, ends: Flags, broken: Flags) -> bool:
    """Whether most rows after a break are just where other episodes begin."""
    starts = np.append(0, np.flatnonzero(ends[:-1]) + 1)[:512]
    rows = np.flatnonzero(broken)[:512] + 1
    observations = arrays["observations"]
    places = motion.scale(rows_of(observations, starts))
    distances = nearest(motion.scale(rows_of(observations, rows)), places)
    return float(np.median(distances)) <= motion.rounding
