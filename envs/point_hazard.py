"""PointHazard-v0: a point mass must reach a goal among circular hazards; touching one is an
accident.

The embedded default environment and the worked example of a custom one: gymnasium and numpy only.
The straight way to the goal leads through a narrow gap, where inertia and process noise make an
accident likely at speed; the way around is longer and its passages are wider. Nothing but the lost
rest of the episode punishes an accident and time costs, so a learner of return alone has a reason
to hurry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Controller = Callable[[Array], Array]

GOAL = (0.85, 0.0)
GOAL_RADIUS = 0.1
# (x, y, radius). Three ways lead past them: through the gap (half width .08), above and below.
HAZARDS = (
    (-0.40, 0.00, 0.14),
    (0.15, 0.30, 0.22),
    (0.15, -0.30, 0.22),
    (0.15, 0.90, 0.18),
    (0.15, -0.90, 0.18),
)
ACCELERATION = 0.008  # per step, at full action
DAMPING = 0.88  # share of the velocity that is left after a step
NOISE = 0.007  # standard deviation of the velocity's process noise, per axis and step
TOP_SPEED = ACCELERATION / (1.0 - DAMPING)
SIGHT = 0.3  # clearance at which a hazard comes into view
ARRIVAL_REWARD = 0.5
TIME_COST = 0.01  # per step


class PointHazardEnv(gym.Env[Array, Array]):
    """Point mass with inertia; action = acceleration in [-1, 1]^2; episode of at most 100 steps.

    Observation [9]: position (2), velocity / top speed (2), nearness of the five hazards (5): 1 on
    touching it, falling to 0 at a clearance of 0.3. Reward: decrease of the distance to the goal,
    minus 0.01 a step for the time it takes, and 0.5 on arrival, which terminates. ``info["cost"]``
    is 1 on touching a hazard, which terminates as well. The walls at |x| = 1 and |y| = 1 only stop
    the point. The time limit comes from the registration.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        low = np.array([-1, -1, -2, -2] + [0] * len(HAZARDS), dtype=np.float32)
        high = np.array([1, 1, 2, 2] + [2] * len(HAZARDS), dtype=np.float32)
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._x = self._y = self._vx = self._vy = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start at rest on the left, at a random height."""
        super().reset(seed=seed)
        self._x = -0.85
        self._y = float(self.np_random.uniform(-0.5, 0.5))
        self._vx = self._vy = 0.0
        return self._observation(), {"cost": 0.0}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Accelerate for one step; actions outside [-1, 1] are clipped."""
        # Plain floats: for two numbers numpy's call overhead would cost more than the arithmetic.
        ax = min(1.0, max(-1.0, float(action[0])))
        ay = min(1.0, max(-1.0, float(action[1])))
        noise = self.np_random.standard_normal(2)
        limit = 2.0 * TOP_SPEED
        vx = DAMPING * self._vx + ACCELERATION * ax + NOISE * float(noise[0])
        vy = DAMPING * self._vy + ACCELERATION * ay + NOISE * float(noise[1])
        self._vx, self._vy = min(limit, max(-limit, vx)), min(limit, max(-limit, vy))
        before = math.hypot(GOAL[0] - self._x, GOAL[1] - self._y)
        self._x += self._vx
        self._y += self._vy
        if abs(self._x) > 1.0:
            self._x, self._vx = math.copysign(1.0, self._x), 0.0
        if abs(self._y) > 1.0:
            self._y, self._vy = math.copysign(1.0, self._y), 0.0

        after = math.hypot(GOAL[0] - self._x, GOAL[1] - self._y)
        accident = any(math.hypot(self._x - x, self._y - y) <= r for x, y, r in HAZARDS)
        arrived = not accident and after <= GOAL_RADIUS
        reward = before - after - TIME_COST + (ARRIVAL_REWARD if arrived else 0.0)
        info = {"cost": float(accident), "is_success": arrived}
        return self._observation(), reward, accident or arrived, False, info

    def _observation(self) -> Array:
        x, y = self._x, self._y
        nearness = [
            max(0.0, 1.0 - (math.hypot(x - hx, y - hy) - r) / SIGHT) for hx, hy, r in HAZARDS
        ]
        velocity = [self._vx / TOP_SPEED, self._vy / TOP_SPEED]
        return np.array([x, y, *velocity, *nearness], dtype=np.float32)

    def render(self) -> NDArray[np.uint8] | None:
        """Draw hazards (red), goal (green) and the point (blue) as a uint8 image [200, 200, 3]."""
        if self.render_mode != "rgb_array":
            return None
        axis = np.linspace(-1.0, 1.0, 200)
        xs, ys = np.meshgrid(axis, -axis)
        image = np.full((200, 200, 3), 245, dtype=np.uint8)
        for x, y, r in HAZARDS:
            image[np.hypot(xs - x, ys - y) <= r] = (205, 70, 60)
        image[np.hypot(xs - GOAL[0], ys - GOAL[1]) <= GOAL_RADIUS] = (80, 170, 90)
        image[np.hypot(xs - self._x, ys - self._y) <= 0.03] = (40, 80, 190)
        return image


