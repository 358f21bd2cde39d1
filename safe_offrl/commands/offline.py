"""The offline phase as a command: run, resume."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from safe_offrl.commands.common import say_plain, stored_dataset, with_own_settings
from safe_offrl.commands.environment import identities
from safe_offrl.commands.offline_plan import PretrainPlan
from safe_offrl.commands.phase import (
    CHECKPOINT_SECONDS,
    Saver,
    bring_back,
    new_run,
    save_calibration,
    stored_mode,
    unfinished,
    writing,
)
from safe_offrl.compute.descent import choose_compute
from safe_offrl.compute.device import configure, find_device
from safe_offrl.data.dataset import Dataset
from safe_offrl.files import plain
from safe_offrl.record.progress import ProgressLine, Say
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import RunInputs
from safe_offrl.record.trust import require_trusted
from safe_offrl.record.versions import versions
from safe_offrl.report.calibration_chart import report_png
from safe_offrl.train.pretrain import Pretraining
from safe_offrl.train.pretrain_config import PretrainConfig, discount_of
from safe_offrl.types import Record


def pretrain_run(
    plan: PretrainPlan,
    *,
    name: str | None = None,
    runs: str | Path = "runs",
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    say: Say = say_plain,
) -> RunDir:
    """Run a planned offline phase in a new run folder; returns the finished run."""
    configure(plan.inputs.threads)
    made_with = versions(plan.env_versions, plan.inputs.device)
    made_with |= identities(plan.env_identity, plan.dataset)
    agent = plan.config.agent
    made_of = agent, agent, plan.inputs, plan.config, made_with
    run = new_run("pretrain", *made_of, name=name, runs=runs, say=say)
    with run, writing(run, say, new=True) as stop:
        say(plan.header)
        say(f"run         {run.path}")
        loop = _loop(plan.config, plan.dataset, plan.inputs)
        run.save_checkpoint(0, loop.state_dict(), loop.info())
        _drive_offline(run, loop, Saver(run, loop, stop, checkpoint_seconds), say)
    return run


def resume_pretrain(
    run_name: str | Path,
    *,
    runs: str | Path = "runs",
    threads: int | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    say: Say = say_plain,
) -> RunDir:
    """Continue an interrupted offline phase; the result is bitwise that of an uninterrupted one."""
    found = unfinished("pretrain", PretrainConfig, run_name, runs, threads)
    with found as (run, inputs, config):
        if ":" in config.agent:
            require_trusted(run, inputs, config.safety, config.agent)
        config = replace(config, agents=with_own_settings(config.agent, config.agents))
        configure(inputs.threads)
        device = find_device(inputs.device)  # This and the next line refuse what cannot go on.
        choose_compute(stored_mode(inputs), config.precision, config.steps, device)
        dataset = stored_dataset(inputs, config.safety, discount_of(config))
        loop = _loop(config, dataset, inputs)
        with writing(run, say) as stop:
            checkpoint = bring_back(run, loop)
            say(f"resume      {run.path} from step {checkpoint.step:,}")
            _drive_offline(run, loop, Saver(run, loop, stop, checkpoint_seconds), say)
    return run


def _loop(config: PretrainConfig, dataset: Dataset, inputs: RunInputs) -> Pretraining:
    return Pretraining(config, dataset, compiled=inputs.compiled, device=inputs.device)


def _drive_offline(run: RunDir, loop: Pretraining, saver: Saver, say: Say) -> None:
    show = None if say is say_plain else say
    begun = {loop.step, *loop.begins}
    with contextlib.closing(ProgressLine(loop.total_steps, loop.step, show)) as progress:
        for record in loop.steps():
            if loop.step - 1 in begun:
                progress.restart()  # The first step of each part compiles.
            if record is not None:
                run.log(record.step, record.values)
            progress.update(loop.step, record and _offline_line(record))
            if loop.step < loop.total_steps:
                saver.save_if_due(loop.step)
            else:
                saver.save(loop.step)
    report, *further = loop.calibrations()
    content = plain(report.as_dict())
    run.write_json("calibration.json", content)
    curves = {k: float(v) for k, v in content.items() if isinstance(v, bool | int | float)}
    run.log(loop.total_steps, {f"offline/calibration/{k}": v for k, v in curves.items()})
    save_calibration(run, "safety_critic", loop.total_steps, report_png(report))
    for more in further:
        run.write_json(f"calibration_{more.constraint}.json", plain(more.as_dict()))
    run.set_status("finished")
    say(str(report))
    for more in further:  # but for the line of the shield, which is that of the first limit
        lines = str(more).splitlines()
        say("\n".join(line for line in lines if not line.startswith("shield")))
    say(f"finished    {run.path}")


def _offline_line(record: Record) -> str:
    wanted = {
        "offline/learner/critic_loss": "critic loss",
        "offline/learner/actor_loss": "actor loss",
        "offline/csc/estimate": "estimate",
        "offline/csc/alpha": "alpha",
        "offline/lambda": "lambda",
    }
    shown = [f"{label} {record.values[k]:.3g}" for k, label in wanted.items() if k in record.values]
    return " | ".join(shown)
