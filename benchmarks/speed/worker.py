"""One implementation in a process of its own: told on stdin which case to run, and how often.

    python worker.py MODULE THREADS

MODULE is a file of this folder with ``CASES``: name -> function of a Shape that returns a function
of n, which makes n updates. A line ``CASE,OBSERVATION,ACTION,UPDATES`` is answered with one line of
JSON; the first call of a case builds it and makes one update, whose time is ``first_call``, and
counts floating point operations where MODULE has ``flops``.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

BATCH, HIDDEN, ROWS = 256, 256, 100_000
DEVICE: Literal["cpu", "cuda"] = "cuda" if os.environ.get("SPEED_DEVICE") == "cuda" else "cpu"


class Shape(NamedTuple):
    """What the observation and the action are made of."""

    observation: int
    action: int


def main() -> None:
    """Answer requests until stdin ends."""
    module, threads = sys.argv[1], sys.argv[2]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = threads
    # JAX has no option of its own for this; both must be set before it is imported.
    os.environ["XLA_FLAGS"] = (
        f"--xla_cpu_multi_thread_eigen={'true' if int(threads) > 1 else 'false'}"
    )
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not an answer
    sys.path.insert(0, str(Path(__file__).parent))
    imported = importlib.import_module(module)
    cases: dict[str, Callable[[Shape], Callable[[int], None]]] = imported.CASES
    built: dict[tuple[str, Shape], Callable[[int], None]] = {}
    os.write(out, (json.dumps(sorted(cases)) + "\n").encode())
    for line in sys.stdin:
        case, observation, action, updates = line.rstrip("\n").split(",")
        shape = Shape(int(observation), int(action))
        answer = {}
        if (case, shape) not in built:
            begin = time.perf_counter()
            built[case, shape] = cases[case](shape)
            built[case, shape](1)
            answer["first_call"] = time.perf_counter() - begin
            if hasattr(imported, "flops"):
                answer["flops"] = imported.flops(built[case, shape], 20)
        wall, cpu = time.perf_counter(), time.process_time()
        built[case, shape](int(updates))
        answer["seconds"] = time.perf_counter() - wall
        answer["cpu_seconds"] = time.process_time() - cpu
        answer["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        os.write(out, (json.dumps(answer) + "\n").encode())


if __name__ == "__main__":
    main()
