"""Environments that come with safe-offrl; importing this package registers them with Gymnasium.

They import gymnasium and numpy only and know nothing of safe_offrl: each is a worked example of an
environment of your own. ``max_episode_steps`` is the horizon within which an accident counts.
Safety-Gymnasium's ids are registered whether or not it is installed; making one says what to do.
"""

import gymnasium

_ENVIRONMENTS = {
    "PointHazard-v0": ("safe_offrl.envs.point_hazard:PointHazardEnv", 100),
    "HazardLine-v0": ("safe_offrl.envs.hazard_line:HazardLineEnv", 20),
    "HazardGrid-v0": ("safe_offrl.envs.hazard_grid:HazardGridEnv", 40),
}

_ROBOTS = ("Point", "Car", "Racecar", "Doggo", "Ant")
_LEVELS = {"Goal": 1000, "Button": 1000, "Push": 1000, "FadingEasy": 1000, "FadingHard": 1000}
_TASKS = {f"{task}{level}": steps for task, steps in _LEVELS.items() for level in range(3)}
_TASKS |= {"Circle0": 500, "Circle1": 500, "Circle2": 500, "Run0": 500}
_RUNNERS = ("Ant", "HalfCheetah", "Hopper", "Humanoid", "Swimmer", "Walker2d")
# The 107 ids of Safety-Gymnasium that work; the 15 Race ids lack their textures in its wheel.
SAFETY_GYM = {
    f"Safety{robot}{task}-v0": steps for robot in _ROBOTS for task, steps in _TASKS.items()
} | {f"Safety{runner}Velocity-{v}": 1000 for runner in _RUNNERS for v in ("v0", "v1")}


def _register(env_id: str, entry_point: str, max_episode_steps: int, **kwargs: str) -> None:
    # A second import (a reload, or a copy of this folder under another name) registers nothing.
    if env_id not in gymnasium.registry:
        gymnasium.register(env_id, entry_point, max_episode_steps=max_episode_steps, kwargs=kwargs)


for _env_id, (_entry_point, _steps) in _ENVIRONMENTS.items():
    _register(_env_id, _entry_point, _steps)
for _env_id, _steps in SAFETY_GYM.items():
    _register(_env_id, "safe_offrl.envs.safety_gym:SafetyGymEnv", _steps, task_id=_env_id)
