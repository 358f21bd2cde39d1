"""One learner of one library in a process of its own, told on stdin what to do.

    python -m benchmarks.peers.learner LIBRARY ALGORITHM LOG SEED STEPS CORE

LIBRARY is "ours" or "theirs", a file of this folder with ``build``. A line of JSON is answered with
one: ``{"train": n}`` by the seconds that n updates took; ``{"act": observations, "mean": bool}`` by
actions, each a list of rows. The end of stdin ends it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Observations = NDArray[np.float32]  # [N, O], standardised
Actions = NDArray[np.float32]  # [N, A], in [-1, 1] or one-hot


class Act(Protocol):
    """How a policy acts: by its mean, or its most probable action, or as it is."""

    def __call__(self, observations: Observations, *, mean: bool) -> Actions: ...


class Learner(NamedTuple):
    """What a library offers."""

    train: Callable[[int], None]  # so many updates
    act: Act


def main() -> None:
    """Build the learner, say so, and answer until stdin ends."""
    library, algorithm, log, seed, steps, core = sys.argv[1:]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.sched_setaffinity(0, [int(core)])
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints is not an answer

    def answer(values: dict[str, Any]) -> None:
        os.write(out, (json.dumps(values) + "\n").encode())

    module = importlib.import_module(f"benchmarks.peers.{library}")
    learner: Learner = module.build(algorithm, log, int(seed), int(steps))
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        if "train" in request:
            wall, cpu = time.perf_counter(), time.process_time()
            learner.train(request["train"])
            answer(
                {
                    "seconds": time.perf_counter() - wall,
                    "cpu_seconds": time.process_time() - cpu,
                }
            )
        else:
            observations = np.array(request["act"], dtype=np.float32)
            answer({"actions": learner.act(observations, mean=request["mean"]).tolist()})


if __name__ == "__main__":
    main()
