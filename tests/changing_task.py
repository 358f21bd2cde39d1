"""A task as people write them, and the changes behind its id that make it another one.

It is registered in one module, its class is in another, that one's numbers are in a third, and a
wrapper and an accident rule lie beside them. Module names begin with a prefix, so that tests do not
meet in sys.modules.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.make import make_env
from safe_offrl.spec import SafetySpec

FILES = {
    "winds": "GUST = 0.01\n",
    "cliff": """
import gymnasium
import numpy as np
from {p}winds import GUST

START = 0.0

class Cliff(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, gain, edge, render_mode=None):
        self.gain, self.edge, self.render_mode = gain, edge, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.v = START, 0.0
        return self.observe(), {}

    def step(self, action):
        self.v = 0.9 * self.v + self.gain * float(action[0])
        self.v += GUST * self.np_random.standard_normal()
        self.x = max(-1.0, self.x + self.v)
        over = self.x > self.edge
        return self.observe(), 0.0 if over else self.x, over, False, {"cost": float(over)}

    def observe(self):
        return np.clip([self.x, self.v], -2.0, 2.0).astype(np.float32)
""",
    "slower": """
import gymnasium

class Slower(gymnasium.ActionWrapper):
    def __init__(self, env, by):
        super().__init__(env)
        self.by = by

    def action(self, action):
        return self.by * action
""",
    "track": """
import gymnasium
from gymnasium.envs.registration import WrapperSpec
import {p}cliff

{p}cliff.START = 0.0
gymnasium.register(
    "{p}Track-v0",
    entry_point="{p}cliff:Cliff",
    kwargs={"gain": 0.03, "edge": 1.0},
    max_episode_steps=40,
    additional_wrappers=(),
)
""",
    "rules": "def fast(o, a, n, r, te, tr, info): return bool(abs(n[1]) > 0.15)\n",
}
WRAPPED = '(WrapperSpec("Slower", "{p}slower:Slower", {"by": 0.5}),)'


@dataclass(frozen=True)
class Change:
    """An edit of one file, and the phrases that name what has changed."""

    file: str
    old: str
    new: str
    said: tuple[str, ...]


# Each leaves the id as it is.
CHANGES = {
    "kwargs": Change(
        "track", '"edge": 1.0', '"edge": 0.2', ("kwargs edge 1.0 -> 0.2", "the source of {p}track")
    ),
    "wrapper": Change(
        "track",
        "additional_wrappers=()",
        f"additional_wrappers={WRAPPED}",
        (
            "additional wrappers none -> {p}slower:Slower(by=0.5)",
            "the source of {p}slower",
            "the source of {p}track",
        ),
    ),
    "registering module": Change(
        "track", "START = 0.0", "START = 0.3", ("the source of {p}track",)
    ),
    "class": Change("cliff", "0.9 * self.v", "0.8 * self.v", ("the source of {p}cliff",)),
    "helper": Change("winds", "0.01", "0.05", ("the source of {p}winds",)),
    "rule": Change("rules", "> 0.15", "> 0.5", ("the source of {p}rules",)),
    "horizon": Change(
        "track",
        "steps=40",
        "steps=30",
        ("max episode steps 40 -> 30", "the source of {p}track", "horizon 40 -> 30"),
    ),
}


def write_task(folder: Path, prefix: str, change: Change | None = None) -> Path:
    """The modules of the task, their names with ``prefix``, in a new folder."""
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        if change is not None and change.file == name:
            assert text.count(change.old) == 1
            text = text.replace(change.old, change.new)
        (folder / f"{prefix}{name}.py").write_text(text.replace("{p}", prefix))
    return folder


def enter(folder: Path, prefix: str, patch: pytest.MonkeyPatch) -> None:
    """What a new process in this folder would import and register."""
    for name in [n for n in sys.modules if n.startswith(prefix)]:
        patch.delitem(sys.modules, name)
    patch.delitem(gymnasium.registry, f"{prefix}Track-v0", raising=False)
    patch.chdir(folder)
    patch.setattr(sys, "path", [str(folder), *sys.path])
    importlib.invalidate_caches()


def task(prefix: str, **settings: Any) -> AccidentEnv:
    spec = SafetySpec(accident=f"{prefix}rules:fast")
    return make_env(f"{prefix}track:{prefix}Track-v0", spec, **settings)
