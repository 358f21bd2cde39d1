"""Problems so small that the right answer is known, as logs that an agent learns from."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safe_offrl.agents import find_agent, kind_of
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.compute.state import seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import uniform_batches
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.types import Batch, Layout
from tests.agents.setups import setup_of

SIZES = NetworkConfig((32,), (32,), 4)
FAST: dict[str, Any] = {"learning_rate": 3e-3, "tau": 0.05}


def log_of(
    observations: Tensor,
    actions: Tensor,
    rewards: Tensor,
    following: Tensor,
    terminated: Tensor,
    *,
    length: int = 1,
) -> Dataset:
    """Episodes of this many steps; one that has not terminated was truncated."""
    layout, zeros = Layout(observations.shape[1], actions.shape[1]), torch.zeros_like(rewards)
    batch = Batch(
        observations, actions, rewards, zeros, zeros, following, terminated, zeros + 1, zeros
    )
    starts = np.arange(0, len(rewards) + 1, length)
    return Dataset(layout.pack(batch), layout, starts, np.zeros(len(rewards), bool), length, "")


def bandit(actions: Tensor, rewards: Tensor) -> Dataset:
    """One step, from states that say nothing.

    In a single one the mean of |Q|, by which critics are divided, would be near 0 as Q passes it.
    """
    here = torch.randn(len(actions), 1, generator=seeded(9))
    return log_of(here, actions, rewards, here, torch.ones(len(actions)))


def agent_of(
    name: str, log: Dataset, *, sizes: NetworkConfig = SIZES, **settings: Any
) -> tuple[Any, Networks]:
    """An agent for a log, fast unless other ``settings`` are given, and what it trains."""
    generator, agent = seeded(0), find_agent(name)
    networks = Networks(*log.layout.sizes, sizes, generator, kind_of(name, discrete=log.discrete))
    setup = setup_of(networks, generator)._replace(dataset=log)
    return agent(setup, agent.Config(**(FAST | settings))), networks


def trained(
    name: str,
    log: Dataset,
    steps: int,
    *penalties: Penalty,
    q: Callable[[Tensor], Tensor] | None = None,
    **settings: Any,
) -> tuple[Networks, dict[str, float]]:
    """What so many steps on uniform batches of a log make of the networks.

    And the means of what was to be logged, over the second half of the steps that log it.

    With a ``q`` of actions [B, A] -> [B] the actor climbs that, and no critics are learnt.
    """
    agent, networks = agent_of(name, log, **settings)
    if q is not None:
        networks.q = lambda observations, actions: q(actions).expand(2, -1)  # type: ignore[method-assign]
        owner = next((x for x in map(vars(agent).get, ("td3", "brac")) if x), agent)
        owner.values._descend_critics = lambda *_: (torch.zeros(()),)
    drawn, logged = seeded(3), defaultdict(list)
    for _ in range(steps):
        (batch,) = uniform_batches(log.rows, log.layout, 1, 64, drawn)
        for key, value in agent.update(batch, Steering(penalties)).items():
            logged[key].append(float(value))
    return networks, {k: float(np.mean(v[len(v) // 2 :])) for k, v in logged.items()}


def drawn_from(networks: Networks, count: int = 2000) -> Tensor:
    """Actions [count] of a policy of one action dimension, in the middle state of a bandit."""
    with torch.no_grad():
        noise = torch.randn(count, 1, 1, generator=seeded(7))
        return networks.actor(torch.zeros(1, 1)).act(noise).flatten()
