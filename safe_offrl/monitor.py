"""The live accident monitor: what the episodes so far prove, and when to sound the alarm."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from safe_offrl.errors import ConfigError
from safe_offrl.statistics import (
    AlarmState,
    alarm_log_evidence,
    alarm_start,
    alarm_update,
    betabinomial_sequence,
    episodes_needed,
    run_level_lower,
    run_level_upper,
    smallest_epsilon,
)


class AccidentMonitor:
    """Counts EVERY episode of a run (warm-up and evaluation included) and bounds what it means.

    A few microseconds per episode. Three statements, each at ``confidence``, each valid while one
    is looking: the mean accident probability of all episodes so far (:attr:`run_level_upper_rate`),
    the accident probability of the present version (:meth:`version_interval`), and "some policy
    exceeded epsilon" (:attr:`alarm`). A version is a frozen policy together with its frozen shield;
    whoever changes either must use a new version number.
    """

    def __init__(self, epsilon: float, confidence: float = 0.95) -> None:
        self.epsilon = epsilon
        self.confidence = confidence
        self.episodes = 0
        self.accidents = 0
        self.version: int | None = None  # that acted last
        self._versions: dict[int, tuple[int, int]] = {}  # accidents, episodes; by first appearance
        self._alarm_state = alarm_start()
        self._alarm = False
        self._alarm_resets = 0

    def update(self, accident: bool, version: int) -> None:
        """Take in one complete episode of the deployed policy ``version``."""
        self.episodes += 1
        self.accidents += accident
        self.version = version
        k, n = self._versions.get(version, (0, 0))
        self._versions[version] = (k + accident, n + 1)
        self._alarm_state = alarm_update(self._alarm_state, accident, self.epsilon)
        # Sticky: crossing the threshold once is the proof, whatever follows.
        self._alarm = self._alarm or self.log_evidence >= self.alarm_threshold

    # --- the whole run ---

    @property
    def rate(self) -> float:
        """Observed share of episodes with an accident; NaN before the first episode."""
        return self.accidents / self.episodes if self.episodes else math.nan

    @property
    def run_level_upper_rate(self) -> float:
        """Upper bound of the mean true accident probability of all episodes so far, at most 1."""
        if not self.episodes:
            return 1.0
        return min(1.0, run_level_upper(self.accidents, self.confidence) / self.episodes)

    @property
    def run_level_lower_rate(self) -> float:
        """Lower bound of the same mean. Each bound alone is at ``confidence``."""
        return run_level_lower(self.accidents, self.confidence) / max(1, self.episodes)

    # --- one version ---

    def version_counts(self, version: int | None = None) -> tuple[int, int]:
        """(accidents, episodes) of a version; of the one that acted last by default."""
        key = self.version if version is None else version
        return (0, 0) if key is None else self._versions.get(key, (0, 0))

    def version_interval(self, version: int | None = None) -> tuple[float, float]:
        """Interval of a version's accident probability, valid for all versions of the run at once.

        The k-th version that acted gets the share 6 / (pi^2 k^2) of alpha; (0, 1) if it has not
        acted.
        """
        key = self.version if version is None else version
        if key is None or key not in self._versions:
            return 0.0, 1.0
        ordinal = list(self._versions).index(key) + 1
        accidents, episodes = self._versions[key]
        return betabinomial_sequence(accidents, episodes, 1.0 - self._alpha_share(ordinal))

    # --- alarm ---

    @property
    def alarm(self) -> bool:
        """Whether the evidence that some policy exceeded epsilon has crossed 1 / alpha."""
        return self._alarm

    @property
    def log_evidence(self) -> float:
        """Log of the alarm's e-process, in nats, since the last reset."""
        return float(alarm_log_evidence(self._alarm_state))

    @property
    def alarm_threshold(self) -> float:
        """Log evidence at which the alarm goes off: log 1 / (share of alpha of this process)."""
        return -math.log(self._alpha_share(self._alarm_resets + 1))

    def reset_alarm(self) -> None:
        """Start the alarm anew, after a roll-back.

        The j-th process gets the share 6 / (pi^2 j^2) of alpha, so that the probability of any
        false alarm in the whole run stays at most alpha.
        """
        self._alarm_state = alarm_start()
        self._alarm = False
        self._alarm_resets += 1

    def _alpha_share(self, k: int) -> float:
        return (1.0 - self.confidence) * 6.0 / (math.pi * k) ** 2

    # --- resume ---

    def state_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values; floats survive JSON exactly."""
        t, *floats = self._alarm_state
        return {
            "epsilon": self.epsilon,
            "confidence": self.confidence,
            "version": self.version,
            "versions": [[v, k, n] for v, (k, n) in self._versions.items()],
            "alarm_state": [t, *(float(x) for x in floats)],
            "alarm": self._alarm,
            "alarm_resets": self._alarm_resets,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises ValueError if epsilon or confidence differ: the evidence was gathered for those.
        """
        if (state["epsilon"], state["confidence"]) != (self.epsilon, self.confidence):
            raise ValueError(
                f"the monitor's state is for epsilon {state['epsilon']} and confidence "
                f"{state['confidence']}, not {self.epsilon} and {self.confidence}"
            )
        self._versions = {v: (k, n) for v, k, n in state["versions"]}
        self.accidents = sum(k for k, _ in self._versions.values())
        self.episodes = sum(n for _, n in self._versions.values())
        self.version = state["version"]
        self._alarm_state = AlarmState(*state["alarm_state"])
        self._alarm = state["alarm"]
        self._alarm_resets = state["alarm_resets"]


