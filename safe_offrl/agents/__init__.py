"""Offline agents and online learners by name: the whole registry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from safe_offrl.agents.bc import BCConfig
from safe_offrl.agents.cql import CQL, CQLConfig, OnlineCQL
from safe_offrl.agents.iql import IQL, IQLConfig, OnlineIQL
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.compute.descent import EAGER, Compute
from safe_offrl.compute.state import Part
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks, Risk
from safe_offrl.types import Batch, Layout


class Agent(Protocol):
    """What the offline loop knows of an agent."""

    networks: Networks

    def update(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of all values; (advantages of the logged actions [B], scalars to log)."""
        ...

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        ...


@dataclass(frozen=True)
class AgentConfigs:
    """Settings of every agent (Cal-QL uses CQL's); only the chosen one's matter."""

    bc: BCConfig = field(default_factory=BCConfig)
    iql: IQLConfig = field(default_factory=IQLConfig)
    cql: CQLConfig = field(default_factory=CQLConfig)


class AgentFactory(Protocol):
    """Builds an agent around networks that outlive it."""

    def __call__(
        self,
        networks: Networks,
        layout: Layout,
        sizes: NetworkConfig,
        configs: AgentConfigs,
        generator: torch.Generator,
        compute: Compute = EAGER,
    ) -> Agent:
        """Return the agent, its optimisers on the networks' parameters."""
        ...


def _iql(
    networks: Networks,
    layout: Layout,
    sizes: NetworkConfig,
    configs: AgentConfigs,
    generator: torch.Generator,
    compute: Compute = EAGER,
) -> Agent:
    return IQL(networks, layout.observation_size, sizes, configs.iql, generator, compute)


def _cql(
    networks: Networks,
    layout: Layout,
    sizes: NetworkConfig,
    configs: AgentConfigs,
    generator: torch.Generator,
    compute: Compute = EAGER,
) -> Agent:
    return CQL(networks, configs.cql, compute, calibrated=False)


def _calql(
    networks: Networks,
    layout: Layout,
    sizes: NetworkConfig,
    configs: AgentConfigs,
    generator: torch.Generator,
    compute: Compute = EAGER,
) -> Agent:
    return CQL(networks, configs.cql, compute, calibrated=True)


AGENTS: dict[str, AgentFactory] = {"iql": _iql, "cql": _cql, "calql": _calql}


class OnlineLearner(Protocol):
    """What the online loop knows of a learner."""

    networks: Networks

    def update_critics(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One step of all values; scalars to log."""
        ...

    def update_actor(
        self,
        batch: Batch,
        risk: Risk | None,
        multiplier: Tensor,
        anchor: Actor | None,
        kl_weight: Tensor,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """One step of the actor, see :meth:`safe_offrl.agents.rlpd.RLPD.actor_loss`."""
        ...

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        ...


def online_learner(
    name: str,
    networks: Networks,
    layout: Layout,
    sizes: NetworkConfig,
    config: RLPDConfig,
    configs: AgentConfigs,
    generator: torch.Generator,
    compute: Compute = EAGER,
) -> OnlineLearner:
    """ "rlpd", or as a baseline "iql" or "calql", on networks that a policy was pretrained with."""
    if name == "iql":
        values = IQL(networks, layout.observation_size, sizes, configs.iql, generator, compute)
        return OnlineIQL(values, configs.iql, compute)
    rlpd = RLPD(networks, layout.action_size, config, compute)
    if name == "calql":
        return OnlineCQL(CQL(networks, configs.cql, compute, calibrated=True), rlpd)
    return rlpd
