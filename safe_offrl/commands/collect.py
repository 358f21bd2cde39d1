"""Log a dataset."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

from safe_offrl.collect.build import build_dataset, default_dataset
from safe_offrl.collect.log_plan import CollectConfig
from safe_offrl.commands.common import DEFAULT_ENV, require_output, say_plain, stated_safety
from safe_offrl.config import load_config
from safe_offrl.data_formats.loading import stated_metadata
from safe_offrl.errors import ConfigError, DataError
from safe_offrl.record.progress import Heartbeat, Say
from safe_offrl.record.trust import trust_log
from safe_offrl.spec import SafetySpec


def collect_run(
    *,
    env: str | None = None,
    out: str | Path | None = None,
    transitions: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int | None = None,
    workers: int | None = None,
    preset: str | Path | None = None,
    overrides: Sequence[str] = (),
    say: Say = say_plain,
) -> Path:
    """Log a dataset; without ``out`` it is the environment's cached default. Returns the path.

    ``steps`` or ``minutes`` bound what is done in the environment, see :func:`build_dataset`.
    """
    # Settings and bounds.
    env_id = env or DEFAULT_ENV
    safety, config = collect_config(
        env_id,
        preset=preset,
        transitions=transitions,
        seed=seed,
        workers=workers,
        overrides=overrides,
    )
    if steps is not None and minutes is not None:
        raise ConfigError("Give --steps or --minutes: each bounds all that is done.")
    if minutes is not None and not 0.0 < minutes < math.inf:
        raise ConfigError(f"--minutes is {minutes:g}, but a number above 0 is needed. Try 20.")
    with contextlib.closing(Heartbeat(say, "collect     at work, {} so far".format)) as heart:
        if out is None:
            # The cached default.
            if any(given is not None for given in (transitions, seed, steps, minutes)):
                raise ConfigError(
                    "The cached default dataset has its own size and seed. "
                    "Give --out FILE to log another one."
                )
            path = default_dataset(env_id, safety, config=config, progress=heart.say)
        else:
            # A file of one's own.
            if Path(out).exists():
                raise DataError(f'"{out}" exists already. Remove it, or give another name.')
            require_output(Path(out))
            path = build_dataset(
                env_id,
                safety,
                path=Path(out),
                config=config,
                steps=steps,
                minutes=minutes,
                progress=heart.say,
            )
    # Trust, since the log was made here.
    trust_log(stated_metadata(path))
    say(f"dataset     {path}")
    return Path(path)


def collect_config(
    env: str | None = None,
    *,
    preset: str | Path | None = None,
    overrides: Sequence[str] = (),
    **flags: int | None,
) -> tuple[SafetySpec, CollectConfig]:
    """What is to be logged and how: the environment's preset or this one, flags, and KEY=VALUE.

    "safety.KEY" is part of the preset's section "pretrain", every other key of "collect".
    """
    env_id = env or DEFAULT_ENV
    safety = [text for text in overrides if text.startswith("safety.")]
    others = [text for text in overrides if not text.startswith("safety.")]
    config = load_config(
        CollectConfig,
        section="collect",
        env_id=env_id,
        preset=preset,
        flags=flags,
        overrides=others,
    )
    return stated_safety(env_id, safety, preset), config
