"""What an accident is, and how much of it is allowed: the one place that says so."""

from __future__ import annotations

import math
from dataclasses import dataclass

from safe_offrl.errors import ConfigError


@dataclass(frozen=True)
class SafetySpec:
    """The safety contract of a run; saved with the data and with the run.

    ``accident``: "cost" (``info["cost"] > cost_threshold``), "terminated", or
    "package.module:function" with the signature
    ``f(observation, action, next_observation, reward, terminated, truncated, info) -> bool``.
    ``epsilon`` bounds V_accident(s0), the probability of at least one accident within the horizon;
    ``delta`` bounds KL(pi || pi_prev) in nats; ``confidence`` is that of every reported bound.
    ``horizon`` is the number of steps within which an accident counts; None takes the
    environment's own time limit.
    """

    accident: str = "cost"
    cost_threshold: float = 0.0
    horizon: int | None = None
    epsilon: float = 0.1
    delta: float = 0.05
    confidence: float = 0.95

    def __post_init__(self) -> None:
        """Refuse values outside their range; comparisons are written so that NaN is refused too."""
        if not 0.0 < self.epsilon < 1.0:
            raise ConfigError(
                f"safety.epsilon is {self.epsilon}, but a probability strictly between 0 and 1 is "
                "needed. Try epsilon 0.1."
            )
        if not (0.0 < self.delta < math.inf):
            raise ConfigError(
                f"safety.delta is {self.delta}, but a finite KL limit above 0 (nats) is needed. "
                "Try delta 0.05."
            )
        if not 0.5 <= self.confidence < 1.0:
            raise ConfigError(
                f"safety.confidence is {self.confidence}, but a number in [0.5, 1) is needed. "
                "Try confidence 0.95."
            )
        if self.horizon is not None and self.horizon < 1:
            raise ConfigError(
                f"safety.horizon is {self.horizon}, but at least 1 step is needed. "
                "Leave it out to take the environment's own time limit."
            )
        if not math.isfinite(self.cost_threshold):
            raise ConfigError(
                f"safety.cost_threshold is {self.cost_threshold}, but a finite number is needed. "
                "Try 0."
            )
        if self.accident not in ("cost", "terminated") and ":" not in self.accident:
            raise ConfigError(
                f'safety.accident is "{self.accident}", which is no accident rule. Use "cost", '
                '"terminated" or "package.module:function".'
            )
