"""The Lagrange multiplier lambda of the safety constraint, moved by dual ascent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_offrl.errors import ConfigError


@dataclass(frozen=True)
class LagrangianConfig:
    """Dual ascent: start, bound, and step of lambda (per update, times the relative excess).

    ``aim`` is the share of the limit that lambda steers towards. At 1 the learner sits on the
    limit, every second proposal is refused, and lambda winds down to 0 while all is well.
    """

    init: float = 3.0
    learning_rate: float = 1e-3
    maximum: float = 20.0
    aim: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values that would switch the constraint off or turn it around."""
        if not (0.0 < self.aim <= 1.0 and 0.0 <= self.init <= self.maximum):
            raise ConfigError(
                f"lagrangian.aim is {self.aim} and lagrangian.init {self.init}, but aim must be in "
                f"(0, 1] and init between 0 and lagrangian.maximum, {self.maximum}. Try aim 0.5, "
                "init 3, maximum 20."
            )


class Multiplier:
    """Projected dual ascent ``lambda <- clip(lambda + lr (v / (aim limit) - 1), 0, max)``.

    Started offline and carried online: a multiplier that starts at 0 leaves the first steps, the
    most dangerous ones, unconstrained. The excess is clipped to [-1, 1], so that a useless estimate
    early in training cannot throw lambda to its bound in a few hundred updates.
    """

    def __init__(self, config: LagrangianConfig, limit: float) -> None:
        self.config = config
        self.target = config.aim * limit
        self.value = torch.tensor(config.init)

    def update(self, estimate: Tensor) -> None:
        """One step of dual ascent on an estimate of what is limited, a scalar tensor."""
        excess = (estimate / self.target - 1.0).clamp(-1.0, 1.0)
        self.value += self.config.learning_rate * excess
        self.value.clamp_(0.0, self.config.maximum)
