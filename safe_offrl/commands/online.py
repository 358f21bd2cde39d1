"""The online phase as a command: plan, run, resume."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safe_offrl.calibration_chart import online_blocks, online_png
from safe_offrl.checkpoints import Checkpoint
from safe_offrl.commands.assess import Subject, gate
from safe_offrl.commands.common import (
    CHECKPOINT_SECONDS,
    STOP_SECONDS,
    bring_back,
    constraint_line,
    data_line,
    device_line,
    interrupted,
    loading,
    require_same_threads,
    require_unfinished,
    save_calibration,
    say_plain,
    stopped_by_environment,
    stored_dataset,
    stored_mode,
    stored_pretrain_run,
)
from safe_offrl.commands.filming import filming
from safe_offrl.commands.trust import require_trusted, trust_own
from safe_offrl.config import RunInputs, load_config, parse_run_yaml, run_yaml, to_dict
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.validation import check_matches_env
from safe_offrl.descent import CompileMode, choose
from safe_offrl.device import Device, configure, find_device
from safe_offrl.env import AccidentEnv, make_env
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.files import plain
from safe_offrl.finetune import Finetuning
from safe_offrl.finetune_config import COST_DEFAULTS, FinetuneConfig
from safe_offrl.iteration import Iteration
from safe_offrl.monitor import Certifiable, certifiable
from safe_offrl.pretrain import PretrainConfig, discount_of
from safe_offrl.progress import OnlineCurves, ProgressLine, Say, StopSignal
from safe_offrl.rollout import Reservation
from safe_offrl.run import RunDir, find_run, versions
from safe_offrl.safety import Limit
from safe_offrl.types import Episode
from safe_offrl.videos import require_pictures

# What settings are held against on TensorBoard's HParams page.
FINAL_CURVES = (
    "safety/accident_rate",
    "safety/accidents_total",
    "safety/cost_mean",
    "online/return",
)

REAL_LINE = (
    "kind        real: an episode's steps are on record before its first one, and one that is cut "
    "off counts as an accident"
)


@dataclass(frozen=True)
class FinetunePlan:
    """Everything that is decided before the first step in the environment."""

    config: FinetuneConfig
    inputs: RunInputs
    agent: str
    env: AccidentEnv
    dataset: Dataset
    pretrained: Checkpoint
    shield_refusals: tuple[str, ...]
    limit: Limit  # what is constrained, in the safety critic's unit
    certifiable: Certifiable  # what the budget can prove at best
    compiling: str  # whether, and why, in words

    @property
    def header(self) -> str:
        """What a person should know before it starts, above all what the budget can prove."""
        config, safety = self.config, self.config.safety
        shield = "shield" if not self.shield_refusals else "shield (abstains)"
        parts = {
            "KL": config.kl,
            "accident constraint"
            if safety.constraint == "accident"
            else "cost constraint": config.safety_constraint,
            shield: config.shield,
        }
        on = [name for name, active in parts.items() if active]
        why = f"; abstains for {'; '.join(self.shield_refusals)}" if config.shield else ""
        limit = config.accident_budget
        warm_up = f"{config.warmup_steps:,} steps of the pretrained policy, then learning"
        if config.warmup_steps >= config.budget:
            warm_up = "the whole budget: nothing will be learnt (set warmup_steps)"
        return "\n".join(
            [
                f"finetune    {self.inputs.env_id}, budget {config.budget:,} steps"
                + (f", at most {limit} accidents" if limit is not None else "")
                + f", seed {config.seed}, from {self.inputs.pretrained}",
                data_line(self.dataset, self.inputs),
                constraint_line(safety, self.env.horizon),
                f"active      {', '.join(on) if on else 'nothing: plain RLPD'}"
                + (why if self.shield_refusals else ""),
                *([REAL_LINE] if config.env.kind == "real" else []),
                f"warm-up     {warm_up}",
                f"provable    {self.certifiable}",
                f"risk        {self.inputs.risk}",
                device_line(self.inputs, config.precision, self.compiling),
            ]
        )


def finetune_config(
    pretrained: RunDir,
    *,
    budget: int | None = None,
    epsilon: float | None = None,
    cost_limit: float | None = None,
    delta: float | None = None,
    accident_budget: int | None = None,
    videos: int | None = None,
    seed: int | None = None,
    kl: bool | None = None,
    safety_constraint: bool | None = None,
    shield: bool | None = None,
    overrides: Sequence[str] = (),
) -> FinetuneConfig:
    """Resolve the settings of an online phase; what an accident is comes from the pretrain run."""
    inputs, source = parse_run_yaml(
        pretrained.config_text, "pretrain", PretrainConfig, pretrained.path
    )
    given = {
        "budget": budget,
        "safety.epsilon": epsilon,
        "safety.cost_limit": cost_limit,
        "safety.delta": delta,
        "accident_budget": accident_budget,
        "videos": videos,
        "seed": seed,
        "kl": kl,
        "safety_constraint": safety_constraint,
        "shield": shield,
    }
    # What an accident is must not change between the phases, so it overrides the preset too.
    flags = {f"safety.{key}": value for key, value in to_dict(source.safety).items()}
    flags |= {key: value for key, value in given.items() if value is not None}
    defaults = COST_DEFAULTS if source.safety.constraint == "cost" else {}
    config = load_config(
        FinetuneConfig,
        section="finetune",
        env_id=inputs.env_id,
        inherited={
            **defaults,
            "networks": to_dict(source.networks),
            "critic": {**to_dict(source.critic), **defaults.get("critic", {})},
            "baseline": {"agents": to_dict(source.agents)},
        },
        flags=flags,
        overrides=overrides,
    )
    if config.baseline.learner == "iql" and source.agent != "iql":
        raise ConfigError(
            f'baseline.learner is iql, but "{pretrained.name}" was pretrained by {source.agent}, '
            "which has no value network. Pretrain with --agent iql."
        )
    shapes = ("members", "reference", "hidden")
    if config.networks != source.networks or any(
        getattr(config.critic, key) != getattr(source.critic, key) for key in shapes
    ):
        raise ConfigError(
            f'The networks are those of the pretrain run "{pretrained.name}" and cannot be '
            "resized. Leave networks.* and the critic's sizes out, or pretrain with them."
        )
    return config


def plan_finetune(
    pretrained: RunDir,
    config: FinetuneConfig,
    *,
    threads: int = 1,
    device: Device | None = None,
    compile_mode: CompileMode | None = None,
    accept_risk: bool = False,
    say: Say = say_plain,
) -> FinetunePlan:
    """Check everything an online phase needs; takes no step in the environment.

    RunError unless the log shows that the pretrained policy keeps the limit (it is assessed first
    if it has not been), ``accept_risk`` is given or the constraint is off. ``device`` and
    ``compile_mode`` take the place of the configured ones.
    """
    configure(threads)
    updates = config.budget // config.update_every * config.utd
    device = find_device(device or config.device)
    compute, compiling = choose(compile_mode or config.compile, config.precision, updates, device)
    source, source_config = parse_run_yaml(
        pretrained.config_text, "pretrain", PretrainConfig, pretrained.path
    )
    require_trusted(pretrained, source, source_config.safety)
    if pretrained.state["status"] != "finished":
        raise RunError(
            f'The run "{pretrained.name}" is not finished. '
            f"Finish it with `safe-offrl pretrain --resume {pretrained.name}`."
        )
    env = make_env(source.env_id, config.safety, timeout=config.env.timeout)
    try:
        dataset = stored_dataset(source, config.safety, discount_of(source_config))
        sizes = env.observation_size, env.action_size
        check_matches_env(dataset, source.env_id, *sizes, discrete=env.discrete)
        limit = config.safety.limit(env.horizon, dataset.cost_max)
        if config.videos:
            require_pictures(env)
        checkpoint = pretrained.load_checkpoint()
        refusals = tuple(pretrained.read_json("calibration.json")["shield_refusals"])
        if "shield_acts" not in checkpoint.info:
            raise RunError(
                f'The run "{pretrained.name}" is of an earlier version, whose shield worked by a '
                "threshold. Pretrain again."
            )
        provable = certifiable(config.budget, env.horizon, limit, config.safety.confidence)
        # Last, for it may take a minute: every other mistake is found before.
        accepted = "accepted by --accept-risk" if accept_risk else None
        if not config.safety_constraint:
            accepted = "not limited"
        subject = Subject(pretrained, config.safety, dataset, checkpoint, source_config, source)
        risk = gate(subject, accepted=accepted, say=say)
        inputs = dataclasses.replace(
            source,
            threads=threads,
            compiled=compute.compiled,
            device=device,
            pretrained=str(pretrained.path.resolve()),
            pretrained_sha256=checkpoint.sha256,
            risk=risk,
        )
        return FinetunePlan(
            config=config,
            inputs=inputs,
            agent=source_config.agent,
            env=env,
            dataset=dataset,
            pretrained=checkpoint,
            shield_refusals=refusals,
            limit=limit,
            certifiable=provable,
            compiling=compiling,
        )
    except BaseException:
        env.close()
        raise


def finetune_run(
    plan: FinetunePlan,
    *,
    name: str | None = None,
    runs: str | Path = "runs",
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    say: Say = say_plain,
) -> RunDir:
    """Run a planned online phase in a new run folder; returns the finished run."""
    config_text = run_yaml(plan.inputs, "finetune", plan.config, Path(runs))
    trust_own(config_text, plan.inputs, plan.config.safety)
    run = RunDir.create(
        Path(runs),
        kind="finetune",
        config_text=config_text,
        name=name,
        stem=f"finetune-{plan.inputs.env_id.rpartition(':')[2]}-{plan.agent}",
        versions=versions(plan.env.versions()),
    )
    with run, contextlib.closing(plan.env):
        say(plan.header)
        say(f"run         {run.path}")
        loop = start_loop(plan)
        run.save_checkpoint(0, loop.state_dict(), loop.info())
        curves = OnlineCurves(plan.limit, plan.config.safety.confidence, plan.config.budget)
        _drive_finetuning(run, plan, loop, curves, checkpoint_seconds, say)
    return run


def resume_finetune(
    reference: str | Path,
    *,
    runs: str | Path = "runs",
    threads: int | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    say: Say = say_plain,
) -> RunDir:
    """Continue an interrupted online phase.

    In a simulation, episodes after the last checkpoint are played again and must come out as the
    ledger has them; the result is bitwise that of an uninterrupted run. In reality, they are
    counted as the ledger has them, and one that was cut off counts as an accident.
    """
    run = find_run(reference, Path(runs), "finetune")
    run.lock()
    with run:
        require_unfinished(run)
        inputs, config = parse_run_yaml(run.config_text, "finetune", FinetuneConfig, run.path)
        require_trusted(run, inputs, config.safety)
        require_same_threads(run, inputs, threads)
        plan = plan_finetune(
            stored_pretrain_run(inputs),
            config,
            threads=inputs.threads,
            device=inputs.device,
            compile_mode=stored_mode(inputs),
            accept_risk=True,  # it was settled when the run began
        )
        if plan.pretrained.sha256 != inputs.pretrained_sha256:
            raise RunError(
                f'The pretrain run "{inputs.pretrained}" has changed since "{run.name}" started '
                "from it. Restore it, or start a new run."
            )
        with contextlib.closing(plan.env):
            loop = start_loop(plan)
            checkpoint = bring_back(run, loop)
            curves = OnlineCurves(plan.limit, config.safety.confidence, config.budget)
            curves.restore(run.episodes()[: checkpoint.counts["ledger"]], run.iterations())
            say(f"resume      {run.path} from step {checkpoint.step:,}")
            _drive_finetuning(run, plan, loop, curves, checkpoint_seconds, say)
    return run


def start_loop(plan: FinetunePlan) -> Finetuning:
    """The online loop before its first step."""
    pretrained = plan.pretrained
    with loading(plan.inputs.pretrained or ""):
        return Finetuning(
            plan.config,
            plan.env,
            plan.dataset,
            pretrained.tensors,
            pretrained.info,
            compiled=plan.inputs.compiled,
            device=plan.inputs.device,
        )


def _drive_finetuning(
    run: RunDir,
    plan: FinetunePlan,
    loop: Finetuning,
    curves: OnlineCurves,
    checkpoint_seconds: float,
    say: Say,
) -> None:
    progress = ProgressLine(plan.config.budget, curves.step, None if say is say_plain else say)
    run.describe({"agent": plan.agent, **to_dict(plan.config)}, FINAL_CURVES)
    saved = time.monotonic()
    real = plan.config.env.kind == "real"
    with (
        StopSignal() as stop,
        stopped_by_environment(run),
        filming(run, loop, say) as show,
    ):
        for event in loop.run(run.recorded):
            if isinstance(event, Reservation):
                if stop.number:
                    run.save_checkpoint(curves.step, loop.state_dict(), loop.info())
                    raise interrupted(run, stop.number, curves.step)
                run.reserve_episode(event.worst)  # on disk before the first of its steps
            elif isinstance(event, Episode):
                # Before anything else can happen. What can be played again need not outlive a power
                # cut; an environment that failed may not fail again.
                run.append_episode(event, sync=real or event.outcome != "complete")
                show(event)
                if event.outcome == "fault" and loop.fault:
                    say(f"fault       in episode {event.index:,}: {loop.fault}")
                if curves.add_episode(event):
                    run.log(event.total_steps, curves.values())
                progress.update(event.total_steps, curves.line())
                # What was lived cannot be lived again: not only after an iteration.
                if real and (stop.number or time.monotonic() - saved > checkpoint_seconds):
                    run.save_checkpoint(event.total_steps, loop.state_dict(), loop.info())
                    saved = time.monotonic()
                if stop.number and time.monotonic() - stop.since > STOP_SECONDS:
                    # The iteration takes too long. Its episodes are in the ledger, and a resume
                    # plays them again from the last checkpoint.
                    raise interrupted(run, stop.number, event.total_steps)
            else:
                decision = {k: v for k, v in plain(event).items() if k != "metrics"}
                run.log_iteration(decision)
                curves.add_iteration(decision)
                run.log(event.step, {**_decision_values(event), **curves.trust(), **event.metrics})
                if stop.number or time.monotonic() - saved > checkpoint_seconds:
                    run.save_checkpoint(event.step, loop.state_dict(), loop.info())
                    saved = time.monotonic()
                if stop.number:
                    raise interrupted(run, stop.number, event.step)
    progress.close()
    # The last line comes after the last checkpoint, so that a resume from it writes it once.
    run.save_checkpoint(curves.step, loop.state_dict(), loop.info())
    run.log(curves.step, curves.values())
    constraint = plan.limit.constraint
    if blocks := online_blocks(run.episodes(), run.iterations(), constraint):
        png = online_png(blocks, constraint, plan.limit.value)
        save_calibration(run, "online", curves.step, png)
    run.set_status("finished", reason=loop.stopped)
    say(f"finished    {run.path}: {loop.stopped}")


def _decision_values(event: Iteration) -> dict[str, float]:
    """The decision's numbers as curves; its reason stays in iterations.jsonl."""
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
    }
