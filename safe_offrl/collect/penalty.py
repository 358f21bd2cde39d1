"""An environment whose rewards are less by a penalty on cost, fixed or adapted to a limit."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from safe_offrl.collect.dropped import Dropped
from safe_offrl.env.adapter import AccidentEnv, Vector, episode_seed
from safe_offrl.errors import EnvFault
from safe_offrl.limits import COST, Quantity

EPISODES_PER_STEP = 8  # finished ones between two steps of an adapted penalty
PROPORTIONAL, INTEGRAL = 0.5, 0.1  # gains of an adapted penalty, in its natural unit


class Account:
    """What the environments of one training share: the penalty, and how episodes ended.

    With a ``limit`` on the cost of an episode the penalty is adapted; ``unit`` is the size of a
    penalty that matters. Episodes that the environment failed in are ``dropped``.
    """

    def __init__(self, *, penalty: float = 0.0, limit: float | None = None, unit: float = 1.0):
        self.penalty = penalty
        self.episodes: list[tuple[float, float]] = []  # (return without penalty, cost)
        self.dropped = Dropped()
        self._limit = limit
        self._unit = unit
        self._seen = 0
        self._integral = 0.0

    def adapt(self) -> None:
        """A step of dual ascent on the mean cost of the episodes finished since the last one."""
        if self._limit is None or len(self.episodes) < self._seen + EPISODES_PER_STEP:
            return
        cost = float(np.mean([cost for _, cost in self.episodes[self._seen :]]))
        self._seen = len(self.episodes)
        # The excess is in units of the limit; any cost is far above a limit of 0.
        excess = (cost - self._limit) / self._limit if self._limit > 0.0 else 2.0 * (cost > 0.0)
        excess = min(2.0, excess)
        self._integral = max(0.0, self._integral + INTEGRAL * self._unit * excess)
        self.penalty = max(0.0, self._integral + PROPORTIONAL * self._unit * excess)

    def recent(self) -> NDArray[np.float64]:
        """Mean (return, cost) of the last episodes; NaN before the first."""
        last = np.array(self.episodes[-30:]).reshape(-1, 2)
        return last.mean(0) if len(last) else np.full(2, np.nan)


class Penalised(gymnasium.Wrapper[Vector, Any, Vector, Vector]):
    """AccidentEnv as a learner sees it: penalised rewards, and a Discrete space where it is one.

    Where the environment fails, the episode is cut off where it was, and counts nowhere. EnvError
    if it does so in too many episodes in a row.
    """

    def __init__(self, env: AccidentEnv, account: Account, limited: Quantity = COST) -> None:
        """Of a ``limited`` signal its cost is penalised."""
        super().__init__(env)
        self._adapted, self._account, self._limited = env, account, limited
        if env.discrete:
            self.action_space = spaces.Discrete(env.action_size)
        self._return = self._cost = 0.0
        self._observation = np.zeros(env.observation_size, np.float32)

    def reset(self, *, seed: int | None = None, **options: Any) -> tuple[Vector, dict[str, Any]]:
        self._return = self._cost = 0.0
        attempt = 0
        while True:
            try:
                self._observation, info = self._adapted.reset(seed=seed, **options)
            except EnvFault as fault:
                self._account.dropped.add(fault)
                attempt += 1
                seed = None if seed is None else episode_seed(seed, attempt, "another start")
            else:
                return self._observation, info

    def step(self, action: Any) -> tuple[Vector, float, bool, bool, dict[str, Any]]:
        if self._adapted.discrete:
            action = np.eye(self._adapted.action_size, dtype=np.float32)[int(action)]
        try:
            observation, reward, terminated, truncated, info = self._adapted.step(action)
        except EnvFault as fault:
            self._account.dropped.add(fault)
            return self._observation, 0.0, False, True, {}
        self._observation = observation
        self._return += reward
        cost = self._limited.cost_of(info["cost"], info.get("signals", {}))
        self._cost += cost
        if terminated or truncated:
            self._account.episodes.append((self._return, self._cost))
            self._account.dropped.completed()
        penalty = self._account.penalty
        reward = (reward - penalty * cost) / (1.0 + penalty)
        return observation, reward, terminated, truncated, info
