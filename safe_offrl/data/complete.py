"""From what a foreign file holds to the DSRL layout that everything else expects.

Nothing is dropped: an episode keeps its last row, and with it an accident there, even where the
file does not say what was observed after it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.action_bounds import placeholder
from safe_offrl.data.content import MAX_BYTES, REQUIRED, TABLES, Arrays, Metadata, Raw
from safe_offrl.errors import DataError

MOST_ACTIONS = 10_000  # that are discrete: a wrong number must not ask for all memory


def complete(arrays: Arrays, metadata: Metadata, horizon: int | None = None) -> Raw:
    """Fill in what a format leaves out; what is in the layout already stays as it is.

    Scalars (N, 1) become [N]; integer actions one-hot rows [N, n]; actions with stated bounds are
    rescaled to [-1, 1]; missing costs become 0 (and ``no_costs`` is noted). Without timeouts an
    episode ends after ``horizon`` steps, else the metadata's; ``dones`` of the horizon's last step
    are timeouts, the others terminations. Missing next observations are the following row's within
    an episode; after its last row the observation itself stands in, which only a truncated episode
    ever uses. Raises DataError where the horizon is needed and unknown.
    """
    found = {k: _scalars(v) if k not in TABLES else v for k, v in arrays.items()}
    noted = dict(metadata)
    end = "dones" if "dones" in found else "terminals"
    for name in ("observations", "actions", "rewards", end):
        if name not in found:
            raise DataError(
                f'The dataset has no array "{name}". Write it in the DSRL layout: '
                f"{', '.join(REQUIRED)}."
            )
    _check_rows(found)
    actions, log_volume = _rescaled(_one_hot(found["actions"], noted), noted)
    found["actions"] = actions
    if log_volume and "behaviour_log_probs" in found:
        found["behaviour_log_probs"] = found["behaviour_log_probs"][:] + log_volume
    horizon = horizon if horizon is not None else noted.get("horizon")
    if "dones" in found:
        dones = found.pop("dones").astype(bool)
        found["timeouts"] = dones & at_horizon(dones, horizon)
        found["terminals"] = dones & ~found["timeouts"]
    if "timeouts" not in found:
        terminals = found["terminals"].astype(bool)
        found["timeouts"] = at_horizon(terminals, horizon) & ~terminals
    if "next_observations" not in found:
        _shift(found, noted)
    if "costs" not in found:
        found["costs"] = np.zeros(len(found["rewards"]), np.float32)
        noted["no_costs"] = True
    return found, noted


def _check_rows(arrays: Arrays) -> None:
    """Raise DataError unless every array has a row for each transition."""
    rows = arrays["observations"].shape[:1]
    for name, array in arrays.items():
        if not array.shape:
            raise DataError(
                f'The array "{name}" is a single number. Store one row per transition in it.'
            )
        if array.shape[:1] != rows and rows and name != "episode_behaviours":
            raise DataError(
                f'The array "{name}" has {len(array)} rows, but "observations" has {rows[0]}. '
                "Store one row per transition in every array."
            )


def _scalars(array: NDArray[Any]) -> NDArray[Any]:
    """[N] from (N, 1)."""
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def _one_hot(actions: NDArray[Any], metadata: dict[str, Any]) -> NDArray[Any]:
    """Rows [N, n] of integer actions [N] or (N, 1); others unchanged.

    n is the metadata's action_count, else the largest action + 1.
    """
    if actions.dtype.kind not in "iu" or not len(actions) or _scalars(actions).ndim != 1:
        return actions
    index = _scalars(actions)[:]
    found = f"The dataset's actions are the integers {index.min()} to {index.max()}"
    if index.min() < 0 and "action_count" not in metadata:
        raise DataError(
            f"{found}, but discrete actions are numbered from 0. Number them so, or store "
            "continuous actions as floats."
        )
    count = metadata.setdefault("action_count", int(index.max()) + 1)
    if not isinstance(count, int) or index.min() < 0 or index.max() >= count:
        raise DataError(
            f"{found}, but the metadata's action_count is {count}. Store 0 to action_count - 1."
        )
    if count > MOST_ACTIONS or 4 * count * len(index) > MAX_BYTES:
        raise DataError(
            f"The dataset has {count:,} discrete actions, but one-hot rows are kept of at most "
            f"{MOST_ACTIONS:,}, and of fewer in a large file. Check the actions and action_count."
        )
    rows = np.zeros((len(index), count), np.float32)
    rows[np.arange(len(index)), index] = 1.0
    return rows


def _rescaled(actions: NDArray[Any], metadata: dict[str, Any]) -> tuple[NDArray[Any], float]:
    """Actions in [-1, 1] if the metadata's action_low and action_high say otherwise.

    Second, what that adds to the logarithm of their densities: ``sum log((high - low) / 2)``.
    """
    given = {"action_low", "action_high"} & metadata.keys()
    if actions.ndim != 2 or not given:
        return actions, 0.0
    if len(given) == 1:
        raise DataError(
            f"The metadata have {given.pop()} alone, and actions are rescaled from both bounds. "
            "Store action_low and action_high, or leave both out."
        )
    low = high = np.zeros(0)
    try:
        low, high = (
            np.broadcast_to(np.asarray(metadata[k], np.float64), actions.shape[1:])
            for k in ("action_low", "action_high")
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
    if (low == -1.0).all() and (high == 1.0).all():
        return actions, 0.0
    metadata |= {"action_low": -1.0, "action_high": 1.0}
    with np.errstate(over="ignore", invalid="ignore"):  # refused later, with all that is not finite
        scaled = 2.0 * (actions[:].astype(np.float64) - low) / (high - low) - 1.0
        rescaled = scaled.astype(np.float32)
    return rescaled, float(np.log((high - low) / 2.0).sum())


def at_horizon(ends: NDArray[np.bool_], horizon: Any) -> NDArray[np.bool_]:
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


def _shift(arrays: dict[str, NDArray[Any]], metadata: dict[str, Any]) -> None:
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