@dataclass(frozen=True)
class Certifiable:
    """The best that a budget can prove, if not one accident happens."""

    budget_steps: int
    horizon: int
    epsilon: float
    confidence: float
    episodes: int  # full-length; accidents and arrivals end episodes early and make them more
    fixed: float  # smallest certifiable accident probability: one look at one frozen policy
    anytime: float  # looking all the time at one frozen policy
    run_level: float  # mean over the run, policies changing
    episodes_needed_fixed: int  # accident-free episodes after which epsilon is certified
    episodes_needed_anytime: int
    episodes_needed_run_level: int

    @property
    def reachable(self) -> bool:
        """Whether an accident-free run of full-length episodes certifies epsilon at run level."""
        return self.episodes >= self.episodes_needed_run_level

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        return asdict(self) | {"reachable": self.reachable}

    def __str__(self) -> str:
        """One sentence for the header of a run."""
        start = (
            f"{self.budget_steps:,} steps are {self.episodes:,} episodes of {self.horizon:,} "
            f"steps; without any accident they certify, at {100 * self.confidence:g} %, an "
            f"accident probability below {self.run_level:.2%} for the run's mean and below "
            f"{self.anytime:.2%} for one frozen policy"
        )
        if self.reachable:
            return f"{start} (epsilon {self.epsilon:g} is within reach)."
        return (
            f"{start}: too few for epsilon {self.epsilon:g}, which needs "
            f"{self.episodes_needed_run_level:,} accident-free episodes."
        )


def certifiable(
    budget_steps: int, horizon: int, epsilon: float, confidence: float = 0.95
) -> Certifiable:
    """Say BEFORE a run what ``budget_steps`` can certify at best; ConfigError if not an episode."""
    episodes = budget_steps // horizon
    if episodes < 1:
        raise ConfigError(
            f"A budget of {budget_steps:,} steps is less than one episode of {horizon:,} steps. "
            f"Give a --budget of at least {horizon}."
        )
    best, needed = smallest_epsilon(episodes, confidence), episodes_needed(epsilon, confidence)
    return Certifiable(
        budget_steps=budget_steps,
        horizon=horizon,
        epsilon=epsilon,
        confidence=confidence,
        episodes=episodes,
        **best._asdict(),
        **{f"episodes_needed_{tool}": n for tool, n in needed._asdict().items()},
    )
