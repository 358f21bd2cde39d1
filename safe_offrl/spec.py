"""What an accident is, and how much of it is allowed: the one place that says so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from safe_offrl.errors import ConfigError
from safe_offrl.limits import QUANTITIES, Limit, Quantity, quantity_named

COST_RULES = ("cost", "episode_cost")  # accident rules that look at the cost
BUILT_IN_RULES = (*COST_RULES, "terminated")
TAKEN = ("accident", "cost")  # names that no signal may have, for they mean something else
COST_SHARE_MAX = 2.0  # of cost_threshold: a larger share used tells the policy nothing more


@dataclass(frozen=True)
class SafetySpec:
    """The safety contract of a run; saved with the data and with the run.

    ``accident``: "cost" (``info["cost"] > cost_threshold``), "episode_cost" (the cost summed over
    the episode exceeds ``cost_threshold``), "terminated", or "package.module:function" with the
    signature ``f(observation, action, next_observation, reward, terminated, truncated, info)``.
    ``constraint`` is what is limited: "accident", V_accident(s0) < ``epsilon``, the probability of
    at least one accident within the horizon; or "cost", the expected undiscounted cost per episode
    < ``cost_limit`` (the CMDP of OmniSafe and DSRL). Both are counted and reported either way.
    ``delta`` bounds KL(pi || pi_prev) in nats; ``confidence`` is that of every reported bound.
    ``horizon`` is the number of steps of an episode within which both count; None takes the
    environment's own time limit.

    ``limits`` are several constraints at once, each kept by every policy that acts: what is limited
    ("accident", "cost", a name of ``signals``) and its limit. The first is the one that
    ``constraint`` names; ``epsilon`` and ``cost_limit`` are then what it says.

    ``signals`` are costs beside ``info["cost"]``, {name: where it is found}: a key of info, a path
    of keys ("constraints.vases"), or "package.module:function" as an accident rule. In order of
    their names.
    """

    accident: str = "cost"
    cost_threshold: float = 0.0
    horizon: int | None = None
    constraint: str = "accident"
    cost_limit: float = 25.0
    epsilon: float = 0.1
    delta: float = 0.05
    confidence: float = 0.95
    limits: dict[str, float] = field(default_factory=dict, hash=False)
    signals: dict[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Refuse values outside their range; comparisons are written so that NaN is refused too."""
        self._take_limits()
        # Probabilities, and the bound of the KL.
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
        # What an accident is, and within how many steps.
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
        if self.accident not in BUILT_IN_RULES and ":" not in self.accident:
            raise ConfigError(
                f'safety.accident is "{self.accident}", which is no accident rule. Use "cost", '
                '"episode_cost", "terminated" or "package.module:function".'
            )
        if self.accident == "episode_cost" and not self.cost_threshold > 0.0:
            raise ConfigError(
                'The accident rule "episode_cost" needs the cost that an episode may have. Set '
                "safety.cost_threshold above 0, for example 25."
            )
        # The constraint and its limit.
        if self.constraint not in (*QUANTITIES, *self.limits):
            raise ConfigError(
                f'safety.constraint is "{self.constraint}", but only "accident" (below epsilon) '
                'and "cost" (expected cost per episode below cost_limit) can be constrained.'
                + f" Of a signal give safety.limits.{self.constraint}."
                * (self.constraint in self.signals)
            )
        if not 0.0 < self.cost_limit < math.inf:
            raise ConfigError(
                f"safety.cost_limit is {self.cost_limit}, but a finite cost per episode above 0 is "
                "needed. Try 25, the limit of OmniSafe's benchmarks."
            )
        self._check_signals()

    def _check_signals(self) -> None:
        """Refuse names that mean something else or are none, and put them in order."""
        for name, source in self.signals.items():
            if name in TAKEN or not (name.isidentifier() and name.isascii()):
                taken = f", and none of {', '.join(TAKEN)}" if name in TAKEN else ""
                raise ConfigError(
                    f'safety.signals has the name "{name}", but a name is one word of letters, '
                    f"digits and _{taken}. Try safety.signals.hazards=cost_hazards."
                )
            parts = source.split(":") if isinstance(source, str) else []
            if not all(parts) or len(parts) not in (1, 2):
                raise ConfigError(
                    f"safety.signals.{name} is {source!r}, which says not where it is found. Use "
                    'a key of info ("cost_hazards"), a path ("constraints.hazards") or '
                    '"package.module:function".'
                )
        object.__setattr__(self, "signals", dict(sorted(self.signals.items())))

    def _take_limits(self) -> None:
        """Let the short forms say what ``limits`` say; ConfigError for an unknown name."""
        for name, value in self.limits.items():
            if name in QUANTITIES:
                object.__setattr__(self, QUANTITIES[name].limit, value)
            elif name not in self.signals:
                known = ", ".join(f'"{known}"' for known in (*QUANTITIES, *self.signals))
                raise ConfigError(
                    f'safety.limits has a limit of "{name}", but there are {known} to limit. '
                    "Correct the name, or say where this signal is found, as in "
                    f"safety.signals.{name}=cost_{name}, a key of info."
                )
            elif not 0.0 < value < math.inf:
                raise ConfigError(
                    f"safety.limits.{name} is {value}, but a finite cost per episode above 0 is "
                    "needed. Try 25."
                )
        if self.limits:
            object.__setattr__(self, "constraint", next(iter(self.limits)))

    @property
    def bounds(self) -> Mapping[str, float]:
        """Every limit, in its own unit, by the name of what is limited; the first comes first."""
        return self.limits or {self.constraint: self.limit_value}

    def each(self) -> tuple[SafetySpec, ...]:
        """The same contract with one limit alone, for each of its limits."""
        return tuple(
            replace(self, limits={} if name in QUANTITIES else {name: value}, constraint=name)
            for name, value in self.bounds.items()
        )

    @property
    def quantity(self) -> Quantity:
        """What is constrained, first of all."""
        return quantity_named(self.constraint)

    @property
    def limit_value(self) -> float:
        """The limit of what is constrained, in its own unit."""
        if self.constraint in self.limits:
            return self.limits[self.constraint]
        return self.epsilon if self.constraint == "accident" else self.cost_limit

    def limit(self, horizon: int, cost_max: float, signals_max: Mapping[str, float] = {}) -> Limit:
        """The first constraint, see :meth:`all_limits`."""
        return self.all_limits(horizon, cost_max, signals_max)[0]

    def all_limits(
        self, horizon: int, cost_max: float, signals_max: Mapping[str, float] = {}
    ) -> tuple[Limit, ...]:
        """The constraints in the critic's unit; ``cost_max`` is the largest cost of a step.

        ``signals_max`` is that of each named cost signal. Raises ConfigError for a limit of a cost
        that no episode could ever exceed.
        """
        largest = {"cost": cost_max, **signals_max}
        return tuple(
            Limit(name, value, 1.0)
            if name == "accident"
            else _cost_limit(name, value, horizon, largest[name])
            for name, value in self.bounds.items()
        )


