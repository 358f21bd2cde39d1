"""safe-offrl's updates as short runs make them, in eager mode; it also counts what they compute."""

from __future__ import annotations

from collections.abc import Callable

from ours import cases
from torch.utils.flop_counter import FlopCounterMode

from safe_offrl.descent import EAGER

CASES = cases(EAGER)


def flops(run: Callable[[int], None], updates: int) -> float:
    """Floating point operations of the matrix products of one update, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        run(updates)
    return counter.get_total_flops() / updates
