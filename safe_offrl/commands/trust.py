"""Vouch for a run that somebody else made."""

from __future__ import annotations

from pathlib import Path

from safe_offrl.commands.common import say_plain, stored_pretrain_run
from safe_offrl.record.final_policy import stored_facts
from safe_offrl.record.progress import Say
from safe_offrl.record.run import find_run
from safe_offrl.record.trust import named_modules, remember


def trust_run(reference: str | Path, *, runs: str | Path = "runs", say: Say = say_plain) -> None:
    """Let a run from elsewhere, and the pretrain run it began at, import what their settings name.

    Once for a run: its settings do not change.
    """
    run = find_run(reference, Path(runs))
    inputs, safety, _ = stored_facts(run)
    names = named_modules(inputs, safety)
    if names:
        remember(run.config_text)
    say(f"trusted     {run.path}: its settings import {', '.join(names) or 'nothing'}")
    if inputs.pretrained is not None:
        trust_run(stored_pretrain_run(inputs).path, say=say)
