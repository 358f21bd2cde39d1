"""safe-offrl's updates as short runs make them, in eager mode; it also counts what they compute."""

from __future__ import annotations

from collections.abc import Callable

from ours import cases
from torch.utils.flop_counter import FlopCounterMode
from worker import DEVICE

from safe_offrl.compute.descent import Compute

CASES = cases(Compute(device=DEVICE))


def flops(run: Callable[[int], None], updates: int) -> float:
    """Floating point operations of the matrix products of one update, forward and backward.

    0 on a GPU: a graph that is replayed dispatches nothing that could be counted.
    """
    if DEVICE == "cuda":
        return 0.0
    with FlopCounterMode(display=False) as counter:
        run(updates)
    return counter.get_total_flops() / updates