STIFFNESS = 1.5  # of the scripted controllers, action per unit of velocity error
_ROUTES = {
    "gap": ((-0.40, 0.24), (-0.10, 0.0), (0.42, 0.0)),
    "gap-low": ((-0.40, -0.24), (-0.10, 0.0), (0.42, 0.0)),
    "above": ((-0.40, 0.40), (0.15, 0.62), (0.45, 0.45)),
    "below": ((-0.40, -0.40), (0.15, -0.62), (0.45, -0.45)),
}


def route_controller(route: str, speed: float, caution: float) -> Controller:
    """Follow a route of waypoints at ``speed`` (share of top speed), evading hazards.

    ``caution`` is the clearance below which the controller steers away from a hazard; 0 never
    evades. Returns a controller: observation [9] -> action [2].
    """
    waypoints = (*_ROUTES[route], GOAL)

    def act(observation: Array) -> Array:
        x, y, vx, vy = (float(v) for v in observation[:4])
        # The next waypoint is the first that still lies ahead: routes lead from left to right.
        tx, ty = next((w for w in waypoints if w[0] > x + 0.02), GOAL)
        dx, dy = tx - x, ty - y
        norm = math.hypot(dx, dy) + 1e-9
        wx, wy = dx / norm, dy / norm
        pace = speed
        for (hx, hy, _), nearness in zip(HAZARDS, observation[4:], strict=True):
            clearance = SIGHT * (1.0 - float(nearness))
            if clearance < caution:
                push = 1.0 - clearance / caution
                distance = math.hypot(x - hx, y - hy) + 1e-9
                wx += 1.2 * push * (x - hx) / distance
                wy += 1.2 * push * (y - hy) / distance
                pace = min(pace, speed * (1.0 - 0.5 * push))
        norm = math.hypot(wx, wy) + 1e-9
        wx, wy = pace * wx / norm, pace * wy / norm
        # Hold the wanted velocity (terminal velocity is the action itself) and correct the error.
        ax, ay = wx + STIFFNESS * (wx - vx), wy + STIFFNESS * (wy - vy)
        return np.clip(np.array([ax, ay], dtype=np.float32), -1.0, 1.0)

    return act


def scripted_behaviours() -> dict[str, Callable[[np.random.Generator], Controller]]:
    """Name -> factory of controllers for `safe-offrl collect`; each episode draws its own
    manner.
    """

    def hurried(rng: np.random.Generator) -> Controller:
        route = str(rng.choice(["gap", "gap-low"]))
        return route_controller(route, rng.uniform(0.8, 1.0), rng.uniform(0.0, 0.04))

    def moderate(rng: np.random.Generator) -> Controller:
        return route_controller(
            str(rng.choice(list(_ROUTES))), rng.uniform(0.5, 0.9), rng.uniform(0.03, 0.10)
        )

    def cautious(rng: np.random.Generator) -> Controller:
        route = str(rng.choice(["above", "below"]))
        return route_controller(route, rng.uniform(0.4, 0.8), rng.uniform(0.08, 0.15))

    return {"hurried": hurried, "moderate": moderate, "cautious": cautious}
