"""The numbers of an online phase, as curves and in the progress line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from safe_offrl.safety.monitor import SafetyMonitor
from safe_offrl.types import Episode

LOG_EVERY = 250  # environment steps between two points of a curve: a few hundred points a run


class OnlineCurves:
    """The numbers of the online phase, from its monitor, the ledger and the decisions alone.

    It keeps nothing that cannot be recomputed from the run folder, so a resumed run goes on with
    exactly the same curves.
    """

    def __init__(self, monitors: Sequence[SafetyMonitor], budget: int) -> None:
        """``monitors`` are the run's own, one a limit; nothing else updates them."""
        self._monitor, *self._further = monitors
        monitor = self._monitor
        self._limit = monitor.limit
        self._budget = budget
        self._returns: list[float] = []
        self._costs: list[float] = []
        self._steps: list[tuple[int, int]] = []  # of an episode: those of the guard's fallback, all
        self._iteration: dict[str, Any] = {}
        self._iterations = 0
        self._accepted = 0
        self.step = 0

    def restore(self, episodes: Sequence[Episode], iterations: Sequence[dict[str, Any]]) -> None:
        """Take in everything that happened before a resume."""
        for episode in episodes:
            self.add_episode(episode)
        for iteration in iterations:
            self.add_iteration(iteration)

    def add_episode(self, episode: Episode) -> bool:
        """Take in an episode that the monitor has counted; whether a point of the curves is due."""
        before, self.step = self.step, episode.total_steps
        if episode.outcome == "complete":  # Nobody knows what another would have brought.
            self._returns.append(episode.episode_return)
        self._costs.append(episode.cost)
        self._steps.append((episode.guarded_steps, episode.steps))
        return before // LOG_EVERY != self.step // LOG_EVERY

    def add_iteration(self, iteration: dict[str, Any]) -> None:
        """Take in one decision of the acceptance step (a line of iterations.jsonl)."""
        self._iteration = iteration
        self._iterations += 1
        self._accepted += bool(iteration["accepted"])

    def _decision(self, key: str) -> float:
        value = self._iteration.get(key)
        return math.nan if value is None else float(value)

    @property
    def recent_return(self) -> float:
        """Mean return of the last 50 complete episodes; NaN before the first."""
        return _mean(self._returns[-50:])

    @property
    def recent_cost(self) -> float:
        """Mean cost of the last 10 episodes."""
        return _mean(self._costs[-10:])

    @property
    def recent_guarded(self) -> float:
        """Share of the steps of the last 10 episodes in which the guard's fallback acted."""
        recent = self._steps[-10:]
        return sum(guarded for guarded, _ in recent) / max(1, sum(steps for _, steps in recent))

    @property
    def estimate(self) -> float:
        """Estimate of the deployed policy: of the one that took its place, else of the old one."""
        return self._estimate(self._iteration)

    def _estimate(self, line: Mapping[str, Any]) -> float:
        """The same of one limit's part of the last decision."""
        replaced = self._iteration.get("accepted") or self._iteration.get("rolled_back")
        value = line.get("v_candidate" if replaced else "v_previous")
        return math.nan if value is None else float(value)

    def values(self) -> dict[str, float]:
        """One point of every curve that moves with the episodes."""
        monitor = self._monitor
        low, high = monitor.accident_rate_bounds
        further = {
            f"safety/alarm_log_evidence/{other.limit.constraint}": other.log_evidence
            for other in self._further
        }
        for other in (monitor, *self._further):
            name, quantity = other.limit.constraint, other.limit.quantity
            if name != "accident":
                further[f"safety/{name}_mean_lower"] = other.lower_mean * other.limit.scale
                further[f"safety/{name}_mean_upper"] = other.upper_mean * other.limit.scale
            if quantity.signal:
                further[f"safety/{name}_mean"] = other.mean * other.limit.scale
            limit = f"{name}_limit" if quantity.signal else quantity.limit
            further[f"safety/{limit}"] = other.limit.value
        return {
            "safety/accident_rate": monitor.accident_rate,
            "safety/accident_rate_lower": low,
            "safety/accident_rate_upper": high,
            "safety/accidents_total": float(monitor.accidents),
            "safety/cost_mean": monitor.cost_mean,
            "safety/cost_recent": self.recent_cost,
            "safety/guarded_share": self.recent_guarded,
            **further,
            "safety/alarm_log_evidence": monitor.log_evidence,
            "online/return": self.recent_return,
            "budget/spent": self.step / self._budget,
        }

    def trust(self) -> dict[str, float]:
        """Estimate of the policy that acts from here on, and share of accepted candidates."""
        further = {
            f"safety/{other.limit.quantity.measure}_estimate": self._estimate(line)
            for other, line in zip(self._further, self._iteration.get("further", []), strict=True)
        }
        return {
            f"safety/{self._limit.quantity.measure}_estimate": self.estimate,
            **further,
            "trust/accepted": self._accepted / self._iterations,
        }

    def line(self) -> str:
        """The progress line, without the step count and the remaining time."""
        monitor, limit = self._monitor, self._limit
        if limit.constraint == "accident":
            parts = [
                f"accidents {monitor.accidents}",
                f"rate {monitor.accident_rate:.3f} (<= {monitor.upper_mean:.3f})",
            ]
            estimate = f"V_acc {self.estimate:.3f}"
        else:
            mean, recent = monitor.cost_mean, self.recent_cost
            if limit.quantity.signal:
                mean, recent = monitor.mean * limit.scale, monitor.recent_mean * limit.scale
            parts = [
                f"{limit.quantity.event} {mean:.1f} an episode",
                f"last 10: {recent:.1f} (limit {limit.value:g})",
                f"accidents {monitor.accidents} of {monitor.episodes}",
            ]
            estimate = f"estimate {self.estimate:.1f}"
        if self.recent_guarded:
            parts.append(f"guard in {100 * self.recent_guarded:.1f} % of the steps")
        parts.append(f"return {self.recent_return:.2f}")
        if not math.isnan(self.estimate):
            kl = max(self._decision("kl_forward_mean"), self._decision("kl_reverse_mean"))
            parts += [
                f"{self._iteration.get('divergence', 'KL')} {kl:.4f}",
                estimate,
                *self._further_estimates(),
                f"accepted {100 * self._accepted / self._iterations:.0f} %",
            ]
        return " | ".join(parts)

    def _further_estimates(self) -> list[str]:
        """Of each limit behind the first."""
        return [
            f"{quantity.short_name} {self._estimate(line):{quantity.estimate_form}}"
            for quantity, line in zip(
                (monitor.limit.quantity for monitor in self._further),
                self._iteration.get("further", []),
                strict=True,
            )
        ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
