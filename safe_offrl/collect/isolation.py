"""Stable-Baselines3 by itself: seeds that it takes, and torch as it ships."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def narrow_seed(seed: int, environments: int) -> int:
    """A seed for Stable-Baselines3 and what it seeds, each environment with the next number.

    Those take 32 bits; one that is too large is hashed to 31.
    """
    if seed + environments <= 2**32:
        return seed
    return int(np.random.SeedSequence(seed).generate_state(1)[0]) >> 1


@contextlib.contextmanager
def isolated_torch() -> Iterator[None]:
    """torch as it ships and with one thread, whoever calls: a log must not depend on which command
    builds it (:func:`safe_offrl.compute.device.configure` changes products in the last bit).
    Everything, and the global generators, which SB3 seeds, is restored at the end.
    """
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002
    threads, matmul = torch.get_num_threads(), torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    precision = matmul.fp32_precision
    torch.set_num_threads(1)
    matmul.fp32_precision = "none"
    try:
        yield
    finally:
        matmul.fp32_precision = precision
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        torch.set_num_threads(threads)
