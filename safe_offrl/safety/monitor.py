"""The live safety monitor: what the episodes so far prove, and when to sound the alarm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from safe_offrl.errors import ConfigError
from safe_offrl.limits import Limit
from safe_offrl.stats.anytime import (
    AlarmState,
    alarm_log_evidence,
    alarm_start,
    alarm_update,
    betabinomial_sequence,
    run_level_lower,
    run_level_upper,
)
from safe_offrl.stats.fixed import episodes_needed, error_share, smallest_epsilon


class SafetyMonitor:
    """Counts EVERY episode of a run (warm-up and evaluation included) and bounds what it means.

    A few microseconds per episode. Three statements, each at ``confidence``, each valid while one
    is looking: the mean over all episodes so far (:attr:`upper_mean`), that of the present version
    (:meth:`version_interval`), and "some policy exceeded the limit" (:attr:`alarm`). Each speaks of
    what ``limit`` constrains: the accident probability, or the expected cost as a share of the
    largest cost an episode can have. The tools were made for accidents, 0 or 1, and hold for any
    outcome in [0, 1]: their factors are convex in the outcome, so 0 and 1 are the worst case. A
    version is a frozen policy together with its frozen shield; whoever changes either must use a
    new version number.
    """

    def __init__(self, limit: Limit, confidence: float = 0.95) -> None:
        self.limit = limit
        self.confidence = confidence
        self.episodes = 0
        self.accidents = 0
        self.cost = 0.0
        self.total = 0.0  # sum of the outcomes
        self.recent: list[float] = []  # outcomes of the latest episodes
        self.version: int | None = None  # that acted last
        self._versions: dict[int, tuple[float, int]] = {}  # outcomes, episodes; by appearance
        self._alarm_state = alarm_start()
        self._alarm = False
        self._alarm_resets = 0

    def update(
        self, accident: bool, cost: float, version: int, signal_costs: Mapping[str, float] = {}
    ) -> None:
        """Take in one complete episode of the deployed policy ``version``.

        ``cost`` is its sum, and ``signal_costs`` are those of the named cost signals.
        """
        limited = self.limit.quantity.cost_of(cost, signal_costs)
        outcome = self.limit.outcome(accident, limited)
        self.episodes += 1
        self.accidents += accident
        self.cost += cost
        self.total += outcome
        self.recent = [*self.recent, outcome][-self.limit.quantity.recent_episodes :]
        self.version = version
        k, n = self._versions.get(version, (0.0, 0))
        self._versions[version] = (k + outcome, n + 1)
        alarming, limit = self.limit.alarm(accident, limited)
        self._alarm_state = alarm_update(self._alarm_state, alarming, limit)
        # The alarm is sticky: crossing the threshold once is the proof, whatever follows.
        self._alarm = self._alarm or self.log_evidence >= self.alarm_threshold

    # --- the whole run ---

    @property
    def accident_rate(self) -> float:
        """Observed share of episodes with an accident; NaN before the first episode."""
        return self.accidents / self.episodes if self.episodes else math.nan

    @property
    def cost_mean(self) -> float:
        """Observed cost per episode; NaN before the first episode."""
        return self.cost / self.episodes if self.episodes else math.nan

    @property
    def accident_rate_bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the mean true accident probability, whatever is limited."""
        low = run_level_lower(self.accidents, self.confidence) / max(1, self.episodes)
        high = run_level_upper(self.accidents, self.confidence) / max(1, self.episodes)
        return low, min(1.0, high)

    @property
    def upper_mean(self) -> float:
        """Upper bound of the mean true expectation of all episodes so far, at most 1."""
        if not self.episodes:
            return 1.0
        return min(1.0, run_level_upper(self.total, self.confidence) / self.episodes)

    @property
    def lower_mean(self) -> float:
        """Lower bound of the same mean. Each bound alone is at ``confidence``."""
        return run_level_lower(self.total, self.confidence) / max(1, self.episodes)

    @property
    def mean(self) -> float:
        """Mean outcome of all episodes, NaN before the first."""
        return self.total / self.episodes if self.episodes else math.nan

    @property
    def recent_mean(self) -> float:
        """Mean outcome of the latest episodes, at least one."""
        return sum(self.recent) / len(self.recent)

    # --- one version ---

    def version_interval(self, version: int | None = None) -> tuple[float, float]:
        """Interval of a version's expected outcome, valid for all versions of the run at once.

        The k-th version that acted gets its :func:`error_share`; (0, 1) if it has not acted.
        """
        key = self.version if version is None else version
        if key is None or key not in self._versions:
            return 0.0, 1.0
        ordinal = list(self._versions).index(key) + 1
        total, episodes = self._versions[key]
        share = error_share(self.confidence, ordinal)
        return betabinomial_sequence(total, episodes, 1.0 - share)

    # --- alarm ---

    @property
    def alarm(self) -> bool:
        """Whether the evidence that some policy exceeded the limit has crossed 1 / alpha."""
        return self._alarm

    @property
    def log_evidence(self) -> float:
        """Log of the alarm's e-process, in nats, since the last reset."""
        return float(alarm_log_evidence(self._alarm_state))

    @property
    def alarm_threshold(self) -> float:
        """Log evidence at which the alarm goes off: log 1 / (share of alpha of this process)."""
        return -math.log(error_share(self.confidence, self._alarm_resets + 1))

    def reset_alarm(self) -> None:
        """Start the alarm anew, after a roll-back.

        The j-th process gets its :func:`error_share`, so that the probability of any false alarm
        in the whole run stays at most alpha.
        """
        self._alarm_state = alarm_start()
        self._alarm = False
        self._alarm_resets += 1

    # --- resume ---

    def state_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values; floats survive JSON exactly."""
        t, *floats = self._alarm_state
        return {
            "limit": list(self.limit),
            "confidence": self.confidence,
            "accidents": self.accidents,
            "cost": self.cost,
            "version": self.version,
            "versions": [[v, k, n] for v, (k, n) in self._versions.items()],
            "alarm_state": [t, *(float(x) for x in floats)],
            "alarm": self._alarm,
            "alarm_resets": self._alarm_resets,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises ValueError if limit or confidence differ: the evidence was gathered for those.
        """
        if (state["limit"], state["confidence"]) != (list(self.limit), self.confidence):
            raise ValueError(
                f"the monitor's state is for the limit {state['limit']} and confidence "
                f"{state['confidence']}, not {list(self.limit)} and {self.confidence}"
            )
        self._versions = {v: (k, n) for v, k, n in state["versions"]}
        self.accidents = state["accidents"]
        self.cost = state["cost"]
        self.total = sum(k for k, _ in self._versions.values())
        self.episodes = sum(n for _, n in self._versions.values())
        self.version = state["version"]
        self._alarm_state = AlarmState(*state["alarm_state"])
        self._alarm = state["alarm"]
        self._alarm_resets = state["alarm_resets"]


