"""Actions as they are learnt from: [-1, 1] or one-hot rows, whatever units a file has.

What the metadata say outranks how numbers are stored: whole numbers between stated bounds are
continuous, and numbers below a stated action_count are discrete, floats or not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.data.content import MAX_DATASET_BYTES, chunks
from safe_offrl.env.action_bounds import placeholder
from safe_offrl.errors import DataError

MOST_ACTIONS = 10_000  # a wrong number of discrete actions must not ask for all memory
BOUNDS = ("action_low", "action_high")


def unit_actions(
    actions: NDArray[Any], metadata: dict[str, Any], remarks: list[str]
) -> tuple[NDArray[Any], float]:
    """Actions of a file, [N], (N, 1) or [N, A], as rows in [-1, 1] or one-hot rows [N, n].

    ``metadata`` afterwards say how the result is to be read, and ``remarks`` what had to be
    guessed. Second, what rescaling adds to the logarithm of an action's density:
    ``sum log((high - low) / 2)``. Raises DataError for what contradicts itself.
    """
    # What the metadata say.
    bounded = [key for key in BOUNDS if key in metadata]
    counted = [key for key in ("action_count", "action_start") if metadata.get(key) is not None]
    if bounded and counted:
        raise DataError(
            f"The metadata have {counted[0]}, of discrete actions, and {bounded[0]}, of continuous "
            "ones. Leave one of them out."
        )
    if bounded:
        return _rescaled(actions[:, None] if _is_vector(actions) else actions, metadata)
    # Numbers of discrete actions.
    if _is_single(actions) and (counted or actions.dtype.kind in "iub") and len(actions):
        numbers = _numbers(actions, counted)
        if "action_start" not in metadata and len(numbers) and int(numbers.min()) > 0:
            remarks.append(
                "no action has the number 0, from which they are numbered unless the metadata's "
                "action_start says otherwise."
            )
        one_hot = _one_hot(numbers, metadata)
        if not counted:
            remarks.append(
                f"actions are whole numbers: taken for {one_hot.shape[1]} discrete actions. State "
                "action_count, or action_low and action_high, in the metadata."
            )
        return one_hot, 0.0
    # Rows of numbers whose kind is not stated.
    if not counted and actions.ndim == 2 and actions.dtype.kind == "f" and len(actions):
        _judge_whole_floats(actions, remarks)
    if not counted and actions.ndim == 2 and actions.dtype.kind in "iub" and len(actions):
        _judge_whole_rows(actions[:], metadata, remarks)
    return actions, 0.0


def _is_vector(actions: NDArray[Any]) -> bool:
    return actions.ndim == 1


def _is_single(actions: NDArray[Any]) -> bool:
    return actions.ndim == 1 or (actions.ndim == 2 and actions.shape[1] == 1)


def _numbers(actions: NDArray[Any], counted: list[str]) -> NDArray[np.int64]:
    """Numbers of discrete actions [N]; DataError for floats that are none."""
    values = np.asarray(actions[:]).reshape(-1)
    if values.dtype.kind in "iub":
        return values.astype(np.int64)
    # float16 has no 2^53, so float64 is compared; a NaN is not below it.
    exact = values.dtype.kind == "f" and bool((np.abs(values.astype(np.float64)) < 2.0**53).all())
    if not exact or (values != np.floor(values)).any():
        raise DataError(
            f"The metadata have {counted[0]}, so actions are the numbers of discrete ones, but "
            "some are no whole numbers. Correct them, or state action_low and action_high instead."
        )
    return values.astype(np.int64)


def _one_hot(numbers: NDArray[np.int64], metadata: dict[str, Any]) -> NDArray[np.float32]:
    """Rows [N, n] of the numbers of discrete actions [N], counted from the metadata's action_start.

    n is the metadata's action_count; without it the largest number says, if the least is 0.
    """
    # Count and first number, stated or found.
    low, high = int(numbers.min()), int(numbers.max())
    found = f"The dataset's actions are the integers {low} to {high}"
    start, count = metadata.pop("action_start", None), metadata.get("action_count")
    if start is None and count is None and low != 0:
        raise DataError(
            f"{found}, so that it is not clear where they are numbered from. State action_count in "
            "the metadata, and action_start if it is not 0; or store continuous actions as floats, "
            "or state their bounds as action_low and action_high."
        )
    start = 0 if start is None else start
    count = high - start + 1 if count is None and isinstance(start, int) else count
    if not isinstance(start, int) or not isinstance(count, int) or isinstance(count, bool):
        raise DataError("The metadata's action_count and action_start must be whole numbers.")
    # Refusal of numbers out of range.
    if low < start or high >= start + count:
        raise DataError(
            f"{found}, but the metadata's action_count is {count} and action_start {start}. Store "
            "action_start to action_start + action_count - 1, or correct these."
        )
    if count > MOST_ACTIONS or 4 * count * len(numbers) > MAX_DATASET_BYTES:
        raise DataError(
            f"The dataset has {count:,} discrete actions, but one-hot rows are kept of at most "
            f"{MOST_ACTIONS:,}, and of fewer in a large file. Check the actions and action_count."
        )
    # One-hot rows.
    metadata["action_count"] = count
    rows = np.zeros((len(numbers), count), np.float32)
    rows[np.arange(len(numbers)), numbers - start] = 1.0
    return rows


def _judge_whole_rows(actions: NDArray[Any], metadata: dict[str, Any], remarks: list[str]) -> None:
    """Whole numbers of several columns without a word on them: one-hot rows, or continuous."""
    actions = actions.astype(np.int64)
    flags = ((actions == 0) | (actions == 1)).all()
    if flags and (actions.sum(axis=1) == 1).all() and actions.shape[1] > 1:
        metadata["action_count"] = actions.shape[1]
        remarks.append(
            f"actions are one-hot rows of whole numbers: taken for {actions.shape[1]} discrete "
            "actions. State action_count, or action_low and action_high, in the metadata."
        )
    else:
        remarks.append(
            "actions are whole numbers without stated bounds: taken for continuous ones in "
            "[-1, 1]. State action_low and action_high in the metadata."
        )


def _judge_whole_floats(actions: NDArray[Any], remarks: list[str]) -> None:
    """Floats that are all 0 or 1 may be numbers of discrete actions, or one-hot rows."""
    if all(np.isin(actions[part], (0, 1)).all() for part in chunks(len(actions))):
        if not actions[:].any():  # the agent never acted
            return
        remarks.append(
            "actions are all 0 or 1, taken for continuous ones in [-1, 1]: if they are discrete, "
            "state action_count in the metadata."
        )


def _rescaled(actions: NDArray[Any], metadata: dict[str, Any]) -> tuple[NDArray[Any], float]:
    """Actions in [-1, 1] if the metadata's action_low and action_high say otherwise."""
    # Bounds.
    given = [key for key in BOUNDS if key in metadata]
    if actions.ndim != 2:
        return actions, 0.0
    if len(given) == 1:
        raise DataError(
            f"The metadata have {given[0]} alone, and actions are rescaled from both bounds. "
            "Store action_low and action_high, or leave both out."
        )
    low = high = np.zeros(0)
    try:
        low, high = (
            np.broadcast_to(np.asarray(metadata[k], np.float64), actions.shape[1:]) for k in BOUNDS
        )
        with np.errstate(over="ignore", invalid="ignore"):
            usable = bool(np.isfinite(high - low).all() and (low < high).all())
    except (TypeError, ValueError):
        usable = False
    if not usable:
        raise DataError(
            "The metadata's action_low and action_high are no bounds of the actions of "
            f"{actions.shape[1]} numbers. Give finite numbers, or leave both out."
        )
    if wrong := placeholder(low, high):
        raise DataError(
            f"The metadata's action_low and action_high are {wrong}. Store the bounds that are "
            "meant, or leave both out if the actions are in [-1, 1]."
        )
    # Rescaling.
    if (low == -1.0).all() and (high == 1.0).all():
        return actions, 0.0
    metadata |= {"action_low": -1.0, "action_high": 1.0}
    with np.errstate(over="ignore", invalid="ignore"):  # refused later, with all that is not finite
        scaled = 2.0 * (actions[:].astype(np.float64) - low) / (high - low) - 1.0
        rescaled = scaled.astype(np.float32)
    return rescaled, float(np.log((high - low) / 2.0).sum())
