"""A walk on a line in whatever units and wherever on the map it lies, for tests of scales."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

HORIZON = 20
FAR = 5.4e6  # a coordinate in metres, as maps have them


class Slope(gymnasium.Env[Any, Any]):
    """A walk whose right end pays and costs, in whatever units."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        observations: float = 1.0,
        rewards: float = 1.0,
        costs: float = 1.0,
        actions: float = 1.0,
        offset: float = 0.0,
        kind: type = np.float32,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self.units = (observations, rewards, costs, actions)
        self.offset, self.kind = offset, kind
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), kind)
        # A bound of an even factor: only rounded once, as the actions themselves.
        self.action_space = spaces.Box(-actions, actions, (1,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.position = 0.1 * self.np_random.standard_normal()
        self.speed = 0.0
        return self.seen(), {}

    def render(self) -> Any:
        return np.zeros((8, 8, 3), np.uint8)

    def seen(self) -> NDArray[Any]:
        unit = self.units[0]
        return np.array([self.offset + unit * self.position, unit * self.speed], self.kind)

    def step(self, action: Any) -> Any:
        _, rewards, costs, actions = self.units
        push = float(np.float32(action[0] / actions))
        self.speed = 0.8 * self.speed + 0.1 * push + 0.02 * self.np_random.standard_normal()
        self.position += self.speed
        over = max(0.0, self.position - 0.4)
        reward = float(np.float32(self.position))  # as a log keeps it
        return (
            self.seen(),
            rewards * reward,
            self.position > 1.5,
            False,
            {"cost": costs * round(over, 2)},
        )


_IDS: dict[str, dict[str, Any]] = {
    "SlopeNear": {"kind": np.float64},
    "SlopeFar": {"kind": np.float64, "offset": FAR},
    "SlopeFarRounded": {"kind": np.float32, "offset": FAR},
}
for _name, _settings in _IDS.items():
    if f"{_name}-v0" not in gymnasium.registry:  # pytest looks for doctests here under another name
        gymnasium.register(
            f"{_name}-v0", "tests.slope:Slope", max_episode_steps=HORIZON, kwargs=_settings
        )
