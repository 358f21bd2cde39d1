"""What both phases are built from: networks, safety critic and multiplier, in one order.

All that is random is drawn from one generator, so the order is part of what a seed means: the
networks of the agent, what an agent adds to them, the safety critic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from safe_offrl.compute.descent import Compute
from safe_offrl.compute.device import Device
from safe_offrl.compute.state import seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.limits import Limit
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import Networks
from safe_offrl.safety.critic import SafetyCritic, outlook_on
from safe_offrl.safety.multiplier import Multiplier, PIDConfig, PIDMultiplier
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Layout


class Foundation(NamedTuple):
    """The beginning of a phase; what is drawn later is asked for by its methods."""

    config: PretrainConfig | FinetuneConfig
    layout: Layout  # of the log's rows
    horizon: int
    cost_max: float  # largest cost of a step in the log
    generator: torch.Generator
    compute: Compute
    networks: Networks
    limit: Limit  # of what is constrained
    worst_cost: float  # what an episode counts as whose end is unknown

    @classmethod
    def from_log(
        cls,
        config: PretrainConfig | FinetuneConfig,
        dataset: Dataset,
        horizon: int,
        compiled: bool,
        device: Device,
    ) -> Foundation:
        """Generator and networks for a log and a horizon; ConfigError if its limit cannot bind."""
        generator, kind = seeded(config.seed, device), kind_for(discrete=dataset.discrete)
        limit = config.safety.limit(horizon, dataset.cost_max)
        return cls(
            config,
            dataset.layout,
            horizon,
            dataset.cost_max,
            generator,
            Compute(compiled, config.precision, device),
            Networks(*dataset.layout, config.networks, generator, kind),
            limit,
            limit.worst_cost(dataset.worst_cost),
        )

    def critic(self) -> SafetyCritic:
        """A new safety critic of what is constrained."""
        outlook = outlook_on(self.limit, self.horizon, self.cost_max, self.config.critic)
        return SafetyCritic(*self.layout, outlook, self.config.critic, self.generator, self.compute)

    def multiplier(self, gains: PIDConfig | None = None) -> Multiplier | PIDMultiplier:
        """Lambda at its start, to move by dual ascent or, with ``gains``, by PID control."""
        lagrangian, device = self.config.lagrangian, self.generator.device
        if gains is None:
            return Multiplier(lagrangian, self.limit.share, device)
        limit = lagrangian.aim * self.limit.share
        return PIDMultiplier(gains, lagrangian.init, limit, lagrangian.maximum, device)
