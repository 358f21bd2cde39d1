"""What both phases are built from: networks, safety critic and multiplier, in one order.

All that is random is drawn from one generator, so the order is part of what a seed means: the
networks of the agent, what an agent adds to them, the safety critic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch

from safe_offrl.compute.descent import Compute
from safe_offrl.compute.device import Device
from safe_offrl.compute.state import seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.limits import QUANTITIES, Limit, Quantity
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import Networks
from safe_offrl.policies.protocol import Kind
from safe_offrl.safety.constrained import Constrained
from safe_offrl.safety.critic import SafetyCritic, outlook_on
from safe_offrl.safety.multiplier import Multiplier, PIDMultiplier
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Layout

Settings = TypeVar("Settings")


class Foundation(NamedTuple):
    """The beginning of a phase; what is drawn later is asked for by its methods."""

    config: PretrainConfig | FinetuneConfig
    layout: Layout  # of the log's rows
    horizon: int
    cost_max: float  # largest cost of a step in the log
    signals_max: Mapping[str, float]  # the same of each named cost signal
    generator: torch.Generator
    compute: Compute
    networks: Networks
    limits: tuple[Limit, ...]  # of what is constrained
    worst_cost: float  # what an episode counts as whose end is unknown
    worst_signals: Mapping[str, float]  # the same, of each named cost

    @classmethod
    def from_log(
        cls,
        config: PretrainConfig | FinetuneConfig,
        dataset: Dataset,
        horizon: int,
        compiled: bool,
        device: Device,
        kind: Kind | None = None,
    ) -> Foundation:
        """Generator and networks for a log and a horizon; ConfigError if its limit cannot bind.

        The policy is of this ``kind``, None: of the first that fits the log's actions.
        """
        generator, kind = seeded(config.seed, device), kind or kind_for(discrete=dataset.discrete)
        limits = config.safety.all_limits(horizon, dataset.cost_max, dataset.signals_max)
        own = [limit for limit in limits if not limit.quantity.signal]
        return cls(
            config,
            dataset.layout,
            horizon,
            dataset.cost_max,
            dataset.signals_max,
            generator,
            Compute(compiled, config.precision, device),
            Networks(*dataset.layout.sizes, config.networks, generator, kind),
            limits,
            max((x.worst_cost(dataset.worst_cost) for x in own), default=dataset.worst_cost),
            dataset.worst_signals
            | {x.constraint: x.worst_cost(0.0) for x in limits if x.quantity.signal},
        )

    def costs_info(self) -> dict[str, Any]:
        """What of the log's costs is to be known where the log is not; JSON-able."""
        signals = {"signals_max": self.signals_max, "worst_signals": self.worst_signals}
        limited = any(limit.quantity.signal for limit in self.limits)
        costs = {"cost_max": self.cost_max, "worst_cost": self.worst_cost}
        return {**costs, **(signals if limited else {})}

    def constraints(self) -> tuple[Constrained, ...]:
        """A new safety critic and multiplier of each limit."""
        return tuple(
            Constrained(limit, self._critic(limit), self._multiplier(limit))
            for limit in self.limits
        )

    def _critic(self, limit: Limit) -> SafetyCritic:
        settings = settings_of(self.config, "critic", limit.quantity, self.config.critic)
        cost_max = self.signals_max.get(limit.quantity.signal, self.cost_max)
        outlook = outlook_on(limit, self.horizon, cost_max, settings)
        return SafetyCritic(*self.layout.sizes, outlook, settings, self.generator, self.compute)

    def _multiplier(self, limit: Limit) -> Multiplier | PIDMultiplier:
        """Lambda at its start, to move by dual ascent or, where a baseline asks for it, by PID."""
        config, device = self.config, self.generator.device
        lagrangian = settings_of(config, "lagrangian", limit.quantity, config.lagrangian)
        if isinstance(config, FinetuneConfig) and config.baseline.multiplier == "pid":
            gains = settings_of(config, "baseline", limit.quantity, config.baseline).pid
            target = lagrangian.aim * limit.share
            return PIDMultiplier(gains, lagrangian.init, target, lagrangian.maximum, device)
        return Multiplier(lagrangian, limit.share, device)


def settings_of(
    config: PretrainConfig | FinetuneConfig, section: str, quantity: Quantity, first: Settings
) -> Settings:
    """A section of the settings for a limit of ``quantity``; ``first`` is that of the first limit.

    A further limit of another kind of quantity begins with its own kind's defaults in all that
    depends on it, and has everything else from the first.
    """
    if type(quantity) is type(config.safety.quantity):
        return first
    phases = (
        ["pretraining"] if isinstance(config, PretrainConfig) else ["pretraining", "finetuning"]
    )
    fresh = getattr(type(config)(), section)
    settings = first
    for other in (*QUANTITIES.values(), quantity):  # its own words come last
        for phase in phases:
            words = getattr(other, phase).get(section, {})
            settings = _replaced(settings, words if other is quantity else _same(fresh, words))
    return settings


def _same(settings: Any, words: Mapping[str, Any]) -> dict[str, Any]:
    """The values that ``settings`` have under the (nested) keys of ``words``."""
    return {
        key: _same(getattr(settings, key), value)
        if isinstance(value, Mapping)
        else getattr(settings, key)
        for key, value in words.items()
    }


def _replaced(settings: Settings, words: Mapping[str, Any]) -> Settings:
    """The (nested) settings with these values."""
    values = {
        key: _replaced(getattr(settings, key), value) if isinstance(value, Mapping) else value
        for key, value in words.items()
    }
    return replace(settings, **values)  # type: ignore[type-var]  # a dataclass
