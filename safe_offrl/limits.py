"""What can be limited of an episode, and a limit of it: words and numbers, in one place.

A class a quantity: how it is called, counted, steered and watched. ``constraint`` is its name in
settings, ``measure`` in curves and files, ``symbol`` in formulas, ``limit`` what a limit is called
there; ``signal`` is the named cost signal that it is of, "" of none, and ``cost`` what episodes
cost beside their accidents; ``form`` is how a value of it is written, ``estimate_form`` what the
safety critic makes of it; other words stand in sentences and on charts. Of the policy that acts,
``recent_episodes`` are those that say what it really does now. ``pretraining`` and ``finetuning``
are settings that the phases begin with where others are not given.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from safe_offrl.errors import ConfigError

if TYPE_CHECKING:  # which imports torch, and a limit is read without it
    from safe_offrl.types import Episode

Outcome = TypeVar("Outcome")

ALARM_RANGE = 4.0  # limits: an episode that costs more than this counts as this in the alarm


class AccidentProbability:
    """V_accident(s0), the probability of at least one accident within the horizon."""

    constraint = "accident"
    signal = ""
    cost, inside = "cost", ""
    event = "accident"
    limit = "epsilon"
    limit_in_words = "epsilon"
    measure = "v_accident"
    symbol = "V_accident"
    in_words = "accident probability"
    estimated = "accident probability"
    per_episode = "accident probability per episode"
    rate = "accidents per 1000 steps"
    short_name = "V_accident"
    claimed = "P(accident in an episode)"
    happened = "have an accident"
    evidence = "an accident"
    risk = "accidents"
    interval = "95 % interval"
    evaluated = "evaluated accident rate, with interval"
    bound = "epsilon"
    until_accident = True  # behind an accident nothing can change whether there was one
    form = ".1%"
    estimate_form = ".3f"
    recent_episodes = 100  # one accident says little
    pretraining: Mapping[str, Any] = {}
    finetuning: Mapping[str, Any] = {}

    def text(self, value: float) -> str:
        """A share as a percentage.

        >>> ACCIDENT.text(0.0312)
        '3.1%'
        """
        return f"{value:{self.form}}"

    def precise(self, value: float) -> str:
        """A share as a percentage with two decimals."""
        return f"{value:.2%}"

    def limit_text(self, value: float) -> str:
        """Epsilon and its value."""
        return f"epsilon {value:g}"

    def promise(self, limit: float, horizon: int) -> str:
        """A probability of an accident below epsilon."""
        return f"P(accident in {horizon} steps) < {limit:g} (epsilon)"

    def rate_of(self, accidents: int, cost: float, episodes: int, steps: float) -> float:
        """What so many episodes did: accidents per 1000 steps."""
        return 1000.0 * accidents / steps

    def select(self, accident: Outcome, cost: Outcome) -> Outcome:
        """What is constrained, of an episode, of a step, or of many: the accident."""
        return accident

    def cost_of(self, cost: float, signal_costs: Mapping[str, float]) -> float:
        """The cost beside the accident: the environment's own."""
        return cost

    def of_episode(self, episode: Episode) -> float:
        """What is constrained of an episode: 1 if it had an accident."""
        return float(episode.accident)

    def seen(self, recent: Sequence[float]) -> float:
        """What recent outcomes show, [m >= 1] in [0, 1]; no estimate is lower."""
        return sum(recent) / len(recent)

    def alarm(self, accident: bool, cost: float, limit: float) -> tuple[float, float]:
        """(outcome, limit of its mean) for the alarm: the accident itself, against epsilon."""
        return float(accident), limit

    def alarming(self, limit: float) -> str:
        """An episode that counts fully for the alarm, in words."""
        return "with an accident"

    def worst_cost(self, scale: float, logged: float) -> float:
        """What an episode counts as whose end is unknown: what the log shows to be possible."""
        return logged


