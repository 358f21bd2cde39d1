"""From what a foreign file holds to the DSRL layout that everything else expects.

Nothing is dropped: an episode keeps its last row, and with it an accident there, even where the
file does not say what was observed after it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.data.content import Arrays, Metadata
from safe_offrl.data.offsets import centred
from safe_offrl.data_formats.actions import unit_actions
from safe_offrl.data_formats.breaks import unmarked_breaks
from safe_offrl.data_formats.continuity import doubts, idle_starts, overshot
from safe_offrl.data_formats.flags import Ends, settled_ends
from safe_offrl.data_formats.motion import FEWEST, Motion, copies_of_episodes, measure_motion
from safe_offrl.data_formats.names import ENDS, METADATA_KEYS, near_name
from safe_offrl.data_formats.stored import HISTORY, REQUIRED, TABLES, Raw
from safe_offrl.data_formats.validation import check_flags, wrong_shape
from safe_offrl.errors import DataError

AS_MARKED = "as marked"  # the metadata's "ends" say so of a log whose ends are believed


def complete(
    arrays: Arrays,
    metadata: Metadata,
    remarks: tuple[str, ...] = (),
    unsure: str = "",
    *,
    horizon: int | None = None,
) -> Raw:
    """Fill in what a format leaves out, and hold its ends of episodes against its observations.

    Scalars (N, 1) become [N]; actions [-1, 1] or one-hot rows (:func:`unit_actions`); missing costs
    become 0 (and ``no_costs`` is noted). Ends are settled by :func:`settled_ends`, with
    ``horizon``, else the metadata's, where flags do not say. Missing next observations are the
    following row's within an episode; after its last row the observation itself stands in, which
    only a truncated episode ever uses. Observations that float32 cannot hold have an offset
    subtracted and noted. What is in the layout already stays as it is. Raises
    DataError where the horizon is needed and unknown, and where the ends contradict the
    observations beyond what chance may do.
    """
    # What the file says.
    found = {k: _squeezed(v) if k not in TABLES else v for k, v in arrays.items()}
    noted = dict(metadata)
    earlier, doubted = taken_history(noted)
    said = [*earlier, *remarks, *_unread_words(noted)]
    unsure = doubted or unsure
    # Checks that everything below relies on.
    _require_arrays(found)
    _check_rows(found)
    noted |= _whole_horizon(noted)
    # Units of observations and actions.
    found, noted = centred(found, noted)
    found["actions"], log_volume = unit_actions(found["actions"], noted, said)
    if log_volume and "behaviour_log_probs" in found:
        found["behaviour_log_probs"] = found["behaviour_log_probs"][:] + log_volume
    # Ends of episodes.
    horizon = horizon if horizon is not None else noted.get("horizon")
    unsure = _settle_ends(found, noted, said, horizon) or unsure
    # What is not in the file.
    if "next_observations" not in found:
        _fill_next_observations(found, noted)
    if "costs" not in found:
        found["costs"] = np.zeros(len(found["rewards"]), np.float32)
        noted["no_costs"] = True
    return Raw(found, noted, tuple(dict.fromkeys(said)), unsure)


def taken_history(metadata: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    """What was said of a file's source, and was unsure, when it was converted.

    Taken out of the metadata, where they stand beside what the file says of itself.
    """
    remarks, unsure = (metadata.pop(key, None) for key in HISTORY)
    found = tuple(str(text) for text in remarks) if isinstance(remarks, list) else ()
    return found, unsure if isinstance(unsure, str) else ""


def _require_arrays(arrays: Arrays) -> None:
    """Raise DataError if an array is missing that nothing can stand for."""
    ends = "dones" if "dones" in arrays else "terminals"
    missing = [n for n in ("observations", "actions", "rewards", ends) if n not in arrays]
    if missing:
        raise DataError(
            f'The dataset has no array "{missing[0]}". Write it in the DSRL layout: '
            f"{', '.join(REQUIRED)}."
        )


def _check_rows(arrays: Arrays) -> None:
    """Raise DataError unless every array has a row for each transition, of one or no dimension."""
    rows = arrays["observations"].shape[:1]
    for name, array in arrays.items():
        if not array.shape:
            raise DataError(
                f'The array "{name}" is a single number. Store one row per transition in it.'
            )
        if array.ndim > (2 if name in TABLES else 1):
            raise wrong_shape(name, array)
        if array.shape[:1] != rows and rows and name != "episode_behaviours":
            raise DataError(
                f'The array "{name}" has {len(array)} rows, but "observations" has {rows[0]}. '
                "Store one row per transition in every array."
            )


def _squeezed(array: NDArray[Any]) -> NDArray[Any]:
    """[N] from (N, 1)."""
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def _unread_words(metadata: Metadata) -> list[str]:
    """Keys of the metadata that were probably meant as one that is read."""
    missing = [key for key in METADATA_KEYS if key not in metadata]
    unread = [key for key in metadata if key not in METADATA_KEYS]
    found = [(near_name(key, unread), key) for key in missing]
    return [
        f'the metadata\'s "{near}" is not read: did you mean "{key}"?'
        for near, key in found
        if near
    ]


def _whole_horizon(metadata: Metadata) -> dict[str, int]:
    """The metadata's horizon as a whole number, if there is one; 40.0 is 40."""
    horizon = metadata.get("horizon")
    if horizon is None:
        return {}
    if isinstance(horizon, float) and horizon.is_integer():
        horizon = int(horizon)
    if not isinstance(horizon, int) or isinstance(horizon, bool) or horizon < 1:
        raise DataError(
            f"The metadata's horizon is {horizon!r}, but a number of steps is needed. Store the "
            "time limit of the environment as a whole number."
        )
    return {"horizon": horizon}


