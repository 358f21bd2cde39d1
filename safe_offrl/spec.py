"""What an accident is, and how much of it is allowed: the one place that says so."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from safe_offrl.errors import ConfigError

COST_RULES = ("cost", "episode_cost")  # accident rules that look at the cost
BUILT_IN_RULES = (*COST_RULES, "terminated")
COST_SHARE_MAX = 2.0  # of cost_threshold: a larger share used tells the policy nothing more
ALARM_RANGE = 4.0  # limits: an episode that costs more than this counts as this in the alarm


class Quantity(NamedTuple):
    """What can be constrained of an episode, and how it is called and written.

    ``constraint`` is its name in settings, ``measure`` in curves and files, ``symbol`` in formulas;
    ``limit`` is what its limit is called there; ``form`` is how a value of it is written.
    """

    constraint: str
    limit: str
    limit_in_words: str
    measure: str
    symbol: str
    in_words: str
    estimated: str
    per_episode: str
    rate: str
    form: str

    def rate_of(self, accidents: int, cost: float, episodes: int, steps: float) -> float:
        """What so many episodes did, in the unit of ``rate``."""
        return 1000.0 * accidents / steps if self is ACCIDENT else cost / episodes

    def of_episode(self, accident: bool, cost: float) -> float:
        """What an episode contributes to the mean that is constrained, in its own unit."""
        return float(accident) if self is ACCIDENT else cost

    def text(self, value: float) -> str:
        """A value as a person reads it.

        >>> ACCIDENT.text(0.0312), COST.text(24.96)
        ('3.1%', '25')
        """
        return f"{value:{self.form}}"


ACCIDENT = Quantity(
    constraint="accident",
    limit="epsilon",
    limit_in_words="epsilon",
    measure="v_accident",
    symbol="V_accident",
    in_words="accident probability",
    estimated="accident probability",
    per_episode="accident probability per episode",
    rate="accidents per 1000 steps",
    form=".1%",
)
COST = Quantity(
    constraint="cost",
    limit="cost_limit",
    limit_in_words="cost limit",
    measure="expected_cost",
    symbol="expected cost",
    in_words="expected cost",
    estimated="cost per episode",
    per_episode="cost per episode",
    rate="cost per episode",
    form=".3g",
)
QUANTITIES = {quantity.constraint: quantity for quantity in (ACCIDENT, COST)}


class Limit(NamedTuple):
    """What is constrained, in the safety critic's unit: a share in [0, 1] of ``scale``.

    Of the accident probability, ``scale`` is 1 and ``share`` is epsilon. Of the expected cost,
    ``scale`` is the largest cost that an episode can have and ``share`` the limit divided by it.
    """

    constraint: str  # "accident" or "cost"
    share: float
    scale: float

    @property
    def value(self) -> float:
        """The limit in its own unit: a probability, or a cost per episode."""
        return self.share * self.scale

    @property
    def quantity(self) -> Quantity:
        """What is limited."""
        return QUANTITIES[self.constraint]

    def outcome(self, accident: bool, cost: float) -> float:
        """What an episode contributes, in [0, 1]; its mean is what is constrained."""
        return float(accident) if self.constraint == "accident" else min(cost / self.scale, 1.0)

    def worst_cost(self, logged: float) -> float:
        """What an episode counts as whose end is unknown, if a log shows that it can cost this.

        A limited cost is a share of its scale, and counts as all of it.
        """
        return self.scale if self.constraint == "cost" else logged

    def alarm(self, accident: bool, cost: float) -> tuple[float, float]:
        """(outcome in [0, 1], limit of its mean) for the alarm.

        A cost is cut off at :data:`ALARM_RANGE` limits, which can only lower its mean: evidence
        against the cut cost is evidence against the cost, and far quicker than over the full range.
        """
        if self.constraint == "accident":
            return float(accident), self.share
        return min(cost / (ALARM_RANGE * self.value), 1.0), 1.0 / ALARM_RANGE


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
    """

    accident: str = "cost"
    cost_threshold: float = 0.0
    horizon: int | None = None
    constraint: str = "accident"
    cost_limit: float = 25.0
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
        if self.constraint not in ("accident", "cost"):
            raise ConfigError(
                f'safety.constraint is "{self.constraint}", but only "accident" (below epsilon) '
                'and "cost" (expected cost per episode below cost_limit) can be constrained.'
            )
        if not 0.0 < self.cost_limit < math.inf:
            raise ConfigError(
                f"safety.cost_limit is {self.cost_limit}, but a finite cost per episode above 0 is "
                "needed. Try 25, the limit of OmniSafe's benchmarks."
            )

    def limit(self, horizon: int, cost_max: float) -> Limit:
        """The constraint in the critic's unit; ``cost_max`` is the largest cost of a step.

        Raises ConfigError for a cost limit that no episode could ever exceed.
        """
        if self.constraint == "accident":
            return Limit("accident", self.epsilon, 1.0)
        scale = horizon * cost_max
        if self.cost_limit >= scale:
            raise ConfigError(
                f"safety.cost_limit is {self.cost_limit:g}, but {horizon:,} steps of cost at most "
                f"{cost_max:g} never exceed {scale:g}. Lower the limit."
            )
        return Limit("cost", self.cost_limit / scale, scale)


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
