"""The Lagrange multiplier lambda of the safety constraint: dual ascent, and as a baseline PID."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_offrl.errors import ConfigError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LagrangianConfig:
    """Dual ascent: start, bound, and step of lambda (per update, times the relative excess).

    ``aim`` is the share of the limit that lambda steers towards. At 1 lambda winds down to 0 while
    all is well, and the learner sits on the limit: the mean of its policies keeps it, not each.
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

    def __init__(self, config: LagrangianConfig, limit: float, device: torch.device = CPU) -> None:
        self.config = config
        self.target = config.aim * limit
        self.value = torch.tensor(config.init, device=device)

    def parts(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, besides ``value``: nothing."""
        return {}

    def begin_at(self, value: float) -> None:
        """Set lambda."""
        self.value.fill_(value)

    def update(self, estimate: Tensor) -> None:
        """One step of dual ascent on an estimate of what is limited, a scalar tensor."""
        excess = (estimate / self.target - 1.0).clamp(-1.0, 1.0)
        self.value += self.config.learning_rate * excess
        self.value.clamp_(0.0, self.config.maximum)


@dataclass(frozen=True)
class PIDConfig:
    """Gains of :class:`PIDMultiplier`, per update and relative excess; ``adaptive`` is Marvel's.

    ``smoothing`` is the forgetting factor of the proportional and the derivative term, ``delay``
    how many updates ago the derivative looks. The defaults of gains other than the integral's are
    Stooke et al.'s ratios to it.
    """

    proportional: float = 0.03
    integral: float = 3e-3
    derivative: float = 0.03
    smoothing: float = 0.95
    delay: int = 10
    adaptive: bool = False

    def __post_init__(self) -> None:
        """Refuse gains that would push the wrong way, and a derivative over no time."""
        if min(self.proportional, self.integral, self.derivative) < 0.0 or self.delay < 1:
            raise ConfigError(
                "The gains of baseline.pid must be at least 0 and its delay at least 1. Try "
                "proportional 0.03, integral 0.003, derivative 0.03, delay 10."
            )
        if not 0.0 <= self.smoothing < 1.0:
            raise ConfigError(
                f"baseline.pid.smoothing is {self.smoothing}, but a factor in [0, 1) is needed. "
                "Try 0.95."
            )


class PIDMultiplier:
    """PID control of lambda (Stooke et al. 2020, arXiv:2007.03964, algorithm 2).

    With the relative excess ``e = v / limit - 1``, clipped to [-1, 1] as in :class:`Multiplier`,
    and ``v / limit`` itself, both smoothed (s_e, s_v):
    ``I <- clip(I + K_I e, 0, max)``, ``lambda = clip(K_P s_e + I + K_D max(0, s_v - s_v of delay
    updates ago), 0, max)``. K_P = K_D = 0 is dual ascent.

    ``adaptive`` moves the gains as the authors of Marvel do (arXiv:2412.04426, section 4.2 and
    their code): each by a factor that follows the mean m and the standard deviation s of the
    smoothed v / limit over the delay, ``K_P, K_I *= 1 + .05 (m - 1) / m`` (above the limit and,
    mirrored, below), ``K_D *= 1 + .05 s / m``, within a factor of ten of where they began.
    """

    def __init__(
        self,
        config: PIDConfig,
        init: float,
        limit: float,
        maximum: float,
        device: torch.device = CPU,
    ) -> None:
        self.config = config
        self.limit = limit
        self.maximum = maximum
        self.value = torch.tensor(init, device=device)
        self.integral = torch.tensor(init, device=device)
        self.smoothed = torch.zeros(2, device=device)  # of e and of v / limit
        self.history = torch.zeros(config.delay, device=device)  # of the latter, oldest first
        gains = [config.proportional, config.integral, config.derivative]
        self._initial = torch.tensor(gains, device=device)
        self.gains = self._initial.clone()

    def parts(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, besides ``value``."""
        return {
            "pid_integral": self.integral,
            "pid_smoothed": self.smoothed,
            "pid_history": self.history,
            "pid_gains": self.gains,
        }

    def begin_at(self, value: float) -> None:
        """Set lambda, and what it is made of while nothing has been seen."""
        self.value.fill_(value)
        self.integral.fill_(value)

    def update(self, estimate: Tensor) -> None:
        """One step of control on what is limited, a scalar tensor."""
        relative = estimate / self.limit
        excess = (relative - 1.0).clamp(-1.0, 1.0)
        proportional, integral, derivative = self.gains
        self.integral.add_(integral * excess).clamp_(0.0, self.maximum)
        self.smoothed.lerp_(torch.stack([excess, relative]), 1.0 - self.config.smoothing)
        rise = (self.smoothed[1] - self.history[0]).clamp_min(0.0)
        wanted = proportional * self.smoothed[0] + self.integral + derivative * rise
        self.value.copy_(wanted.clamp(0.0, self.maximum))
        self.history.copy_(torch.cat([self.history[1:], self.smoothed[1:]]))
        if self.config.adaptive:
            self._adapt()

    def _adapt(self) -> None:
        mean = self.history.mean() + 1e-2  # no division by 0 while nothing was seen
        follow = 1.0 + 0.05 * ((mean - 1.0) / mean).clamp(-1.0, 1.0)
        spread = 1.0 + 0.05 * self.history.std(correction=0) / mean
        self.gains.mul_(torch.stack([follow, follow, spread]))
        self.gains.copy_(self.gains.clamp(self._initial / 10.0, self._initial * 10.0))
