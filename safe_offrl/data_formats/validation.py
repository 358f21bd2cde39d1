"""Refuse a dataset that cannot be trained on, with one sentence that says why (numpy only)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from safe_offrl.data.content import chunks, signal_of, signals_in
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.stored import REQUIRED, TABLES
from safe_offrl.errors import DataError
from safe_offrl.limits import COST
from safe_offrl.spec import SafetySpec
from safe_offrl.types import signal_column

_OPTIONAL_ROWS = ("accidents", "behaviour_log_probs")  # one number for each transition
_FLAGS = ("terminals", "timeouts", "dones", "accidents")  # 0/1 per transition
# Actions are stored in float32, so a bound of exactly 1 may come back a rounding error larger.
ACTION_TOLERANCE = 1e-6
_LARGEST = float(np.finfo(np.float32).max)


def validate_arrays(arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Check the arrays of one dataset (DSRL names, plus the optional ones of one row each).

    Expects observations and next_observations [N, O], actions [N, A] in [-1, 1], the others [N].
    Raises DataError for a missing key, a shape, unequal lengths, an empty dataset, a dtype, NaN or
    infinity, a flag that is not 0/1, a signal below 0, an action outside the range, or no episode
    end.
    """
    # Shapes and values.
    for name in REQUIRED:
        if name not in arrays:
            raise DataError(
                f'The dataset has no array "{name}". Write it in the DSRL layout: '
                f"{', '.join(REQUIRED)}."
            )
    names = (*REQUIRED, *_OPTIONAL_ROWS, *map(signal_column, signals_in(arrays)))
    checked = {name: arrays[name] for name in names if name in arrays}
    _check_shapes(checked)
    for name, array in checked.items():
        _check_values(name, array)
    # Behaviours.
    index = arrays.get("episode_behaviours")
    if index is not None and (index.ndim != 1 or index.dtype.kind not in "iu"):
        raise DataError(
            f"episode_behaviours is {index.dtype} of the shape {list(index.shape)}. "
            "Store one whole number for each episode, or leave the array out."
        )
    # Actions.
    actions = arrays["actions"]
    largest = max(
        float(np.abs(np.asarray(actions[part], np.float64)).max()) for part in chunks(len(actions))
    )
    if largest > 1.0 + ACTION_TOLERANCE:
        raise DataError(
            f"The dataset has an action of size {largest:.6g}, outside [-1, 1]. "
            "Rescale the actions so that -1 and 1 are the bounds of the action space, or store "
            "these as the metadata's action_low and action_high."
        )
    # Ends.
    if not (arrays["terminals"][:].any() or arrays["timeouts"][:].any()):
        raise DataError(
            "No episode of the dataset ever ends: terminals and timeouts are false throughout. "
            "Mark the last step of each episode in one of them."
        )


def _check_shapes(arrays: Mapping[str, NDArray[np.generic]]) -> None:
    n = len(arrays["observations"]) if arrays["observations"].ndim else 0
    for name, array in arrays.items():
        if array.ndim != (2 if name in TABLES else 1) or (array.ndim == 2 and not array.shape[1]):
            raise wrong_shape(name, array)
        if len(array) != n:
            raise DataError(
                f'The array "{name}" has {len(array)} rows, but "observations" has {n}. '
                "Store one row per transition in every array."
            )
    if n == 0:
        raise DataError("The dataset is empty. Log at least one complete episode.")
    if arrays["observations"].shape != arrays["next_observations"].shape:
        raise DataError(
            f"next_observations are {list(arrays['next_observations'].shape)}, but observations "
            f"{list(arrays['observations'].shape)}. Both must have the same shape."
        )


def check_flags(name: str, array: NDArray[np.generic]) -> None:
    """Raise DataError unless an array [N] says true or false of each transition."""
    if array.ndim != 1:
        raise wrong_shape(name, array)
    _check_values(name, array)


def wrong_shape(name: str, array: NDArray[np.generic]) -> DataError:
    """The error for an array that has more or fewer dimensions than its name asks for."""
    expected = "[N, size]" if name in TABLES else "[N]"
    return DataError(
        f'The array "{name}" has the shape {list(array.shape)}, expected {expected}. '
        "Store one row per transition."
    )


