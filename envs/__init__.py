"""Environments that come with safe-offrl; importing this package registers them with Gymnasium.

They import gymnasium and numpy only and know nothing of safe_offrl: each is a worked example of an
environment of your own. ``max_episode_steps`` is the horizon within which an accident counts.
"""

import gymnasium

_ENVIRONMENTS = {
    "PointHazard-v0": ("safe_offrl.envs.point_hazard:PointHazardEnv", 100),
    "HazardLine-v0": ("safe_offrl.envs.hazard_line:HazardLineEnv", 20),
}

for _env_id, (_entry_point, _max_episode_steps) in _ENVIRONMENTS.items():
    # A second import (a reload, or a copy of this folder under another name) registers nothing.
    if _env_id not in gymnasium.registry:
        gymnasium.register(
            id=_env_id, entry_point=_entry_point, max_episode_steps=_max_episode_steps
        )
