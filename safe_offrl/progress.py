"""What a person sees of a running loop, and how a person stops it."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from tqdm import tqdm

from safe_offrl.monitor import SafetyMonitor
from safe_offrl.safety import Limit
from safe_offrl.types import Episode

Say = Callable[[str], None]
LOG_EVERY = 250  # environment steps between two points of a curve: a few hundred points a run


class Interrupted(Exception):
    """A signal stopped the run after everything was saved; the message says how to continue."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopSignal:
    """While active, SIGINT and SIGTERM set :attr:`number`; a second signal ends the process now.

    Ending at once loses nothing: every file of a run is whole at every moment.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.since = math.inf
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        self.since = time.monotonic()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # else Python forbids handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class ProgressLine:
    """One line that a person can read: redrawn on a terminal, printed ~20 times otherwise."""

    def __init__(
        self, total: int, start: int = 0, say: Say | None = None, unit: str = "steps"
    ) -> None:
        """``total`` and ``start`` in ``unit``; ``say`` replaces the terminal."""
        self._total = total
        self._unit = unit
        self._first = self._last = start
        self._begin = time.monotonic()
        self._say = say or (lambda text: print(text, flush=True))
        self._bar: tqdm[Any] | None = None
        if say is None and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, bar_format="{desc}", leave=True)

    def update(self, step: int, text: str) -> None:
        """Show ``text`` for ``step``; on a terminal always, else at every twentieth of the run."""
        line = f"{step:,}/{self._total:,} {self._unit} | {text} | {self._remaining(step)}"
        if self._bar is not None:
            self._bar.set_description_str(line)
        elif step * 20 // self._total > self._last * 20 // self._total or step >= self._total:
            self._say(line)
        self._last = step

    def _remaining(self, step: int) -> str:
        done = step - self._first
        if done <= 0:
            return "ETA ?"
        seconds = (time.monotonic() - self._begin) / done * max(0, self._total - step)
        return f"ETA {int(seconds) // 60}:{int(seconds) % 60:02d}"

    def close(self) -> None:
        """Leave the line on the screen."""
        if self._bar is not None:
            self._bar.close()


class OnlineCurves:
    """The numbers of the online phase, from the ledger and the decisions alone.

    It keeps nothing that cannot be recomputed from the run folder, so a resumed run goes on with
    exactly the same curves.
    """

    def __init__(self, limit: Limit, confidence: float, budget: int) -> None:
        self._limit = limit
        self._budget = budget
        self._monitor = SafetyMonitor(limit, confidence)
        self._returns: list[float] = []
        self._costs: list[float] = []
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
        """Count an episode; returns whether a point of the curves is due."""
        before, self.step = self.step, episode.total_steps
        self._monitor.update(episode.accident, episode.cost, episode.version)
        if episode.outcome == "complete":  # nobody knows what another would have brought
            self._returns.append(episode.episode_return)
        self._costs.append(episode.cost)
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
    def estimate(self) -> float:
        """Estimate of the deployed policy: of the one that took its place, else of the old one."""
        last = self._iteration
        replaced = last.get("accepted") or last.get("rolled_back")
        return self._decision("v_candidate" if replaced else "v_previous")

    def values(self) -> dict[str, float]:
        """One point of every curve that moves with the episodes."""
        monitor, scale = self._monitor, self._limit.scale
        low, high = monitor.accident_rate_bounds
        cost_bounds = {
            "safety/cost_mean_lower": monitor.lower_mean * scale,
            "safety/cost_mean_upper": monitor.upper_mean * scale,
        }
        return {
            "safety/accident_rate": monitor.accident_rate,
            "safety/accident_rate_lower": low,
            "safety/accident_rate_upper": high,
            "safety/accidents_total": float(monitor.accidents),
            "safety/cost_mean": monitor.cost_mean,
            "safety/cost_recent": self.recent_cost,
            **(cost_bounds if self._limit.constraint == "cost" else {}),
            f"safety/{self._limit.name}": self._limit.value,
            "safety/alarm_log_evidence": monitor.log_evidence,
            "online/return": self.recent_return,
            "budget/spent": self.step / self._budget,
        }

    def trust(self) -> dict[str, float]:
        """Estimate of the policy that acts from here on, and share of accepted candidates."""
        return {
            f"safety/{self._limit.quantity}_estimate": self.estimate,
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
            parts = [
                f"cost {monitor.cost_mean:.1f} an episode",
                f"last 10: {self.recent_cost:.1f} (limit {limit.value:g})",
                f"accidents {monitor.accidents} of {monitor.episodes}",
            ]
            estimate = f"estimate {self.estimate:.1f}"
        parts.append(f"return {self.recent_return:.2f}")
        if not math.isnan(self.estimate):
            kl = max(self._decision("kl_forward_mean"), self._decision("kl_reverse_mean"))
            parts += [
                f"KL {kl:.4f}",
                estimate,
                f"accepted {100 * self._accepted / self._iterations:.0f} %",
            ]
        return " | ".join(parts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
