"""Environments for the fault-injection harness; importing registers them.

All walk on a line with noise; beyond 1 on either side is the accident. Each writes what it really
did, line by line, to the file that $SAFE_OFFRL_TEST_LOG names, if it is set: the environment's own
side of the story, which no kill of the process can undo.
"""

from __future__ import annotations

import os
import time
from typing import Any

import gymnasium
import numpy as np

Step = tuple[Any, float, bool, bool, dict[str, Any]]
HORIZON = 20
LOG = "SAFE_OFFRL_TEST_LOG"
STEP_SECONDS = 0.001  # so that kills fall within episodes too


class Logged(gymnasium.Env[Any, Any]):
    """Nothing is wrong with this one."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    position = 0.0
    clock = 0

    def tell(self, text: str) -> None:
        if path := os.environ.get(LOG):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(fd, f"{text}\n".encode())
            os.close(fd)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        self.tell(f"reset {seed}")
        super().reset(seed=seed)
        self.position, self.clock = 0.1 * float(self.np_random.standard_normal()), 0
        return self.observe(), {}

    def step(self, action: Any) -> Step:
        if os.environ.get(LOG):
            time.sleep(STEP_SECONDS)
        self.clock += 1
        self.position += 0.1 * float(action[0]) + 0.1 * float(self.np_random.standard_normal())
        over = abs(self.position) > 1.0
        self.tell(f"step {int(over)}")
        if over or self.clock == HORIZON:
            self.tell("end")
        return self.observe(), self.position, over, False, {"cost": float(over)}

    def observe(self) -> Any:
        return np.array([self.position, self.clock / HORIZON], dtype=np.float32)


class Failing(Logged):
    """Fails in the third step of every third episode, by its seed, as ``fail`` says."""

    fails = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        self.fails = seed is not None and seed % 3 == 0
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        result = super().step(action)
        return self.fail(*result) if self.fails and self.clock == 3 else result

    def fail(self, observation: Any, reward: float, *rest: Any) -> Any:
        raise ConnectionError("the robot does not answer")


class FailsWithNan(Failing):
    def fail(self, observation: Any, reward: float, *rest: Any) -> Any:
        return (np.full_like(observation, np.nan), reward, *rest)


class FailsWithInfiniteReward(Failing):
    def fail(self, observation: Any, reward: float, *rest: Any) -> Any:
        return (observation, np.inf, *rest)


class FailsWithWrongShape(Failing):
    def fail(self, observation: Any, reward: float, *rest: Any) -> Any:
        return (observation[:1], reward, *rest)


class FailsWithWrongType(Failing):
    def fail(self, observation: Any, reward: float, *rest: Any) -> Any:
        return (np.array(["left", "right"]), reward, *rest)


class FailsWithoutInfo(Failing):
    def fail(self, observation: Any, reward: float, *rest: Any) -> Any:
        return observation, reward, False


class FailsInReset(Failing):
    def reset(self, **options: Any) -> Any:
        result = super().reset(**options)
        if self.fails:
            raise TimeoutError("not in its start position")
        return result


class FailsByHanging(Failing):
    def fail(self, observation: Any, reward: float, *rest: Any) -> Any:
        time.sleep(3600.0)


class FailsByDying(Failing):
    def fail(self, observation: Any, reward: float, *rest: Any) -> Any:
        os._exit(1)


_TIME_LIMITED = [n for n, c in vars().items() if isinstance(c, type) and issubclass(c, Failing)]
for _name in (*_TIME_LIMITED, "Logged"):
    if f"{_name}-v0" not in gymnasium.registry:  # pytest imports this file under two names
        point = f"tests.fault_environments:{_name}"
        gymnasium.register(f"{_name}-v0", point, max_episode_steps=HORIZON)
