"""What happens to logs on their way to us: small pure functions from a log to a wrong one.

A change returns None where it cannot be made. Rows are moved with :func:`take`, so that it stays
known what each row was.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_offrl.safety import SafetySpec
from tests.clean_logs import Log

RULE = ("accident", "cost_threshold")  # keys of the metadata

Change = Callable[[Log], Log | None]


class Corruption(NamedTuple):
    """A change of logs, and the words of which a sentence that names the fault has one.

    ``kind`` is that of the fault: 1 ends of episodes and order of rows, 2 names and how a file is
    written, 3 metadata, 10 actions; 0 values. ``remark``: why the load may go on with a remark
    although it counts otherwise ("": it may not). ``readable``: no fault but a way of writing, so
    that it must be read as it was meant. ``alone``: it is one of several spellings of the same, of
    which one is enough in pairs.
    """

    change: Change
    kind: int
    words: str
    remark: str = ""
    readable: bool = False
    alone: bool = False


def put(log: Log, **arrays: Any) -> Log:
    """With these arrays in place of their own."""
    return dataclasses.replace(log, arrays=log.arrays | arrays)


def take(log: Log, index: NDArray[Any]) -> Log:
    """The rows ``index`` in this order."""
    return dataclasses.replace(
        log,
        arrays={key: array[index] for key, array in log.arrays.items()},
        rows=log.rows[index],
        episode=log.episode[index],
    )


def ends_of(log: Log) -> NDArray[np.bool_]:
    return log.arrays["terminals"] | log.arrays["timeouts"]


# --- 1: flags of the ends of episodes ---


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


def every_second(values: NDArray[Any]) -> NDArray[Any]:
    """Without every second end."""
    found = values.copy()
    found[np.flatnonzero(values)[::2]] = False
    return found


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


# --- 1: rows, and what they say of each other ---


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
    return take(log, np.delete(np.arange(len(log.rows)), np.flatnonzero(ends_of(log))[1::2]))


def repeated(index: Callable[[int], NDArray[Any]]) -> Change:
    return lambda log: take(log, index(len(log.rows)))


def twice(n: int) -> NDArray[Any]:
    return np.repeat(np.arange(n), 2)


def block_twice(n: int) -> NDArray[Any]:
    """A hundred rows written again, as by a job that went on from an earlier checkpoint."""
    return np.concatenate([np.arange(n // 2), np.arange(n // 2 - 100, n)])


def whole_twice(n: int) -> NDArray[Any]:
    return np.tile(np.arange(n), 2)


# --- 2: names and text ---


def renamed(old: str, new: str) -> Change:
    def change(log: Log) -> Log | None:
        if old not in log.arrays or new in log.arrays:
            return None
        arrays = {new if key == old else key: value for key, value in log.arrays.items()}
        return dataclasses.replace(log, arrays=arrays)

    return change


def dropped(name: str) -> Change:
    def change(log: Log) -> Log | None:
        arrays = {key: value for key, value in log.arrays.items() if key != name}
        return dataclasses.replace(log, arrays=arrays) if name in log.arrays else None

    return change


def done_beside_terminals(log: Log) -> Log | None:
    """Time limits are in `dones` alone, beside terminals."""
    if not {"terminals", "timeouts"} <= log.arrays.keys():
        return None
    found = dropped("timeouts")(log)
    return found and put(found, dones=ends_of(log))


def verdicts_as(name: str) -> Change:
    """Verdicts under another name, in a log that does not say which rule is theirs."""

    def change(log: Log) -> Log | None:
        found = renamed("accidents", name)(log)
        metadata = {k: v for k, v in log.metadata.items() if k not in RULE}
        return found and dataclasses.replace(found, metadata=metadata, spec=SafetySpec())

    return change


def longer(name: str, rows: int) -> Change:
    """One array of another number of rows than the others."""

    def change(log: Log) -> Log | None:
        if name not in log.arrays:
            return None
        values = log.arrays[name]
        found = values[:rows] if rows < 0 else np.concatenate([values, values[:rows]])
        return put(log, **{name: found})

    return change


def written(**style: str) -> Change:
    """A table in another dialect."""
    return lambda log: dataclasses.replace(log, style=log.style | style)


def typed(name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Change:
    return lambda log: put(log, **{name: change(log.arrays[name])}) if name in log.arrays else None


# --- 3: metadata ---


def said(**metadata: Any) -> Change:
    """Metadata that say something else."""
    return lambda log: dataclasses.replace(log, metadata=log.metadata | metadata)


def horizons(factor: float, *, where: str) -> Change:
    """Another horizon in the file, as the environment's ("load") or as the setting ("spec")."""

    def change(log: Log) -> Log:
        horizon = int(log.metadata["horizon"] * factor)
        if where == "file":
            return dataclasses.replace(log, metadata=log.metadata | {"horizon": horizon})
        if where == "file alone":
            metadata = log.metadata | {"horizon": horizon}
            return dataclasses.replace(log, metadata=metadata, horizon=None)
        if where == "load":
            return dataclasses.replace(log, horizon=horizon)
        spec = dataclasses.replace(log.spec, horizon=horizon)
        return dataclasses.replace(log, spec=spec, horizon=None)

    return change