def _settle_ends(
    arrays: dict[str, NDArray[Any]], metadata: Metadata, remarks: list[str], horizon: int | None
) -> str:
    """Set terminals and timeouts, and the next observations of timeouts that are not known.

    Returns why it is not known which episodes terminated, "" if it is.
    """
    # Marks and motion.
    believed = metadata.get("ends")
    if believed not in (None, AS_MARKED):
        raise DataError(
            f'The metadata\'s "ends" is {believed!r}, but only "{AS_MARKED}" means something there.'
        )
    motion = None if believed else measure_motion(arrays)
    flags = {key: np.asarray(arrays[key][:]) for key in ENDS if key in arrays}
    for key, array in flags.items():
        check_flags(key, array)
    marked = np.logical_or.reduce([array.astype(bool) for array in flags.values()])
    # Breaks that no mark explains.
    breaks = unmarked_breaks(arrays, motion, marked)
    if not marked.any() and ("timeouts" in flags or "terminals" not in flags):
        breaks = None  # nothing is marked, which is refused later
    # Ends.
    ends = settled_ends(flags, None if breaks is None else breaks.ends, horizon)
    if breaks is not None and breaks.odd.any():
        remarks.append(
            f"next_observations of {int(breaks.odd.sum()):,} rows (the first is row "
            f"{int(breaks.odd.argmax())}) are far from the following row's observation, to which "
            "the log goes on."
        )
    if breaks is not None and breaks.gaps.any():
        remarks.append(
            f"{int(breaks.gaps.sum()):,} rows within episodes (the first is row "
            f"{int(breaks.gaps.argmax())}) lead near the row that follows, but not to it: rows are "
            "missing or repeated, so that lengths, times and sums are not those of the episodes."
        )
    # Arrays that depend on them.
    if "episode_behaviours" in arrays:
        arrays["episode_behaviours"] = _piece_behaviours(arrays["episode_behaviours"], flags, ends)
    settled = {"terminals": ends.terminals, "timeouts": ends.timeouts}
    arrays |= {
        key: new
        for key, new in settled.items()
        if key not in flags or (flags[key].astype(bool) != new).any()
    }
    arrays.pop("dones", None)
    # Doubts.
    remarks += ends.remarks
    if believed:
        remarks.append('ends of episodes are taken as marked: the metadata\'s "ends" says so.')
    elif motion is not None:
        _judge_ends(arrays, motion, ends, breaks is not None, remarks)
    if len(ends.terminals) and not (ends.terminals[-1] or ends.timeouts[-1]):
        remarks.append("the last episode has no end: it is taken to be cut there.")
    _remark_on_lengths(arrays, motion, ends, horizon, remarks)
    return "" if believed else ends.unsure


