"""Cost signals of Safety-Gymnasium that are sums of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def vases(*step: Any) -> float:
    """Cost of vases in a step: one that is touched, and each that moves.

    ``step`` is what every signal's function gets; the last of it is ``info``.

    >>> vases({"cost_vases_contact": 1.0, "cost_vases_velocity": 0.0})
    1.0
    """
    info: Mapping[str, Any] = step[-1]
    return float(info["cost_vases_contact"]) + float(info["cost_vases_velocity"])
