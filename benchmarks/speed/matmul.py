"""The limit: how fast this machine multiplies matrices of the shapes that the updates consist of.

It has every case; n is the number of products of two stacks of ten 256x256 matrices in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from ours import cases
from worker import Shape

from safe_offrl.compute.descent import EAGER
from safe_offrl.compute.device import configure

configure(int(os.environ["OMP_NUM_THREADS"]))
FLOPS = 10 * 2 * 256**3


def build(shape: Shape) -> Callable[[int], None]:
    """Ten critics' hidden layer at a batch of 256."""
    a, b, out = (torch.randn(10, 256, 256) for _ in range(3))

    def run(n: int) -> None:
        for _ in range(n):
            torch.bmm(a, b, out=out)

    return run


CASES = dict.fromkeys(cases(EAGER), build)
