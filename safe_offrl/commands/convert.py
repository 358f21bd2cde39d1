"""`safe-offrl convert`: a dataset in another format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safe_offrl.commands.common import require_safety_keys, say_plain
from safe_offrl.config import load_config
from safe_offrl.data_formats.conversion import convert
from safe_offrl.record.progress import ProgressLine, Say
from safe_offrl.train.pretrain import PretrainConfig

LONG_TRANSITIONS = 500_000  # transitions from which on progress is worth a line


def convert_dataset(
    source: str | Path, target: str | Path, *, overrides: Sequence[str] = (), say: Say = say_plain
) -> dict[str, Any]:
    """Write the dataset ``source`` as ``target`` and say what that loses; returns plain values.

    Of the settings only safety.horizon has a meaning, as the time limit of a log that does not say
    which episodes were cut by one.
    """
    require_safety_keys(overrides)
    config = load_config(PretrainConfig, section="pretrain", env_id="", overrides=overrides)
    line: ProgressLine | None = None

    def progress(done: int, total: int) -> None:
        nonlocal line
        if total >= LONG_TRANSITIONS:
            line = line or ProgressLine(total, 0, None if say is say_plain else say)
            line.update(done, f"writing {target}")

    try:
        result = convert(source, target, horizon=config.safety.horizon, progress=progress)
    finally:
        if line is not None:
            line.close()
    for remark in result.remarks:
        say(f"warning     {remark}")
    say(f"converted   {result.transitions:,} transitions, {result.source} to {result.target}")
    for loss in result.lost:
        say(f"lost        {loss}")
    say(f"dataset     {target}")
    return {**result._asdict(), "dataset": str(target)}
