"""d3rlpy (MIT): ``update`` on mini-batches from its replay buffer, in an environment of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import d3rlpy
import numpy as np
import torch
from worker import BATCH, HIDDEN, ROWS, Shape

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def case(config: Any, **settings: Any) -> Callable[[Shape], Callable[[int], None]]:
    """One algorithm with its own defaults besides the sizes."""

    def build(shape: Shape) -> Callable[[int], None]:
        rng = np.random.default_rng(0)
        dataset = d3rlpy.dataset.MDPDataset(
            rng.standard_normal((ROWS, shape.observation), dtype=np.float32),
            rng.uniform(-1.0, 1.0, (ROWS, shape.action)).astype(np.float32),
            rng.standard_normal(ROWS, dtype=np.float32),
            terminals=np.zeros(ROWS),
            timeouts=(np.arange(ROWS) % 1000 == 999).astype(np.float32),
        )
        encoder = d3rlpy.models.VectorEncoderFactory([HIDDEN, HIDDEN])
        encoders = {"actor_encoder_factory": encoder, "critic_encoder_factory": encoder}
        algorithm = config(batch_size=BATCH, **encoders, **settings).create(device="cpu:0")
        algorithm.build_with_dataset(dataset)

        def run(n: int) -> None:
            for _ in range(n):
                algorithm.update(dataset.sample_transition_batch(BATCH))

        return run

    return build


CASES = {
    "sac 2 critics": case(d3rlpy.algos.SACConfig),
    "sac 10 critics": case(d3rlpy.algos.SACConfig, n_critics=10),
    "iql": case(d3rlpy.algos.IQLConfig),
    "cql": case(d3rlpy.algos.CQLConfig, n_action_samples=10),
}
