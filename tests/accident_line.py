"""HazardLine-v0 with a picture, and a run that was pretrained on it: accidents are frequent."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from safe_offrl import commands
from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.env.make import make_env
from safe_offrl.envs.hazard_line import HazardLineEnv
from safe_offrl.record.run import RunDir
from safe_offrl.spec import SafetySpec

ENV = "DrawnLine-v0"
TINY = ["alignment_steps=10", "log_every=10", "batch_size=32"]
TINY += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]


class DrawnLine(HazardLineEnv):  # type: ignore[misc]  # under its installed name it is Any
    """HazardLine-v0 with a picture: a bright column at the position. Accidents are frequent."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def render(self) -> NDArray[np.uint8]:
        image = np.zeros((20, 10 * self.size, 3), dtype=np.uint8)
        image[:, 10 * self._position : 10 * self._position + 10] = 255
        return image


if ENV not in gymnasium.registry:  # --doctest-modules imports this file under a second name
    gymnasium.register(ENV, "tests.accident_line:DrawnLine", max_episode_steps=20)


def silent(text: str) -> None:
    pass


def pretrained_on_a_line(root: Path) -> RunDir:
    """From random actions, by a few steps that teach nothing: accidents are frequent."""
    with contextlib.closing(make_env(ENV, SafetySpec())) as env:
        arrays = log_episodes(
            env, behaviours=[random_behaviour(1)], shares=[1.0], transitions=1000, seed=0
        )
    path = root / "line.hdf5"
    metadata = {"env_id": ENV, "accident": "cost", "cost_threshold": 0.0, "horizon": 20}
    write_dataset(path, arrays, metadata | {"behaviours": [{"name": "random"}]})
    config = commands.pretrain_config(env=ENV, dataset=str(path), steps=30, overrides=TINY)
    plan = commands.plan_pretrain(config, say=silent)
    return commands.pretrain_run(plan, name="offline", runs=root, say=silent)
