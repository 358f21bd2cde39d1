"""Where episodes end, by what a file says of it: terminals, timeouts, dones, or a known horizon."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from safe_offrl.data.content import Arrays, Flags
from safe_offrl.errors import DataError


class Ends(NamedTuple):
    """``terminals`` and ``timeouts`` [N], never both in a row, and a sentence for each guess.

    ``unsure``: why it is not known which episodes terminated; "" if it is.
    """

    terminals: Flags
    timeouts: Flags
    remarks: list[str]
    unsure: str


def settled_ends(given: Arrays, breaks: Flags | None, horizon: int | None) -> Ends:
    """The ends of episodes from the flags that a file has; each rule that was needed is named.

    ``given``: terminals, timeouts and dones [N] of 0 and 1, terminals or dones at least.
    ``breaks`` [N]: rows after which the log does not go on, known where next observations are, else
    None. ``dones`` that stand alone are timeouts on the horizon's last step and terminations
    elsewhere; beside one of the others they are both together. Without timeouts an episode ends
    where the log does not go on, and after ``horizon`` steps. Raises DataError where the horizon
    is needed and unknown, and where flags contradict each other.
    """
    # Dones.
    flags = {key: array.astype(bool) for key, array in given.items()}
    remarks: list[str] = []
    unsure = ""
    mixed = given.keys() == {"dones"}
    if "dones" in flags:
        _split_dones(flags, breaks, horizon, remarks)
    # Timeouts.
    terminals = flags["terminals"]
    if "timeouts" not in flags:
        flags["timeouts"] = _inferred(terminals, breaks, horizon, remarks) & ~terminals
    elif breaks is not None:
        cut = breaks & ~(terminals | flags["timeouts"])
        if cut.any():
            flags["timeouts"] = flags["timeouts"] | cut
            unsure = (
                f"{_many(cut, 'end')} of episodes {_verb(cut, 'is', 'are')} marked neither in "
                f"terminals nor in timeouts: row {int(cut.argmax())} does not lead to the row that "
                "follows"
            )
            remarks.append(f"{unsure}. Such an episode is taken to be cut there.")
    # Rows that are marked twice, or too late.
    terminals, timeouts = _without_both(terminals, flags["timeouts"], remarks)
    if late := _terminated_at_limit(terminals, timeouts, horizon, mixed):
        remarks.append(f"{late}.")
    return Ends(terminals, timeouts, remarks, unsure or late)


def at_horizon(ends: Flags, horizon: Any) -> Flags:
    """Rows that are the ``horizon``-th of their episode [N], an episode ending there or at an end.

    >>> at_horizon(np.array([0, 1, 0, 0, 0], bool), 2).tolist()
    [False, True, False, True, False]
    """
    if not isinstance(horizon, int) or isinstance(horizon, bool) or horizon < 1:
        raise DataError(
            "The dataset does not say which episodes were cut by a time limit. "
            "Set safety.horizon to the time limit of the environment."
        )
    stops = np.flatnonzero(ends) + 1
    starts = np.concatenate([[0], stops[stops < len(ends)]]).astype(np.int64)
    lengths = np.diff(np.append(starts, len(ends)))
    steps = np.arange(len(ends)) - np.repeat(starts, lengths)
    return np.asarray((steps + 1) % min(horizon, len(ends) + 1) == 0)


def _split_dones(
    flags: dict[str, Flags], breaks: Flags | None, horizon: int | None, remarks: list[str]
) -> None:
    """Terminals and timeouts from dones, which mix them; dones are taken out of ``flags``."""
    dones = flags.pop("dones")
    # Beside both: a contradiction at most.
    if "terminals" in flags and "timeouts" in flags:
        ends = flags["terminals"] | flags["timeouts"]
        if (dones != ends).any() and (dones != flags["terminals"]).any():
            row = int((dones != ends).argmax())
            raise DataError(
                f"dones contradict terminals and timeouts (first in row {row}). Leave out those "
                "that do not say where episodes end."
            )
    elif "terminals" in flags:
        # Beside one of them: the other one.
        if (flags["terminals"] & ~dones).any():
            row = int((flags["terminals"] & ~dones).argmax())
            raise DataError(
                f"The dataset's terminals and dones contradict each other in row {row}, which "
                "terminates and is not done. Leave out those that are wrong."
            )
        if (dones != flags["terminals"]).any():  # else they say nothing of timeouts
            flags["timeouts"] = dones & ~flags["terminals"]
            remarks.append("timeouts are taken from dones: what is done and does not terminate.")
    elif "timeouts" in flags:
        flags["terminals"] = dones & ~flags["timeouts"]
        remarks.append("terminals are taken from dones: what is done and is no timeout.")
    else:
        # Alone: the horizon tells.
        cut = at_horizon(dones if breaks is None else dones | breaks, horizon)
        flags["timeouts"] = dones & cut
        flags["terminals"] = dones & ~cut
        remarks.append(
            f"done on step {horizon} of an episode, the horizon's last, is taken for a time limit "
            f"({_many(flags['timeouts'], 'episode')}), on any other for a termination."
        )


def _inferred(
    terminals: Flags, breaks: Flags | None, horizon: int | None, remarks: list[str]
) -> Flags:
    """Timeouts that a file does not have."""
    ends = terminals if breaks is None else terminals | breaks
    if breaks is not None and (horizon is None or _longest(ends) <= horizon):
        cut = breaks & ~terminals
        remarks.append(
            "there are no timeouts: an episode is taken to end where a row does not lead to the "
            f"row that follows ({_many(cut, 'episode')})."
        )
        return cut
    cut = at_horizon(ends, horizon)
    if breaks is not None:
        cut = cut | (breaks & ~terminals)
    remarks.append(
        f"there are no timeouts: an episode is taken to end after {horizon} steps, the horizon "
        f"({_many(cut & ~terminals, 'episode')})."
    )
    return cut


def _without_both(terminals: Flags, timeouts: Flags, remarks: list[str]) -> tuple[Flags, Flags]:
    """Rows that are marked as both become one: a time limit if every episode of that length is."""
    both = terminals & timeouts
    if not both.any():
        return terminals, timeouts
    ends = terminals | timeouts
    stops = np.flatnonzero(ends) + 1
    lengths = np.diff(np.concatenate([[0], stops]))
    longest = lengths == lengths.max()
    at_limit = np.zeros(len(ends), bool)
    at_limit[stops[longest] - 1] = True
    limit = at_limit & both
    # Several episodes that all terminate on the very step of the limit are no coincidence.
    if longest.sum() >= 2 and (limit == at_limit).all():
        terminals = terminals & ~limit
        remarks.append(
            f"{_many(limit, 'row')} {_verb(limit, 'is', 'are')} marked both in terminals and in "
            f"timeouts, all of them on step {int(lengths.max())}, where every episode ends at "
            "the latest: taken for a time limit."
        )
    rest = terminals & timeouts
    # A step may terminate on the very last of the time limit, and Gymnasium then marks both.
    if (rest & ~at_limit).any():
        remarks.append(
            f"{_many(rest, 'row')} {_verb(rest, 'is', 'are')} marked both in terminals and in "
            "timeouts: taken for terminated."
        )
    return terminals, timeouts & ~terminals


def _terminated_at_limit(
    terminals: Flags, timeouts: Flags, horizon: int | None, mixed: bool
) -> str:
    """Why terminations may be a time limit's; "" if nothing says so.

    Every one of several episodes that are as long as any terminates, on the same step. Of dones,
    which are ``mixed``, the horizon has told what is a time limit, and may be another one.
    """
    stops = np.flatnonzero(terminals | timeouts)
    lengths = np.diff(np.concatenate([[-1], stops]))
    longest = int(lengths.max(initial=0))
    last = stops[lengths == longest]
    several = 2 if longest == horizon else 3 if mixed else 5
    least = 0 if mixed else horizon or 0
    if longest < 2 or len(last) < several or longest < least or timeouts[last].any():
        return ""
    return (
        f"terminals mark the end of all {len(last):,} episodes of {longest} steps, and none is "
        "longer: if that is a time limit, it belongs into timeouts"
    )


def _longest(ends: Flags) -> int:
    stops = np.append(np.flatnonzero(ends) + 1, len(ends))
    return int(np.diff(np.concatenate([[0], stops])).max())


def _many(rows: Flags, noun: str) -> str:
    n = int(rows.sum())
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _verb(rows: Flags, one: str, several: str) -> str:
    return one if int(rows.sum()) == 1 else several
