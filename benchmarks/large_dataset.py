"""Ten million transitions: how fast they become a memory map, and random batches out of it.

    python benchmarks/large_dataset.py [--transitions 10000000] [--folder /tmp]

Writes a random HDF5 file in the DSRL layout (observations of 17 numbers, actions of 6: 1.7 GB)
into a temporary folder, converts it in a process of its own (whose peak memory is measured), opens
the map and draws 256-row batches. Everything written is deleted. Prints one line of JSON and one
line for people.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import uniform_batches
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.spec import SafetySpec

OBSERVATION_SIZE, ACTION_SIZE, HORIZON = 17, 6, 1000
CHUNK = 250_000
BATCH_SIZE, BATCHES = 256, 3000

CONVERT = """
import resource, sys, time
from safe_offrl.data_formats.conversion import convert
begin = time.perf_counter()
convert(sys.argv[1], sys.argv[2])
print(time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_source(path: Path, transitions: int) -> None:
    """Episodes of 1000 steps, a cost in one step of a hundred."""
    rng = np.random.default_rng(0)
    shapes = {
        "observations": (OBSERVATION_SIZE,),
        "next_observations": (OBSERVATION_SIZE,),
        "actions": (ACTION_SIZE,),
        "rewards": (),
        "costs": (),
        "terminals": (),
        "timeouts": (),
    }
    with h5py.File(path, "w") as file:
        stored = {k: file.create_dataset(k, (transitions, *s), "f4") for k, s in shapes.items()}
        for start in range(0, transitions, CHUNK):
            n = min(CHUNK, transitions - start)
            rows = rng.standard_normal((n + 1, OBSERVATION_SIZE), dtype=np.float32)
            part = slice(start, start + n)
            stored["observations"][part] = rows[:-1]
            stored["next_observations"][part] = rows[1:]
            stored["actions"][part] = rng.uniform(-1.0, 1.0, (n, ACTION_SIZE)).astype(np.float32)
            stored["rewards"][part] = rng.standard_normal(n, dtype=np.float32)
            stored["costs"][part] = rng.random(n) < 0.01
            steps = np.arange(start, start + n)
            stored["timeouts"][part] = steps % HORIZON == HORIZON - 1


def drawn_per_second(dataset: Dataset, batches: int) -> float:
    """Batches of 256 random rows a second, after as many to warm up."""
    generator = torch.Generator().manual_seed(0)
    begin = 0.0
    for k in range(2 * batches):
        if k == batches:
            begin = time.perf_counter()
        uniform_batches(dataset.rows, dataset.layout, 1, BATCH_SIZE, generator)
    return batches / (time.perf_counter() - begin)


def measure(folder: Path, transitions: int) -> dict[str, Any]:
    """All figures; seconds, bytes and batches a second."""
    source, target = folder / "big.hdf5", folder / "big.mmap"
    write_source(source, transitions)
    command = [sys.executable, "-c", CONVERT, str(source), str(target)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, peak = map(float, printed.split())
    size = source.stat().st_size
    source.unlink()
    spec = SafetySpec(horizon=HORIZON)
    begin = time.perf_counter()
    load_dataset(target, discount=0.99, spec=spec)
    first_load = time.perf_counter() - begin
    begin = time.perf_counter()
    dataset = load_dataset(target, discount=0.99, spec=spec)  # its scalars lie beside the map now
    load = time.perf_counter() - begin
    train, _ = dataset.split(0.15, 0)
    begin = time.perf_counter()
    normalised = train.normalised(train.normalizer())
    statistics = time.perf_counter() - begin
    return {
        "transitions": transitions,
        "source_bytes": size,
        "convert_seconds": seconds,
        "convert_peak_bytes": peak,
        "first_load_seconds": first_load,
        "load_seconds": load,
        "normalizer_seconds": statistics,
        "batches_per_second": drawn_per_second(dataset, BATCHES),
        "training_batches_per_second": drawn_per_second(normalised, BATCHES),
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--transitions", type=int, default=10_000_000)
    parser.add_argument("--folder", help="where there is room for 4 GB; the system's if left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments.transitions)
    print(json.dumps(result))
    print(
        f"{result['transitions']:,} transitions: converted in {result['convert_seconds']:.0f} s "
        f"with {result['convert_peak_bytes'] / 2**20:.0f} MiB, opened in "
        f"{result['load_seconds']:.2f} s, {result['batches_per_second']:,.0f} random batches of "
        f"{BATCH_SIZE} a second ({result['training_batches_per_second']:,.0f} standardised)"
    )


if __name__ == "__main__":
    main()
