"""A line on which the right half costs a toll, the left half another, and its ends are accidents.

Named signals: ``right`` is 3 in each step that ends right of the middle, ``left`` is 1 left of it,
and ``never`` is always 0. The environment's own cost is 1 at an end, where the episode goes on.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.env.make import make_env
from safe_offrl.spec import SafetySpec

ENV = "TollLine-v0"
HORIZON = 20
SIGNALS = {"left": "tolls.left", "never": "tolls.never", "right": "tolls.right"}
TINY = ["alignment_steps=10", "log_every=10", "batch_size=32"]
TINY += ["networks.actor_hidden=[8]", "networks.critic_hidden=[8]", "critic.hidden=[8,8]"]
TINY += ["critic.cost_discount=0.9"]


class TollLine(gymnasium.Env[Any, Any]):
    observation_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.at = float(self.np_random.uniform(-0.5, 0.5))
        return np.array([self.at], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        noise = 0.1 * self.np_random.standard_normal()
        self.at = float(np.clip(self.at + 0.4 * float(action[0]) + noise, -1.0, 1.0))
        tolls = {"right": 3.0 * (self.at > 0.0), "left": float(self.at < 0.0), "never": 0.0}
        info = {"cost": float(abs(self.at) == 1.0), "tolls": tolls}
        return np.array([self.at], np.float32), self.at, False, False, info


if ENV not in gymnasium.registry:  # --doctest-modules imports this file under a second name
    gymnasium.register(ENV, TollLine, max_episode_steps=HORIZON)  # type: ignore[arg-type]


def logged_tolls(folder: Path, transitions: int = 1200) -> Path:
    """Random actions, with all three signals."""
    with contextlib.closing(make_env(ENV, SafetySpec(signals=SIGNALS))) as env:
        arrays = log_episodes(
            env, behaviours=[random_behaviour(1)], shares=[1.0], transitions=transitions, seed=0
        )
    path = folder / "tolls.hdf5"
    metadata = {"env_id": ENV, "accident": "cost", "cost_threshold": 0.0, "horizon": HORIZON}
    metadata |= {"signals": SIGNALS, "behaviours": [{"name": "random"}]}
    write_dataset(path, arrays, metadata)
    return path
