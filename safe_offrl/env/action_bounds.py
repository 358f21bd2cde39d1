"""Bounds of actions: those that are meant, and those that only stand for "no bounds"."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

# The smallest of the numbers that are written for "no bound": the largest int32. 1e10, 1e20 and the
# largest floats are beyond it; what is really as large (a power station in watts) has larger units.
LARGEST_BOUND = 2.0**31 - 1.0
STRANGE_BOUND = 1e6  # a person should look at a bound beyond it


def largest_bound(low: ArrayLike, high: ArrayLike) -> float:
    """The largest size of any bound."""
    return float(max(np.abs(np.asarray(bound, np.float64)).max() for bound in (low, high)))


def placeholder(low: ArrayLike, high: ArrayLike) -> str:
    """What is wrong with finite bounds that cannot be meant, in words; "" if they can.

    Actions are learnt in [-1, 1] and scaled to the bounds: with such ones nearly every action that
    makes sense would be 0.

    >>> placeholder(-1.0, 1e9)
    ''
    >>> placeholder(0.0, 1e10)[:54]
    'action bounds of up to 1e+10, which can only stand for'
    """
    largest = largest_bound(low, high)
    if largest < LARGEST_BOUND:
        return ""
    return (
        f'action bounds of up to {largest:.3g}, which can only stand for "no bounds": scaled to '
        "[-1, 1] every action that makes sense would be 0"
    )