def _check_values(name: str, array: NDArray[np.generic]) -> None:
    if array.dtype.kind not in "fiub":
        raise DataError(
            f'The array "{name}" has the type {array.dtype}, which holds no real numbers. '
            "Store float32 (bool for terminals and timeouts)."
        )
    wrong, first = 0, 0
    lowest = 0.0 if signal_of(name) else -_LARGEST
    for part in chunks(len(array)):
        values = array[part]
        if name in _FLAGS:
            if not np.isin(values, (0, 1)).all():
                raise DataError(
                    f'The array "{name}" holds values other than 0 and 1. '
                    "Store true or false for each transition."
                )
            continue
        # The limit of float32 catches infinity, NaN (by the negation), what would overflow to it.
        # float64 is compared: float16 is never so large, the least integer has no absolute value.
        with np.errstate(over="ignore"):
            wide = np.asarray(values, np.float64)
            bad = ~((np.abs(wide) <= _LARGEST) & (wide >= lowest))
        if bad.any() and not wrong:
            first = part.start + int(np.argwhere(bad)[0][0])
        wrong += int(bad.sum())
    if wrong:
        raise DataError(
            f'The array "{name}" has {wrong} values that are NaN, infinite or too large '
            f"for float32, the first in row {first}. Remove or repair these transitions."
            if not signal_of(name)
            else f'The array "{name}" has {wrong} values that are not finite or below 0, the first '
            f"in row {first}, but a signal costs 0 or more. Repair them, or, if it is no cost, "
            f"give the array another name."
        )


def check_one_hot(actions: NDArray[np.generic], count: int) -> None:
    """Raise DataError unless discrete actions are rows [N, count] with one 1 and zeros."""
    rows = actions.shape == (len(actions), count) and np.isin(actions, (0, 1)).all()
    if not rows or (actions.sum(axis=1) != 1).any():
        raise DataError(
            f"The metadata's action_count is {count}, but the actions are not one-hot rows of "
            f"{count} numbers. Store such rows, or the numbers of the actions as integers [N]."
        )


def check_same_env(metadata: Mapping[str, object], env_id: str) -> None:
    """Raise DataError if a dataset names another environment than ``env_id``.

    The part of an id before ":" only says which module registers it, so it is not compared.
    """
    logged = str(metadata.get("env_id", env_id))
    if logged.rpartition(":")[2] != env_id.rpartition(":")[2]:
        raise DataError(
            f'The dataset was logged on "{logged}", not on "{env_id}". '
            f"Use --env {logged}, or give a dataset of {env_id}."
        )


def check_matches_env(
    dataset: Dataset,
    env_id: str,
    observation_size: int,
    action_size: int,
    *,
    discrete: bool = False,
) -> None:
    """Raise DataError unless the dataset can be of the environment ``env_id``.

    A file that does not name its environment is judged by its actions and sizes alone.
    """
    # The name.
    check_same_env(dataset.metadata, env_id)
    # The kind of actions.
    if dataset.discrete != discrete:
        kinds = ("continuous", "discrete")
        remedy = (
            "Store continuous actions as floats"
            if dataset.discrete
            else "Store discrete actions as integers, or as one-hot rows with the metadata's "
            "action_count"
        )
        raise DataError(
            f'The dataset\'s actions are {kinds[dataset.discrete]}, those of "{env_id}" '
            f"{kinds[discrete]}. {remedy}, or name its environment with --env."
        )
    # Sizes.
    sizes = (dataset.layout.observation_size, dataset.layout.action_size)
    if discrete and sizes[0] == observation_size and sizes[1] < action_size:
        raise DataError(
            f'The dataset has {sizes[1]} discrete actions, but "{env_id}" has {action_size}. If '
            f"the others never occur in it, store the metadata's action_count as {action_size}; "
            "else name its environment with --env."
        )
    if sizes != (observation_size, action_size):
        raise DataError(
            f"The dataset has observations of {sizes[0]} and actions of {sizes[1]} numbers, but "
            f'"{env_id}" has {observation_size} and {action_size}. '
            "Give a dataset of this environment, or name its environment with --env."
        )


def check_learnable(dataset: Dataset, spec: SafetySpec) -> None:
    """Raise DataError for a single episode, and for costs below 0 where cost is constrained."""
    if dataset.episodes < 2:
        raise DataError(
            "The dataset holds a single episode, so none can be held out to judge what is learnt. "
            "Log more episodes, or check that terminals and timeouts mark their ends."
        )
    below = np.flatnonzero(dataset.column("costs").numpy() < 0.0)
    if COST.constraint in spec.bounds and len(below):
        raise DataError(
            f"The dataset gives {len(below)} steps a cost below 0, the first in row {below[0]}, "
            "but only costs of 0 or more can be constrained. Correct the costs, or set "
            "safety.constraint=accident."
        )