def allowance(limit: Limit, confidence: float, episodes: int) -> int | None:
    """How many of the first ``episodes`` may count fully against a limit before the alarm sounds.

    They are evenly spread, the others count nothing. None if all of them may.
    """

    def sounds(bad: int) -> bool:
        state, share = alarm_start(), limit.alarm(True, math.inf)[1]
        for i in range(episodes):
            is_bad = (i + 1) * bad // episodes > i * bad // episodes
            state = alarm_update(state, float(is_bad), share)
            if alarm_log_evidence(state) >= -math.log(error_share(confidence, 1)):
                return True
        return False

    enough = next((bad for bad in range(1, episodes + 1) if sounds(bad)), None)
    return None if enough is None else enough - 1


@dataclass(frozen=True)
class Certifiable:
    """The best that a budget can prove, if no accident happens and no cost is incurred.

    ``fixed``, ``anytime`` and ``run_level`` are in the unit of what is constrained: a probability,
    or a cost per episode. One frozen policy is the first version of a run, or the first attempt of
    ``certify``: it has the first :func:`error_share`. Later ones have less, and prove less.
    """

    budget_steps: int
    horizon: int
    limit: Limit
    confidence: float
    episodes: int  # full-length; accidents and arrivals end episodes early and make them more
    fixed: float  # smallest certifiable value: one look at one frozen policy
    anytime: float  # looking all the time at one frozen policy
    run_level: float  # mean over the run, policies changing
    episodes_needed_fixed: int  # accident-free episodes after which the limit is certified
    episodes_needed_anytime: int
    episodes_needed_run_level: int

    @property
    def reachable(self) -> bool:
        """Whether a run of full-length episodes without accident certifies the limit."""
        return self.episodes >= self.episodes_needed_run_level

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return asdict(self) | {"limit": self.limit._asdict(), "reachable": self.reachable}

    def __str__(self) -> str:
        """One sentence for the header of a run."""
        start = (
            f"{self.budget_steps:,} steps are {self.episodes:,} episodes of {self.horizon:,} "
            "steps; without any "
        )
        quantity = self.limit.quantity
        start += (
            f"{quantity.event} they certify, at {100 * self.confidence:g} %, an "
            f"{quantity.in_words} below {quantity.precise(self.run_level)} for the run's mean and "
            f"below {quantity.precise(self.anytime)} for one frozen policy"
        )
        limit = quantity.limit_text(self.limit.value)
        if self.reachable:
            return f"{start} ({limit} is within reach)."
        return (
            f"{start}: too few for {limit}, which needs {self.episodes_needed_run_level:,} "
            f"{quantity.event}-free episodes."
        )


def certifiable(
    budget_steps: int, horizon: int, limit: Limit, confidence: float = 0.95
) -> Certifiable:
    """Say BEFORE a run what ``budget_steps`` can certify at best; ConfigError if not an episode."""
    episodes = budget_steps // horizon
    if episodes < 1:
        raise ConfigError(
            f"A budget of {budget_steps:,} steps is less than one episode of {horizon:,} steps. "
            f"Give a --budget of at least {horizon}."
        )
    first = 1.0 - error_share(confidence, 1)
    run_level = smallest_epsilon(episodes, confidence).run_level
    best = smallest_epsilon(episodes, first)._replace(run_level=run_level)
    run_level_needed = episodes_needed(limit.share, confidence).run_level
    needed = episodes_needed(limit.share, first)._replace(run_level=run_level_needed)
    return Certifiable(
        budget_steps=budget_steps,
        horizon=horizon,
        limit=limit,
        confidence=confidence,
        episodes=episodes,
        **{tool: value * limit.scale for tool, value in best._asdict().items()},
        **{f"episodes_needed_{tool}": n for tool, n in needed._asdict().items()},
    )
