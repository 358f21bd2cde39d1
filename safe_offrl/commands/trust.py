"""Vouch for a run that somebody else made."""

from __future__ import annotations

from pathlib import Path

from safe_offrl.commands.common import say_plain, stored_pretrain_run
from safe_offrl.record.final_policy import stored_facts
from safe_offrl.record.find_run import find_run
from safe_offrl.record.progress import Say
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import parse_run_yaml
from safe_offrl.record.trust import named_modules, remember
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.pretrain_config import PretrainConfig


def trust_run(run_name: str | Path, *, runs: str | Path = "runs", say: Say = say_plain) -> None:
    """Let a run from elsewhere, and the pretrain run it began at, import what their settings name.

    Once for a run: its settings do not change.
    """
    run = find_run(run_name, Path(runs))
    inputs, safety, _ = stored_facts(run)
    names = named_modules(inputs, safety, _agent(run))
    if names:
        remember(run.config_text)
    say(f"trusted     {run.path}: its settings import {', '.join(names) or 'nothing'}")
    if inputs.pretrained is not None:
        trust_run(stored_pretrain_run(inputs).path, say=say)


def _agent(run: RunDir) -> str:
    """Who learns in a run when it is resumed."""
    if run.kind == "pretrain":
        return parse_run_yaml(run.config_text, "pretrain", PretrainConfig, run.path)[1].agent
    config = parse_run_yaml(run.config_text, "finetune", FinetuneConfig, run.path)[1]
    return config.baseline.learner
