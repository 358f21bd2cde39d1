"""Environments whose seeds decide much, little or nothing; importing registers them.

All walk on a line with noise; beyond 1 on either side is the accident.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

from tests.fault_environments import HORIZON, Logged


class Scenarios(Logged):
    """As many scenarios as ``count`` says, each with a start and a noise of its own."""

    count = 5
    same_start = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        scenario = 0 if seed is None else seed % self.count
        super().reset(seed=scenario)
        if self.same_start:
            self.position = 0.0
        return self.observe(), {}


class OneScenario(Scenarios):
    count = 1


class FiveScenarios(Scenarios):
    """They start alike, so that it takes a step to tell them apart."""

    same_start = True


class LateScenarios(FiveScenarios):
    """They are alike for 13 steps."""

    def step(self, action: Any) -> Any:
        _, reward, _, truncated, info = super().step(action)
        if self.clock < 13:
            self.position = 0.0
        return self.observe(), reward, False, truncated, info | {"cost": 0.0}


class Deterministic(Logged):
    """No start but 0, and no noise."""

    def reset(self, **options: Any) -> Any:
        super().reset(**options)
        self.position = 0.0
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        before = self.position
        *_, truncated, info = super().step(action)
        self.position = before + 0.1 * float(action[0])
        over = abs(self.position) > 1.0
        return self.observe(), self.position, over, truncated, info | {"cost": float(over)}


class SameStart(Logged):
    """One start, and noise from the seed: every episode is another."""

    def reset(self, **options: Any) -> Any:
        super().reset(**options)
        self.position = 0.0
        return self.observe(), {}


class Coins(Logged):
    """Two coins decide all: four situations, drawn fairly."""

    def step(self, action: Any) -> Any:
        self.clock += 1
        over = self.clock == 2 and all(self.coins)
        return self.observe(), 0.0, self.clock == 2, False, {"cost": float(over)}

    def reset(self, **options: Any) -> Any:
        super().reset(**options)
        self.position, self.coins = 0.0, self.np_random.integers(2, size=2)
        return self.observe(), {}

    def observe(self) -> Any:
        coin = self.coins[self.clock - 1] if 0 < self.clock <= 2 else 0.5
        return np.array([coin, self.clock / HORIZON], np.float32)


class FailsHalf(SameStart):
    """Fails in reset() under every other seed, and in a step under every third."""

    def reset(self, *, seed: int | None = None, **options: Any) -> Any:
        if seed is not None and seed % 2 == 0:
            raise RuntimeError("no start")
        self.odd = seed is not None and seed % 3 == 0
        return super().reset(seed=seed, **options)

    def step(self, action: Any) -> Any:
        if self.odd:
            raise RuntimeError("did not converge")
        return super().step(action)


for _name in [n for n, c in vars().items() if isinstance(c, type) and issubclass(c, Logged)]:
    if f"{_name}-v0" not in gymnasium.registry:
        point = f"tests.situation_environments:{_name}"
        gymnasium.register(f"{_name}-v0", point, max_episode_steps=HORIZON)
