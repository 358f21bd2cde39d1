"""Whether an environment can be used here."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any

from safe_offrl.check.environment import check_environment
from safe_offrl.collect.log_plan import CollectConfig, add_log_time
from safe_offrl.commands.common import say_plain, stated_safety
from safe_offrl.config import load_config
from safe_offrl.files import plain
from safe_offrl.record.progress import Say


def check_env_run(
    env_id: str, *, episodes: int = 20, overrides: Sequence[str] = (), say: Say = say_plain
) -> dict[str, Any]:
    """Print what keeps an environment from being used here; returns it as plain values.

    ``result["usable"]`` says whether nothing failed.
    """
    safety = stated_safety(env_id, overrides)
    report = check_environment(env_id, safety, episodes=episodes)
    if report.usable:
        config = load_config(CollectConfig, section="collect", env_id=env_id)
        add_log_time(report, safety, config)
    say(str(report))
    return typing.cast(dict[str, Any], plain(report.as_dict()))
