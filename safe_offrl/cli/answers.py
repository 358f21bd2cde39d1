"""What a command answers; how the two that make runs come to theirs.

Nothing heavy is imported at the top, so that --help answers at once (no torch).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safe_offrl.errors import UserError

if TYPE_CHECKING:
    from safe_offrl.record.progress import Say
    from safe_offrl.record.run import RunDir


class Answer(NamedTuple):
    """What a command ends with."""

    value: Any = None  # for --json
    text: str = ""  # for people, where it has not been said
    exit_code: int = 0


def tally(run: RunDir) -> dict[str, Any]:
    """What has happened in a finetune run."""
    episodes = run.episodes()
    accidents = sum(episode.accident for episode in episodes)
    steps = episodes[-1].total_steps if episodes else 0
    counts = {"episodes": len(episodes), "accidents": accidents, "steps": steps}
    return {"run": str(run.path), **counts}


def run_phase(
    configure: Callable[..., Any],
    plan: Callable[..., Any],
    begin: Callable[..., RunDir],
    go_on: Callable[..., RunDir],
    answer: Callable[[RunDir], Any],
    *,
    name: str | None,
    runs: Path,
    resume: str | None,
    threads: int | None,
    checkpoint_seconds: float,
    preset: Path | None,
    print_config: bool,
    dry_run: bool,
    overrides: list[str],
    say: Say,
    **settings: Any,
) -> Answer:
    """Make a run from settings, or go on with one, which has its own."""
    from safe_offrl.record.run_names import require_runs_folder

    writing: dict[str, Any] = {"runs": runs, "checkpoint_seconds": checkpoint_seconds, "say": say}
    # A run that goes on.
    if resume is not None:
        if given := [s for s in (*settings.values(), name, preset, *overrides) if s is not None]:
            raise UserError(
                f"--resume continues a run with its own settings, but {given[0]!r} was given too. "
                "Leave it out, or start a new run."
            )
        return Answer(answer(go_on(resume, threads=threads, **writing)))
    # Settings of a new run.
    config = configure(**settings, preset=preset, overrides=overrides)
    if print_config:
        return settings_answer(config)
    # Plan and run.
    if not dry_run:
        require_runs_folder(runs, name)
    planned = plan(config, threads=threads or 1, say=say)
    if dry_run:
        return dry_run_answer(planned.header, say)
    return Answer(answer(begin(planned, name=name, **writing)))


def settings_answer(config: Any) -> Answer:
    """What --print-config prints."""
    from safe_offrl.config import to_dict, yaml_text

    settings = to_dict(config)
    return Answer(settings, yaml_text(settings))


def dry_run_answer(text: str, say: Say) -> Answer:
    """Say what would be done."""
    say(text)
    return Answer({"dry_run": True, "text": text.splitlines()})
