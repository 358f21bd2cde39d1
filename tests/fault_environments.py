"""Environments for the fault-injection harness; importing registers them.

All walk on a line as those of bad_environments.py do. Each writes what it really did, line by line,
to the file that $SAFE_OFFRL_TEST_LOG names, if it is set: the environment's own side of the story,
which no kill of the process can undo.
"""

from __future__ import annotations

import os
import time
from typing import Any

import gymnasium

from tests.bad_environments import Sound, Step

HORIZON = 20
LOG = "SAFE_OFFRL_TEST_LOG"
STEP_SECONDS = 0.001  # so that kills fall within episodes too


class Logged(Sound):
    """Nothing is wrong with this one either."""

    def tell(self, text: str) -> None:
        if path := os.environ.get(LOG):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(fd, f"{text}\n".encode())
            os.close(fd)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        self.tell(f"reset {seed}")
        return super().reset(seed=seed, options=options)

    def step(self, action: Any) -> Step:
        if os.environ.get(LOG):
            time.sleep(STEP_SECONDS)
        observation, reward, terminated, truncated, info = super().step(action)
        self.tell(f"step {int(info['cost'])}")
        if terminated or self.clock == HORIZON:
            self.tell("end")
        return observation, reward, terminated, truncated, info


gymnasium.register("Logged-v0", entry_point=f"{__name__}:Logged", max_episode_steps=HORIZON)