def _cost_limit(constraint: str, value: float, horizon: int, largest: float) -> Limit:
    scale, quantity = horizon * largest, quantity_named(constraint)
    if value >= scale:
        raise ConfigError(
            f"safety.{quantity.limit} is {value:g}, but {horizon:,} steps of {quantity.event} at "
            f"most {largest:g} never exceed {scale:g}. Lower the limit."
        )
    return Limit(constraint, value / scale, scale)


@dataclass(frozen=True)
class EnvironmentConfig:
    """What the environment is: "sim", where an episode that was cut off is played again, or "real".

    In "real" nothing can be played again. An episode's steps are on record before its first one; if
    the process dies in it, it counts as lost: with all the steps that were reserved, and as an
    accident, since nobody saw whether there was one. With a ``timeout`` (seconds, of one reset or
    step) it runs in a process of its own, so that one that hangs or dies is a fault of one episode.
    """

    kind: Literal["sim", "real"] = "sim"
    timeout: float | None = None

    def __post_init__(self) -> None:
        """Refuse a timeout that nothing can keep."""
        if self.timeout is not None and not 0.0 < self.timeout < math.inf:
            raise ConfigError(
                f"env.timeout is {self.timeout}, but a number of seconds above 0 is needed. Leave "
                "it out for an environment that never hangs."
            )
