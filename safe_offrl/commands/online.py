"""The online phase as a command: run, resume."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from safe_offrl.commands.common import say_plain, stored_pretrain_run
from safe_offrl.commands.environment import identities, require_same_environment
from safe_offrl.commands.filming import filming
from safe_offrl.commands.online_plan import FinetunePlan, plan_finetune
from safe_offrl.commands.phase import (
    CHECKPOINT_SECONDS,
    Saver,
    bring_back,
    interrupted,
    new_run,
    save_calibration,
    stored_mode,
    unfinished,
    writing,
)
from safe_offrl.config import to_dict
from safe_offrl.deploy.episodes import Reservation
from safe_offrl.errors import RunError
from safe_offrl.files import plain
from safe_offrl.record.checkpoints import fitting
from safe_offrl.record.kept_versions import REPLAY, keep_version
from safe_offrl.record.online_curves import OnlineCurves
from safe_offrl.record.progress import STOP_SECONDS, ProgressLine, Say
from safe_offrl.record.run import RunDir
from safe_offrl.record.trust import require_trusted
from safe_offrl.record.versions import versions
from safe_offrl.record.why import Reasons
from safe_offrl.report.calibration_chart import online_blocks, online_png
from safe_offrl.train.decisions import SELECTED
from safe_offrl.train.finetune import Finetuning
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.foundation import settings_of
from safe_offrl.train.iteration import Iteration
from safe_offrl.types import Episode

# What settings are held against on TensorBoard's HParams page.
FINAL_CURVES = (
    "safety/accident_rate",
    "safety/accidents_total",
    "safety/cost_mean",
    "online/return",
)


def finetune_run(
    plan: FinetunePlan,
    *,
    name: str | None = None,
    runs: str | Path = "runs",
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    say: Say = say_plain,
) -> RunDir:
    """Run a planned online phase in a new run folder; returns the finished run."""
    made_with = versions(plan.env.versions(), plan.inputs.device)
    made_with |= identities(plan.env.identity(), plan.dataset, stored_pretrain_run(plan.inputs))
    learner = plan.config.baseline.learner
    made_of = plan.agent, learner, plan.inputs, plan.config, made_with
    run = new_run("finetune", *made_of, name=name, runs=runs, say=say)
    with run, contextlib.closing(plan.env), writing(run, say, new=True) as stop:
        say(plan.header)
        say(f"run         {run.path}")
        loop = start_loop(plan)
        run.save_checkpoint(0, loop.state_dict(), loop.info())
        curves = OnlineCurves(loop.monitors, plan.config.budget)
        _drive(run, plan, loop, curves, Saver(run, loop, stop, checkpoint_seconds), say)
    return run


def resume_finetune(
    run_name: str | Path,
    *,
    runs: str | Path = "runs",
    threads: int | None = None,
    accept_risk: bool = False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    say: Say = say_plain,
) -> RunDir:
    """Continue an interrupted online phase; RunError in another environment than it began in.

    With ``accept_risk`` it goes on there, and its record says so.

    In a simulation, episodes after the last checkpoint are played again and must come out as the
    ledger has them; the result is bitwise that of an uninterrupted run. In reality, they are
    counted as the ledger has them, and one that was cut off counts as an accident.
    """
    found = unfinished("finetune", FinetuneConfig, run_name, runs, threads)
    with found as (run, inputs, config):
        # Plan, as when the run began.
        require_trusted(run, inputs, config.safety, config.baseline.learner)
        plan = plan_finetune(
            stored_pretrain_run(inputs),
            config,
            threads=inputs.threads,
            device=inputs.device,
            compile_mode=stored_mode(inputs),
            accept_risk=True,  # It was settled when the run began.
        )
        # The same policy and environment.
        if plan.pretrained.sha256 != inputs.pretrained_sha256:
            raise RunError(
                f'The pretrain run "{inputs.pretrained}" has changed since "{run.name}" started '
                "from it. Restore it, or start a new run."
            )
        with contextlib.closing(plan.env):
            require_same_environment(run, plan.env, accept_risk, say)
            loop = start_loop(plan)
            # Loop, from the newest checkpoint on.
            with writing(run, say) as stop:
                checkpoint = bring_back(run, loop)
                # Its policy is not the one that the run will end with.
                for stale in ("evaluation.json", REPLAY):
                    (run.path / stale).unlink(missing_ok=True)
                curves = OnlineCurves(loop.monitors, config.budget)
                curves.restore(run.episodes()[: checkpoint.counts["ledger"]], run.iterations())
                say(f"resume      {run.path} from step {checkpoint.step:,}")
                _drive(run, plan, loop, curves, Saver(run, loop, stop, checkpoint_seconds), say)
    return run


def start_loop(plan: FinetunePlan) -> Finetuning:
    """The online loop before its first step."""
    pretrained = plan.pretrained
    with fitting(plan.inputs.pretrained or ""):
        return Finetuning(
            plan.config,
            plan.env,
            plan.dataset,
            pretrained.tensors,
            pretrained.info,
            compiled=plan.inputs.compiled,
            device=plan.inputs.device,
        )


def _drive(
    run: RunDir, plan: FinetunePlan, loop: Finetuning, curves: OnlineCurves, saver: Saver, say: Say
) -> None:
    # State between events.
    run.board.describe({"agent": plan.agent, **to_dict(plan.config)}, FINAL_CURVES)
    stop = saver.stop
    real = plan.config.env.kind == "real"
    show_line = None if say is say_plain else say
    alarmed = loop.alarm  # one that has sounded was said before a resume
    config = plan.config
    steered = plan.limits if config.safety_constraint else ()
    reasons = Reasons(
        (limit, settings_of(config, "lagrangian", limit.quantity, config.lagrangian))
        for limit in steered
    )
    # What a resumed run has said already.
    reasons.restore((e for e in run.episodes() if e.total_steps <= curves.step), run.iterations())
    seen: set[str] = set()  # phases of which an episode was played, and what follows it compiled
    with (
        contextlib.closing(ProgressLine(plan.config.budget, curves.step, show_line)) as progress,
        filming(run, loop, say) as show,
    ):
        keep = _keeping(run, loop)
        for event in loop.run(run.recorded):
            if isinstance(event, Reservation):
                # An episode that begins.
                if stop.number:
                    saver.save_if_due(curves.step)
                run.reserve_episode(event.worst)  # It is on disk before its first step.
                stop.hold()  # What is cut off in reality counts as an accident.
            elif isinstance(event, Episode):
                # An ended episode is on record before anything else can happen. What can be played
                # again need not outlive a power cut; an environment that failed may not fail again.
                run.append_episode(event, sync=real or event.outcome != "complete")
                stop.release()
                reasons.see(event)
                keep(event)
                show(event)
                if event.outcome == "fault" and loop.fault:
                    say(f"fault       in episode {event.index:,}: {loop.fault}")
                if loop.alarm and not alarmed:
                    say(_alarm_line(loop, event))
                alarmed = loop.alarm
                if curves.add_episode(event):
                    run.log(event.total_steps, curves.values())
                progress.update(event.total_steps, curves.line())
                if event.phase not in seen:
                    seen.add(event.phase)
                    progress.restart()
                # What was lived cannot be lived again: not only after an iteration.
                if real:
                    saver.save_if_due(event.total_steps)
                elif stop.number and time.monotonic() - stop.since > STOP_SECONDS:
                    # The iteration takes too long. Its episodes are in the ledger, and a resume
                    # plays them again from the last checkpoint.
                    raise interrupted(run, stop.number, event.total_steps)
            else:
                # A decision on a candidate.
                if event.reason.startswith(SELECTED):
                    say(f"selected    step {event.step:,}: {event.reason.removeprefix(SELECTED)}")
                elif alarmed and not loop.alarm:
                    done = event.reason.removeprefix("alarm: ")
                    delta = f"delta is {event.delta:g} from here on"
                    say(f"alarm       step {event.step:,}: {done}; {delta}")
                alarmed = loop.alarm
                decision = {k: v for k, v in plain(event).items() if k != "metrics"}
                if not event.further:
                    del decision["further"]  # of one limit there is nothing to say
                for text in reasons.take(decision):
                    say(f"why         step {event.step:,}: {text}")
                run.log_iteration(decision)
                curves.add_iteration(decision)
                run.log(event.step, {**_decision_values(event), **curves.trust(), **event.metrics})
                saver.save_if_due(event.step)
    stop.hold()
    if alarmed and _answers_alarms(loop):
        say(
            "alarm       the run ended before a decision answered it: the last policy may exceed "
            "the limit"
        )
    if tested := loop.decisions.selection.tested:
        chosen = loop.decisions.selection.words()
        say(f"handed over {chosen}; {tested} of them tested it")
    # The last line comes after the last checkpoint, so that a resume from it writes it once.
    saver.save(curves.step)
    _finish(run, plan, curves, loop.stopped, say)


def _finish(run: RunDir, plan: FinetunePlan, curves: OnlineCurves, stopped: str, say: Say) -> None:
    """Last line, calibration and status of a run whose last checkpoint is written."""
    run.log(curves.step, curves.values())
    first = plan.limits[0]
    constraint = first.constraint
    if blocks := online_blocks(run.episodes(), run.iterations(), constraint):
        png = online_png(blocks, constraint, first.value)
        save_calibration(run, "online", curves.step, png)
    run.set_status("finished", reason=stopped)
    say(f"finished    {run.path}: {stopped}")


def _keeping(run: RunDir, loop: Finetuning) -> Callable[[Episode], None]:
    """What to call with each episode of an online phase: whoever acted in it is kept, once."""
    kept: set[int] = set()
    random = loop.config.baseline.from_scratch  # in the warm-up: nobody's version

    def keep(episode: Episode) -> None:
        policy = loop.policy
        if policy.version in kept or policy.version != episode.version:
            return
        if not (random and episode.phase == "warmup"):
            keep_version(run.path, policy)
            kept.add(policy.version)

    return keep if loop.config.keep_versions else lambda _: None


def _answers_alarms(loop: Finetuning) -> bool:
    return loop.config.safety_constraint and not loop.config.untested


def _alarm_line(loop: Finetuning, episode: Episode) -> str:
    """What has happened when the monitor's alarm sounds, and what the run does now."""
    safety = loop.config.safety
    exceeded = [monitor.limit for monitor in loop.monitors if monitor.alarm]
    limit = " and ".join(limit.quantity.limit_text(limit.value) for limit in exceeded)
    if loop.config.probation and not loop.decisions.iterations:
        then = "the run is on probation, and ends here"
    elif loop.config.testing(loop.steps):
        then = "the next version to be tested is another one, where there is one"
    elif _answers_alarms(loop):
        then = (
            f"its policy acts on until the next decision, from step {loop.next_proposal:,} on, "
            "which is on going back to an earlier one"
        )
    else:
        then = "the run goes on as it is: its settings take no policy back"
    return (
        f"alarm       episode {episode.index:,}: the episodes so far show, at "
        f"{100 * safety.confidence:g} % confidence, that some policy of this run exceeded {limit}; "
        f"{then}"
    )


def _decision_values(event: Iteration) -> dict[str, float]:
    """The decision's numbers as curves; its reason stays in iterations.jsonl."""
    further = {
        f"safety/{key}/{limit.constraint}": getattr(limit, key)
        for limit in event.further
        for key in ("v_previous", "multiplier", "alpha")
    }
    return {
        "iteration/index": float(event.index),
        "iteration/accepted": float(event.accepted),
        "iteration/constraints_satisfied": float(event.constraints_satisfied),
        "safety/v_previous": event.v_previous,
        "trust/delta": event.delta,
        "trust/kl": max(event.kl_forward_mean, event.kl_reverse_mean),
        "trust/kl_tail": max(event.kl_forward_tail, event.kl_reverse_tail),
        "trust/fraction": event.fraction,
        "safety/multiplier": event.multiplier,
        "safety/alpha": event.alpha,
        "trust/kl_weight": event.kl_weight,
        "safety/version": float(event.version),
        **further,
    }