class ExpectedCost:
    """The expected undiscounted cost of an episode (the CMDP of OmniSafe and DSRL).

    Of the environment's own cost, or of one of its named signals.
    """

    until_accident = False
    form = ".3g"
    estimate_form = ".1f"
    recent_episodes = 10  # one cost says more than one accident
    # An action changes the cost rate ahead by a hundredth where it changes an accident's
    # probability by a tenth, so lambda must be larger; and where cost has to be left behind rather
    # than kept away from, only relative risk can teach the way out.
    pretraining: Mapping[str, Any] = {
        "critic": {"target_gap": 0.005, "weight_decay": 0.1},
        "lagrangian": {"init": 100.0, "maximum": 300.0},
        "extraction": {"relative_risk": True, "risk_aversion": 100.0},
    }
    # Offline a slow target keeps the critic close to what the log's own behaviours cost, which no
    # blind spot can talk down; online it is checked against every episode, and a slow target would
    # only delay what they say.
    finetuning: Mapping[str, Any] = {
        "critic": {"tau": 0.05, "weight_decay": 0.1},
        "lagrangian": {"maximum": 300.0, "learning_rate": 0.03},
        "baseline": {"pid": {"proportional": 0.3, "integral": 0.03, "derivative": 0.3}},
    }

    def __init__(self, signal: str = "") -> None:
        """The words of the cost of ``signal``, "" of the environment's own."""
        cost, inside = (f"{signal} cost", f" in {signal}") if signal else ("cost", "")
        self.signal, self.cost, self.inside = signal, cost, inside
        self.constraint = signal or "cost"
        self.event = cost
        self.limit = f"limits.{signal}" if signal else "cost_limit"
        self.limit_in_words = f"{signal or 'cost'} limit"
        self.measure = f"expected_{self.constraint}"
        self.symbol = self.in_words = f"expected {cost}"
        self.estimated = self.per_episode = self.rate = f"{cost} per episode"
        self.short_name = self.constraint
        self.claimed = f"expected {cost} of an episode"
        self.happened = f"cost more than {{limit:g}}{inside}"
        self.evidence = f"any {cost}" if signal else "an accident or a cost"
        self.risk = f"{cost} rate (share of the largest)"
        self.interval = "2 standard errors"
        self.evaluated = f"evaluated {cost}, 2 standard errors"
        self.bound = "limit"

    def text(self, value: float) -> str:
        """A cost to three digits.

        >>> COST.text(24.96)
        '25'
        """
        return f"{value:{self.form}}"

    def precise(self, value: float) -> str:
        """A cost per episode to three digits."""
        return f"{value:.3g} per episode"

    def limit_text(self, value: float) -> str:
        """The cost limit and its value."""
        return f"the {self.limit_in_words} of {value:g}"

    def promise(self, limit: float, horizon: int) -> str:
        """An expected cost below its limit."""
        return f"{self.in_words} of {horizon} steps < {limit:g} ({self.limit})"

    def rate_of(self, accidents: int, cost: float, episodes: int, steps: float) -> float:
        """What so many episodes did: cost per episode."""
        return cost / episodes

    def select(self, accident: Outcome, cost: Outcome) -> Outcome:
        """What is constrained, of an episode, of a step, or of many: the cost."""
        return cost

    def cost_of(self, cost: float, signal_costs: Mapping[str, float]) -> float:
        """Of what an episode cost, in all and by its signals, what is constrained.

        ConfigError if nothing is known of the signal.
        """
        if not self.signal:
            return cost
        if self.signal not in signal_costs:
            raise ConfigError(
                f'An episode\'s record does not say what it cost in "{self.signal}", which is '
                "limited. Restore the record, or leave this run out."
            )
        return signal_costs[self.signal]

    def of_episode(self, episode: Episode) -> float:
        """What is constrained of an episode: what it cost."""
        return self.cost_of(episode.cost, episode.signal_costs)

    def seen(self, recent: Sequence[float]) -> float:
        """What recent outcomes show: the mean less a standard error; 0 of one alone.

        One episode that was stuck in a hazard can cost more than the limits of ten; taken at its
        word it would hold every estimate above the limit, and lambda rising, for as long as it is
        among the recent ones.
        """
        if len(recent) < 2:
            return 0.0
        error = statistics.stdev(recent) / math.sqrt(len(recent))
        return max(sum(recent) / len(recent) - error, 0.0)

    def alarm(self, accident: bool, cost: float, limit: float) -> tuple[float, float]:
        """(outcome, limit of its mean) for the alarm: the cost as a share of ALARM_RANGE limits.

        It is cut off there, which can only lower its mean: evidence against the cut cost is
        evidence against the cost, and far quicker than over the full range.
        """
        return min(cost / (ALARM_RANGE * limit), 1.0), 1.0 / ALARM_RANGE

    def alarming(self, limit: float) -> str:
        """An episode that counts fully for the alarm, in words."""
        return f"that cost {ALARM_RANGE * limit:g} or more{self.inside}"

    def worst_cost(self, scale: float, logged: float) -> float:
        """What an episode counts as whose end is unknown: all that it can cost."""
        return scale


ACCIDENT = AccidentProbability()
COST = ExpectedCost()
Quantity = AccidentProbability | ExpectedCost
QUANTITIES: Mapping[str, Quantity] = {"accident": ACCIDENT, "cost": COST}


@functools.cache
def quantity_named(name: str) -> Quantity:
    """What a limit of this name is of: an accident, the cost, or else the named cost signal.

    ConfigError for what is no name. Of one name there is one object.

    >>> quantity_named("hazards").limit_text(25.0)
    'the hazards limit of 25'
    """
    if name in QUANTITIES:
        return QUANTITIES[name]
    if not (isinstance(name, str) and name.isidentifier() and name.isascii()):
        raise ConfigError(f"A limit of {name!r} means nothing. Give the name of a cost signal.")
    return ExpectedCost(name)


class Limit(NamedTuple):
    """What is constrained, in the safety critic's unit: a share in [0, 1] of ``scale``.

    Of the accident probability, ``scale`` is 1 and ``share`` is epsilon. Of the expected cost,
    ``scale`` is the largest cost that an episode can have and ``share`` the limit divided by it.
    """

    constraint: str  # "accident", "cost" or the name of a cost signal
    share: float
    scale: float

    @property
    def value(self) -> float:
        """The limit in its own unit: a probability, or a cost per episode."""
        return self.share * self.scale

    @property
    def quantity(self) -> Quantity:
        """What is limited."""
        return quantity_named(self.constraint)

    def outcome(self, accident: bool, cost: float) -> float:
        """What an episode contributes, in [0, 1]; its mean is what is constrained.

        ``cost`` here and below is that of the quantity: of the signal, if it is one's.
        """
        return min(self.quantity.select(float(accident), cost) / self.scale, 1.0)

    def outcome_of(self, episode: Episode) -> float:
        """The same of an episode on record."""
        return min(self.quantity.of_episode(episode) / self.scale, 1.0)

    def alarm(self, accident: bool, cost: float) -> tuple[float, float]:
        """(outcome in [0, 1], limit of its mean) of an episode for the alarm."""
        return self.quantity.alarm(accident, cost, self.value)

    def worst_cost(self, logged: float) -> float:
        """What an episode counts as whose end is unknown, if a log shows that it can cost this."""
        return self.quantity.worst_cost(self.scale, logged)