def _piece_behaviours(index: NDArray[Any], flags: Arrays, ends: Ends) -> NDArray[Any]:
    """Who logged each episode, where some were cut into pieces: each piece its episode's."""
    before = np.logical_or.reduce([array.astype(bool) for array in flags.values()])
    starts = np.append(0, np.flatnonzero((ends.terminals | ends.timeouts)[:-1]) + 1)
    episode = np.append(0, np.cumsum(before[:-1]))  # of each row, as it was marked
    if index.ndim != 1 or len(index) != episode[-1:].sum() + 1 or len(starts) == len(index):
        return index  # nothing was cut; or it never fitted, which is refused later
    return np.asarray(index[:][episode[starts]])


def _judge_ends(
    arrays: dict[str, NDArray[Any]], motion: Motion, ends: Ends, known: bool, remarks: list[str]
) -> None:
    """Refuse ends that the observations contradict; remark on what chance may have done."""
    for doubt in doubts(arrays, motion, ends.terminals, ends.timeouts, known=known):
        if doubt.certain:
            guessed = " ".join(text for text in remarks if "taken to end" in text)
            raise DataError(
                f"{doubt.sentence}. {guessed}{' ' if guessed else ''}Mark the last step of each "
                "episode and no other. If the marks are right all the same, store the metadata's "
                f'"ends" as "{AS_MARKED}".'
            )
        remarks.append(f"{doubt.sentence}.")
    if idle := idle_starts(motion, ends.terminals | ends.timeouts):
        remarks.append(idle)
    if known:
        across = overshot(motion, ends.terminals, ends.timeouts)
        if across.any():
            following = np.array(arrays["next_observations"][:])
            following[across] = arrays["observations"][:][across]
            arrays["next_observations"] = following
            remarks.append(
                f"next_observations of {int(across.sum()):,} timeouts are those of the next "
                "episode's start: unknown, so their own observations stand in."
            )
    elif motion.link is not None and (~(ends.terminals | ends.timeouts)).sum() > FEWEST:
        remarks.append(
            "next_observations are not the following rows' observations, so the ends of episodes "
            "are judged by jumps alone."
        )


def _remark_on_lengths(
    arrays: Arrays, motion: Motion | None, ends: Ends, horizon: int | None, remarks: list[str]
) -> None:
    """What the episodes' lengths say against the horizon, and which episodes are there twice."""
    stops = np.flatnonzero(ends.terminals | ends.timeouts) + 1
    if not len(stops):
        return
    starts = np.concatenate([[0], stops])
    longest = int(np.diff(starts).max())
    cut = int(ends.timeouts[stops[np.diff(starts) == longest] - 1].sum())
    if isinstance(horizon, int) and longest < horizon and cut >= 3 and longest > 1:
        remarks.append(
            f"timeouts cut {cut:,} episodes after {longest} steps and none is longer, but the "
            f"horizon is {horizon}: what happens later is not in the log."
        )
    if motion is None or motion.repeats:
        return
    copies = copies_of_episodes(arrays, starts)
    copied = (
        f"{copies.episodes:,} of {len(stops):,} episodes are copies of others, number by number"
    )
    if copies.in_a_row > 0.1 * len(stops):
        raise DataError(
            f"{copied}, in the same order: the same rows are there twice, and no interval would "
            "hold. Leave the copies out."
        )
    if copies.episodes > 0.02 * len(stops):
        remarks.append(
            f"{copied}: if these are not visits of their own, they count twice and tell nothing."
        )


def _fill_next_observations(arrays: dict[str, NDArray[Any]], metadata: dict[str, Any]) -> None:
    """Set next_observations from the rows that follow, never across the end of an episode."""
    ends = arrays["terminals"].astype(bool) | arrays["timeouts"].astype(bool)
    ends[-1:] = True
    following = np.concatenate([arrays["observations"][1:], arrays["observations"][-1:]])
    following[ends] = arrays["observations"][ends]
    arrays["next_observations"] = following
    if truncated := int((ends & ~arrays["terminals"].astype(bool)).sum()):
        metadata.setdefault("warning", stand_in_warning(truncated))


def stand_in_warning(episodes: int) -> str:
    """What the metadata say where a truncated episode's final observation is unknown."""
    return (
        f"the observation after the last step of {episodes} truncated episodes is not known; "
        "the one before that step stands in for it."
    )
