"""What an agent is built from, where a test has networks and no log."""

from typing import Any

import numpy as np
import torch

from safe_offrl.agents.protocol import Setup
from safe_offrl.data.dataset import Dataset
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import Networks
from safe_offrl.types import Batch, Layout

LIMIT = Limit("accident", 0.1, 1.0)


def log_of(batch: Batch, layout: Layout, horizon: int = 1) -> Dataset:
    """A log whose every transition is an episode of its own."""
    n = len(batch.rewards)
    return Dataset(layout.pack(batch), layout, np.arange(n + 1), np.zeros(n, bool), horizon, "")


def setup_of(
    networks: Networks,
    generator: torch.Generator,
    dataset: Dataset | None = None,
    **settings: Any,
) -> Setup:
    """With a log of one step without an accident by default; ``settings`` are fields of Setup."""
    layout = networks.layout
    if dataset is None:
        dataset = log_of(layout.unpack(torch.zeros(1, layout.width)), layout)
    return Setup(networks, dataset, (LIMIT,), generator, **settings)
