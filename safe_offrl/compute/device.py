"""How torch computes here: on what, threads, the library that multiplies, and freed memory."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Literal

import torch

from safe_offrl.errors import ConfigError

Device = Literal["cpu", "cuda"]
DeviceChoice = Literal["auto", "cpu", "cuda"]

# glibc's mallopt(3) takes these parameters and values.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more
KEPT_BYTES = 2**30  # so much freed memory stays with the process


def find_device(wanted: DeviceChoice) -> Device:
    """What to learn on: a CUDA GPU if there is one ("auto"), or as it is said.

    ConfigError where a GPU is wanted and torch finds none. Acting, the environment and everything
    that is reported stay on the CPU either way.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but torch finds no CUDA GPU. Install torch's CUDA build and a driver, "
            "or leave device out."
        )
    # cuBLAS reads it before the first product, and then gives the same bits every time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return "cuda"


def configure(threads: int) -> None:
    """Set the threads of a run, pick oneDNN for fp32 products where it is exact, keep freed memory.

    One thread is the safe default at these network sizes: two spin against each other. As shipped,
    torch multiplies with MKL, which is several times slower than oneDNN on some CPUs (measured: 9
    times for a stack of five 128x128 layers on an AMD EPYC). The switch asks for "bf16", which on a
    CPU without AMX still computes in full fp32; that is verified, and undone where it is not so.
    """
    torch.set_num_threads(threads)
    _keep_freed_memory()
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set up at import
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 64, 64, generator=generator)
    error = (a @ a - (a.double() @ a.double()).float()).abs().max()
    # fp32 leaves about 1e-5 here, bf16 about 1e-1.
    if not float(error) < 1e-3:
        settings.fp32_precision = before


def _keep_freed_memory() -> None:
    """Let the C library keep what an update frees, since the next one needs as much; glibc only.

    The temporaries of CQL's 30 actions are 16 MiB each. By default they go back to the system after
    every update, and come back page by page: 33,000 page faults, a third of the time or more.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
