"""Corruptions of the ends of episodes and of the order of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.data_formats.clean_logs import Log
from tests.data_formats.corruptions import Change, ends_of, put, take

# --- flags ---


def flag(name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Change:
    return lambda log: put(log, **{name: change(log.arrays[name])})


def held(name: str, before: int, after: int = 0) -> Change:
    """A flag that is on for ``before`` more rows before the end, and ``after`` of the next."""

    def change(log: Log) -> Log:
        found = log.arrays[name].copy()
        for k in range(1, before + 1):
            same = log.episode[:-k] == log.episode[k:]
            found[:-k] |= log.arrays[name][k:] & same
        for k in range(1, after + 1):
            found[k:] |= log.arrays[name][:-k]
        return put(log, **{name: found})

    return change


def early(values: NDArray[Any]) -> NDArray[Any]:
    return np.append(values[1:], values[:1] * 0)


def late(values: NDArray[Any]) -> NDArray[Any]:
    return np.append(values[:1] * 0, values[:-1])


def both_at_time_limit(log: Log) -> Log:
    return put(log, terminals=ends_of(log))


def old_done(log: Log) -> Log:
    """One flag for both ends, as Gym had it, under the name of the terminations."""
    return put(log, terminals=ends_of(log), timeouts=np.zeros(len(log.rows), bool))


def success_kept_on(log: Log) -> Log:
    """The flag says "near the goal", and the episode goes on there."""
    near = log.arrays["observations"][:, 0]
    return put(log, terminals=log.arrays["terminals"] | (near > np.quantile(near, 0.8)))


def swapped(log: Log) -> Log:
    return put(log, terminals=log.arrays["timeouts"], timeouts=log.arrays["terminals"])


def no_ends(log: Log) -> Log:
    none = np.zeros(len(log.rows), bool)
    return put(log, terminals=none, timeouts=none)


# --- rows, and what they say of each other ---


def next_of_reset(log: Log) -> Log:
    """The last next observation of an episode is the first of the next one."""
    first = log.arrays["observations"]
    return put(log, next_observations=np.concatenate([first[1:], first[-1:]]))


def with_reset_rows(log: Log) -> Log:
    """Gymnasium's autoreset in the next step: a row between episodes in which nothing acts."""
    first = log.arrays["observations"]
    after = np.flatnonzero(ends_of(log))[:-1]
    index = np.sort(np.concatenate([np.arange(len(log.rows)), after]))
    invented = np.append(False, np.diff(index) == 0)
    found = take(log, index)
    arrays = {key: array.copy() for key, array in found.arrays.items()}
    for key in ("rewards", "costs", "terminals", "timeouts"):
        arrays[key][invented] = 0
    arrays["observations"][invented] = log.arrays["next_observations"][after]
    arrays["next_observations"][invented] = first[after + 1]
    rows = np.where(invented, -1, found.rows)
    return dataclasses.replace(found, arrays=arrays, rows=rows)


def interleaved(streams: int) -> Change:
    """Rows of several environments at once, as a vector of them gives them; the rest is last."""

    def change(log: Log) -> Log:
        queues = [np.flatnonzero(log.episode % streams == k) for k in range(streams)]
        together = min(map(len, queues))
        mixed = np.stack([queue[:together] for queue in queues], axis=1).ravel()
        return take(log, np.concatenate([mixed, *(queue[together:] for queue in queues)]))

    return change


def shuffled(log: Log) -> Log:
    return take(log, np.random.default_rng(1).permutation(len(log.rows)))


def sorted_by_reward(log: Log) -> Log:
    return take(log, np.argsort(log.arrays["rewards"], kind="stable"))


def reversed_rows(log: Log) -> Log:
    return take(log, np.arange(len(log.rows))[::-1])


def reversed_episodes(log: Log) -> Log:
    """Each episode from its last row to its first, with the flags at its end again."""
    found = take(log, np.lexsort((-log.rows, log.episode)))
    return put(found, terminals=log.arrays["terminals"], timeouts=log.arrays["timeouts"])


def without(part: Callable[[int], Any]) -> Change:
    """Rows lost: ``part`` of how many there are."""
    return lambda log: take(log, np.delete(np.arange(len(log.rows)), part(len(log.rows))))


def lost_ends(log: Log) -> Log:
    """The last row of every second episode is missing, and its flag with it."""
    _, from_behind = np.unique(log.episode[::-1], return_index=True)
    last = np.sort(len(log.rows) - 1 - from_behind)
    return take(log, np.delete(np.arange(len(log.rows)), last[1::2]))


def repeated(index: Callable[[int], NDArray[Any]]) -> Change:
    return lambda log: take(log, index(len(log.rows)))


def twice(n: int) -> NDArray[Any]:
    return np.repeat(np.arange(n), 2)


def block_twice(n: int) -> NDArray[Any]:
    """A hundred rows written again, as by a job that went on from an earlier checkpoint."""
    return np.concatenate([np.arange(n // 2), np.arange(n // 2 - 100, n)])


def whole_twice(n: int) -> NDArray[Any]:
    return np.tile(np.arange(n), 2)


def next_of(shift: int) -> Change:
    """Next observations that are taken from ``shift`` rows on."""

    def change(log: Log) -> Log:
        return put(log, next_observations=np.roll(log.arrays["observations"], -shift, axis=0))

    return change


def costs_late(log: Log) -> Log:
    """The cost of a step stands in the row of the next step, as Minari's infos are stored."""
    return put(log, costs=late(log.arrays["costs"]))


def costs_so_far(log: Log) -> Log:
    """Each cost is the sum of the episode up to it."""
    costs, starts = log.arrays["costs"], np.flatnonzero(np.diff(log.episode, prepend=-1))
    before = np.cumsum(costs) - costs
    total = np.cumsum(costs) - np.repeat(before[starts], np.diff(np.append(starts, len(costs))))
    return put(log, costs=total.astype(np.float32))


def no_timeouts_no_horizon(log: Log) -> Log:
    """Neither flag nor number says where the time limit was."""
    metadata = {k: v for k, v in log.metadata.items() if k != "horizon"}
    arrays = {key: array for key, array in log.arrays.items() if key != "timeouts"}
    return dataclasses.replace(log, arrays=arrays, metadata=metadata, horizon=None)