def horizon_as(form: Callable[[int], Any]) -> Change:
    """The right horizon in another type, said by the file alone."""

    def change(log: Log) -> Log:
        metadata = log.metadata | {"horizon": form(log.metadata["horizon"])}
        return dataclasses.replace(log, metadata=metadata, horizon=None)

    return change


def horizon_under(name: str) -> Change:
    def change(log: Log) -> Log:
        metadata = {k: v for k, v in log.metadata.items() if k != "horizon"}
        metadata[name] = log.metadata["horizon"]
        return dataclasses.replace(log, metadata=metadata, horizon=None)

    return change


def read_under(rule: str) -> Change:
    """The settings ask for another rule than the one whose verdicts the log holds."""

    def change(log: Log) -> Log | None:
        if "accidents" not in log.arrays:
            return None
        return dataclasses.replace(log, spec=SafetySpec(accident=rule))

    return change


def without_timeouts(change: Change) -> Change:
    return lambda log: (found := change(log)) and dropped("timeouts")(found)


def logged_rule(rule: str, threshold: float) -> Change:
    """The log holds verdicts of a rule (which found every second accident) beside its costs."""

    def change(log: Log) -> Log | None:
        if "accidents" in log.arrays or "costs" not in log.arrays:
            return None
        found = put(log, accidents=every_second(log.arrays["costs"] > 0))
        return said(accident=rule, cost_threshold=threshold)(found)

    return change


# --- 10: actions ---


def discrete(change: Callable[[Log], Log | None]) -> Change:
    return lambda log: change(log) if "action_count" in log.metadata else None


def continuous(change: Callable[[Log], Log | None]) -> Change:
    return lambda log: change(log) if "action_count" not in log.metadata else None


def without_count(log: Log) -> Log:
    metadata = {k: v for k, v in log.metadata.items() if k != "action_count"}
    return dataclasses.replace(log, metadata=metadata)


def one_hot(log: Log, kind: type) -> Log:
    return put(log, actions=np.eye(log.metadata["action_count"], dtype=kind)[log.arrays["actions"]])


def steps_of_ten(log: Log, **metadata: Any) -> Log | None:
    """Whole-number actions 0 to 10 in place of -1 to 1: a fifth of a unit each."""
    whole = np.round(5 + 5 * log.arrays["actions"]).astype(np.int64)
    if not np.allclose(whole / 5 - 1, log.arrays["actions"], atol=1e-6):
        return None
    return dataclasses.replace(put(log, actions=whole), metadata=log.metadata | metadata)


def chain(*changes: Change) -> Change:
    """One change after another; None if one of them cannot be made."""

    def change(log: Log) -> Log | None:
        return functools.reduce(lambda found, c: found and c(found), changes, log)

    return change
