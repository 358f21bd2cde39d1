"""How torch computes here: number of threads, and which library multiplies matrices."""

from __future__ import annotations

import torch


def configure(threads: int) -> None:
    """Set the threads of a run and pick oneDNN for fp32 products where it is exact.

    One thread is the safe default at these network sizes: two spin against each other. As shipped,
    torch multiplies with MKL, which is several times slower than oneDNN on some CPUs (measured: 9
    times for a stack of five 128x128 layers on an AMD EPYC). The switch asks for "bf16", which on a
    CPU without AMX still computes in full fp32; that is verified, and undone where it is not so.
    """
    torch.set_num_threads(threads)
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set up at import
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 64, 64, generator=generator)
    error = (a @ a - (a.double() @ a.double()).float()).abs().max()
    # fp32 leaves about 1e-5 here, bf16 about 1e-1.
    if not float(error) < 1e-3:
        settings.fp32_precision = before
