"""What happens to logs on their way to us: small pure functions from a log to a wrong one.

A change returns None where it cannot be made. Rows are moved with :func:`take`, so that it stays
known what each row was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_offrl.spec import SafetySpec
from tests.data_formats.clean_logs import Log

RULE = ("accident", "cost_threshold")  # keys of the metadata

Change = Callable[[Log], Log | None]


class Corruption(NamedTuple):
    """A change of logs, and the words of which a sentence that names the fault has one.

    ``kind`` is that of the fault: 1 ends of episodes and order of rows, 2 names and how a file is
    written, 3 metadata, 10 actions; 0 values. ``remark``: why the load may go on with a remark
    although it counts otherwise ("": it may not). ``readable``: no fault but a way of writing, so
    that it must be read as it was meant.
    """

    change: Change
    kind: int
    words: str
    remark: str = ""
    readable: bool = False


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


def every_second(values: NDArray[Any]) -> NDArray[Any]:
    """Without every second end."""
    found = values.copy()
    found[np.flatnonzero(values)[::2]] = False
    return found


def chain(*changes: Change) -> Change:
    """One change after another; None if one of them cannot be made."""

    def change(log: Log) -> Log | None:
        found: Log | None = log
        for each in changes:
            found = found and each(found)
        return found

    return change


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


def one_hot(log: Log, kind: type) -> Log | None:
    """Rows in place of the numbers 0 to action_count - 1."""
    index, count = log.arrays["actions"], log.metadata["action_count"]
    if index.dtype.kind != "i" or index.max() >= count:
        return None
    return put(log, actions=np.eye(count, dtype=kind)[index])


def steps_of_ten(log: Log, **metadata: Any) -> Log | None:
    """Whole-number actions 0 to 10 in place of -1 to 1: a fifth of a unit each."""
    whole = np.round(5 + 5 * log.arrays["actions"]).astype(np.int64)
    if not np.allclose(whole / 5 - 1, log.arrays["actions"], atol=1e-6):
        return None
    return dataclasses.replace(put(log, actions=whole), metadata=log.metadata | metadata)
