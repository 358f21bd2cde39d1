"""What an environment gives for a number, and what it is in words if it is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def scalar(value: Any) -> float | None:
    """A single number as a float: also a truth value, and an array of one; None for all else."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return float(value)
    if value is None or isinstance(value, str | bytes | Mapping):
        return None
    try:
        array = np.asarray(value)
    except Exception:  # whatever the object raises
        return None
    return float(array.item()) if array.size == 1 and array.dtype.kind in "biuf" else None


def kind_in_words(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(str, value)) or '(none)'}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)} value{'' if len(value) == 1 else 's'}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return f"an object of type {type(value).__name__}"
