"""What agents are built from in tests, and a step of each as the loops do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from safe_offrl.agents import AGENTS, AgentConfigs, kind_of, online_agent
from safe_offrl.agents.protocol import Labeller, Setup
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.compute.state import Part, seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import Reach
from safe_offrl.limits import Limit
from safe_offrl.policies.kinds import KINDS
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks
from safe_offrl.types import Batch, Layout

LIMIT = Limit("accident", 0.1, 1.0)
SMALL = NetworkConfig((16,), (16,), 4)


def agents_for(*, discrete: bool) -> list[str]:
    """Names of the agents that train policies over such actions."""
    kinds = {name: getattr(agent, "kinds", KINDS.values()) for name, agent in AGENTS.items()}
    return [n for n, own in kinds.items() if any(kind.one_hot == discrete for kind in own)]


def configs_with(
    special: Mapping[str, Mapping[str, Any]] | None = None, **common: Any
) -> AgentConfigs:
    """Settings of every agent: ``common`` where it has them, and what is ``special`` to one."""
    defaults, made = AgentConfigs(), {}
    for key in (field.name for field in fields(AgentConfigs) if field.name != "own"):
        config = getattr(defaults, key)
        own = {field.name for field in fields(config)}
        settings = {name: value for name, value in common.items() if name in own}
        made[key] = replace(config, **settings, **(special or {}).get(key, {}))
    return AgentConfigs(**made)


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
    """With a log of one step without an accident by default, and a controller.

    ``settings`` are fields of Setup.
    """
    layout = networks.layout
    if dataset is None:
        dataset = log_of(layout.unpack(torch.zeros(1, layout.width)), layout)
    settings = {"controller": first_action(layout), **settings}
    return Setup(networks, dataset, (LIMIT,), generator, **settings)


def first_action(layout: Layout) -> Labeller:
    """A controller that always takes the first action, or of numbers 1 for the first of them."""
    row = torch.eye(layout.action_size)[0]
    return lambda observations: row.expand(len(observations), -1)


class Learner(NamedTuple):
    """An agent offline, or who goes on online, with a step of training as the loops do it."""

    networks: Networks
    parts: dict[str, Part]  # all that it has learnt, and its generator
    step: Callable[[Batch], Any]
    update_critics: Callable[[Batch], Any] | None  # online


def no_risk(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
    return torch.sigmoid(actions.sum(-1)) * 0.0


def learner_of(
    name: str,
    layout: Layout,
    *,
    online: bool = False,
    discrete: bool = False,
    seed: int = 0,
    sizes: NetworkConfig = SMALL,
    configs: AgentConfigs | None = None,
    dataset: Dataset | None = None,
    risk: Any = no_risk,
    anchored: bool = False,
    **settings: Any,
) -> Learner:
    """``settings`` are fields of Setup; ``anchored``: online, to a policy of another seed."""
    generator, configs, one = seeded(seed), configs or AgentConfigs(), torch.tensor(1.0)
    kind = kind_of(name, discrete=discrete)
    networks = Networks(*layout.sizes, sizes, generator, kind)
    setup = setup_of(networks, generator, dataset, **settings)
    steering = Steering((Penalty(risk, one),))
    parts: dict[str, Part] = {**networks.parts(), "generator": generator}
    if not online:
        agent = AGENTS[name](setup, configs.settings_for(AGENTS[name]))
        parts |= agent.parts()
        return Learner(networks, parts, lambda batch: agent.update(batch, steering), None)
    goes_on = online_agent(name, setup, configs)
    steps = getattr(goes_on, "reach", Reach()).steps
    if anchored:
        anchor = Actor(*layout.sizes, sizes.actor_hidden, seeded(7), kind)
        steering = steering._replace(anchor=anchor, kl_weight=one)

    def chunked(batch: Batch) -> Batch:
        return batch._replace(actions=batch.actions.repeat(1, steps))

    def step(batch: Batch) -> None:
        goes_on.update_critics(chunked(batch))
        goes_on.update_actor(chunked(batch), steering)

    def update_critics(batch: Batch) -> Any:
        return goes_on.update_critics(chunked(batch))

    return Learner(networks, parts | goes_on.parts(), step, update_critics)
