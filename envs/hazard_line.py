"""HazardLine-v0: a random walk between a hazard and a goal, whose accident probability is known.

The action only sets the odds of moving right, so the probability of ever touching the hazard under
a given policy follows exactly from dynamic programming: the yardstick for estimates of it.
gymnasium and numpy only.

Three policies that are clearly apart, as constant actions with the default size and 20 steps:

>>> [round(accident_probability(always(a), horizon=20), 3) for a in (0.6, 0.2, -0.2)]
[0.059, 0.277, 0.673]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
# Position -> the (action, probability) pairs of a policy there; the probabilities sum to 1.
Policy = Callable[[int], Sequence[tuple[float, float]]]

SIZE = 7  # positions: 0 is the hazard, SIZE - 1 the goal
DRIFT = 0.8  # P(right) lies between (1 - DRIFT) / 2 and (1 + DRIFT) / 2


def move_right_probability(action: float) -> float:
    """P(right) = (1 + DRIFT * action) / 2, the action clipped to [-1, 1].

    >>> [round(move_right_probability(a), 2) for a in (-1.0, 0.0, 0.5, 2.0)]
    [0.1, 0.5, 0.7, 0.9]
    """
    return (1.0 + DRIFT * min(1.0, max(-1.0, action))) / 2.0


def start_positions(size: int = SIZE) -> list[int]:
    """The three positions in the middle; an episode starts at each with probability 1/3."""
    return [size // 2 - 1, size // 2, size // 2 + 1]


class HazardLineEnv(gym.Env[Array, Array]):
    """Walk on positions 0 .. size - 1, one to the right or to the left in each step.

    Observation [size]: the position, one-hot. Action [1] in [-1, 1]: sets the odds of moving right.
    Reward: 1 on reaching the goal. ``info["cost"]`` is 1 on reaching the hazard; both terminate.
    The time limit comes from the registration (20 steps).
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012

    def __init__(self, size: int = SIZE, render_mode: str | None = None) -> None:
        if size < 5 or size % 2 == 0:
            raise ValueError(f"size is {size}, but an odd number of at least 5 positions is needed")
        self.size = size
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0.0, 1.0, (size,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._position = size // 2

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start at one of :func:`start_positions`."""
        super().reset(seed=seed)
        self._position = int(self.np_random.choice(start_positions(self.size)))
        return observe(self._position, self.size), {"cost": 0.0}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Move right with :func:`move_right_probability`, else left."""
        right = self.np_random.random() < move_right_probability(float(action[0]))
        self._position += 1 if right else -1
        accident, arrived = self._position == 0, self._position == self.size - 1
        observation = observe(self._position, self.size)
        info = {"cost": float(accident), "is_success": arrived}
        return observation, float(arrived), accident or arrived, False, info


def observe(position: int, size: int = SIZE) -> Array:
    """The observation [size] at a position: one-hot."""
    observation = np.zeros(size, dtype=np.float32)
    observation[position] = 1.0
    return observation


def always(action: float) -> Policy:
    """The policy that takes the same action everywhere."""
    return lambda _position: [(action, 1.0)]


def accident_table(policy: Policy, horizon: int, size: int = SIZE) -> NDArray[np.float64]:
    """Exact P(the hazard is reached within t steps from position x): [horizon + 1, size], [t, x].

    Backward induction: v_t(x) = p(x) v_{t-1}(x + 1) + (1 - p(x)) v_{t-1}(x - 1) with v(0) = 1 and
    v(goal) = 0 absorbing, v_0 = 0 elsewhere, and p(x) = sum_a policy(a | x) P(right | a).
    """
    p = np.empty(size - 2)
    for x in range(1, size - 1):
        actions, weights = zip(*policy(x), strict=True)
        if min(weights) < 0.0 or abs(sum(weights) - 1.0) > 1e-6:
            raise ValueError(f"the action probabilities at position {x} do not sum to 1")
        right = [move_right_probability(float(a)) for a in actions]
        p[x - 1] = np.dot(right, weights)
    table = np.zeros((horizon + 1, size))
    table[:, 0] = 1.0
    for t in range(1, horizon + 1):
        table[t, 1:-1] = p * table[t - 1, 2:] + (1.0 - p) * table[t - 1, :-2]
    return table


def accident_probability(policy: Policy, horizon: int, size: int = SIZE) -> float:
    """Exact P(at least one accident within ``horizon`` steps) over the start positions.

    ``policy`` maps a position to its (action, probability) pairs: a stochastic policy is given by
    its support, a continuous one by n sampled actions of probability 1/n each.
    """
    return float(accident_table(policy, horizon, size)[horizon, start_positions(size)].mean())
