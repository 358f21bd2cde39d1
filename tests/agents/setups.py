"""What an agent is built from, where a test has networks and no log."""

from typing import Any

import numpy as np
import torch

from safe_offrl.agents import AGENTS
from safe_offrl.agents.protocol import Setup
from safe_offrl.data.dataset import Dataset
from safe_offrl.limits import Limit
from safe_offrl.policies.kinds import KINDS
from safe_offrl.policies.networks import Networks

LIMIT = Limit("accident", 0.1, 1.0)


def agents_for(*, discrete: bool) -> list[str]:
    """Names of the agents that train policies over such actions."""
    kinds = {name: getattr(agent, "kinds", KINDS.values()) for name, agent in AGENTS.items()}
    return [n for n, own in kinds.items() if any(kind.one_hot == discrete for kind in own)]


def setup_of(networks: Networks, generator: torch.Generator, **settings: Any) -> Setup:
    """With a log of one step without an accident; ``settings`` are fields of Setup."""
    layout = networks.layout
    dataset = Dataset(
        torch.zeros(1, layout.width), layout, np.array([0, 1]), np.zeros(1, bool), 1, ""
    )
    return Setup(networks, dataset, (LIMIT,), generator, **settings)
