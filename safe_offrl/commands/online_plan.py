"""What an online phase is to be, decided and checked before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Unpack

from safe_offrl.agents import find_agent, find_online, learner_after, require_learner
from safe_offrl.commands.active_parts import active_line, learner_lines, pretrained_policy
from safe_offrl.commands.assess import Subject
from safe_offrl.commands.common import (
    constraint_line,
    data_line,
    device_line,
    say_plain,
    stored_dataset,
    warning_lines,
    with_own_settings,
)
from safe_offrl.commands.environment import learnt_lines, since_log, since_run
from safe_offrl.commands.gate import gate, probation_lines
from safe_offrl.commands.given_limits import (
    Limits,
    given_limits,
    require_given_once,
    require_own_limit,
    require_same_limits,
)
from safe_offrl.compute.descent import CompileMode, choose_compute
from safe_offrl.compute.device import Device, configure, find_device
from safe_offrl.config import load_config, to_dict
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.validation import check_matches_env
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.limits import Limit
from safe_offrl.record.checkpoints import Checkpoint
from safe_offrl.record.final_policy import stored_policy
from safe_offrl.record.progress import Say
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import RunInputs, parse_run_yaml
from safe_offrl.record.trust import require_trusted
from safe_offrl.report.videos import require_pictures
from safe_offrl.safety.monitor import Certifiable, certifiable
from safe_offrl.spec import SafetySpec
from safe_offrl.stats.fixed import shared_confidence
from safe_offrl.train.controllers import controller_for
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.pretrain_config import PretrainConfig, discount_of
from safe_offrl.types import Normalizer

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
    held_out: float  # share of its episodes that the safety critic was calibrated on
    pretrained: Checkpoint
    refusals: Mapping[str, tuple[str, ...]]  # why the shield, and the guard, must abstain
    limits: tuple[Limit, ...]  # what is constrained, in the safety critics' units
    certifiable: tuple[Certifiable, ...]  # what the budget can prove at best, of each
    compiling: str  # whether, and why, in words
    changes: tuple[str, ...]  # header lines: how the environment differs from those learnt in

    @property
    def header(self) -> str:
        """What a person should know before it starts, above all what the budget can prove."""
        config, safety = self.config, self.config.safety
        # Warm-up.
        limit = config.accident_budget
        warm_up = f"{config.warmup_steps:,} steps of the pretrained policy, then learning"
        if config.warmup_steps >= config.budget:
            warm_up = "the whole budget: nothing will be learnt (set warmup_steps)"
        elif config.warmup_steps + config.iteration_steps > config.budget and not config.untested:
            warm_up += ", of which nothing will act: the first proposal comes after the budget"
        # Lines.
        return "\n".join(
            [
                f"finetune    {self.inputs.env_id}, budget {config.budget:,} steps"
                + (f", at most {limit} accidents" if limit is not None else "")
                + f", seed {config.seed}, from {self.inputs.pretrained}",
                data_line(self.dataset, self.inputs),
                *warning_lines(self.dataset, safety, self.held_out),
                *self.changes,
                constraint_line(safety, self.env.horizon),
                active_line(config, self.refusals),
                *learner_lines(config, self.agent),
                *([REAL_LINE] if config.env.kind == "real" else []),
                f"warm-up     {warm_up}",
                *(f"provable    {best}" for best in self.certifiable),
                f"risk        {self.inputs.risk}",
                *probation_lines(config, self.limits, self.env.horizon),
                device_line(self.inputs, config.precision, self.compiling),
            ]
        )


def inherited(source: PretrainConfig) -> dict[str, Any]:
    """Settings of an online phase that are the pretrain run's, or follow from its constraint."""
    defaults = source.safety.quantity.finetuning
    return {
        **defaults,
        "networks": to_dict(source.networks),
        "critic": {**to_dict(source.critic), **defaults.get("critic", {})},
        "learner": {"discount": discount_of(source)},
        "baseline": {
            **defaults.get("baseline", {}),
            "learner": learner_after(source.agent),
            "agents": to_dict(source.agents),
        },
    }


class FinetuneSettings(Limits, total=False):
    """Settings of an online phase that have an option of their own; None means not given."""

    budget: int | None  # steps in the environment
    delta: float | None  # limit of the KL, in nats
    accident_budget: int | None
    videos: int | None
    keep_versions: bool | None
    seed: int | None
    kl: bool | None  # whether it is constrained
    safety_constraint: bool | None
    shield: bool | None
    guard: bool | None


def finetune_config(
    pretrained: RunDir,
    *,
    preset: str | Path | None = None,
    overrides: Sequence[str] = (),
    **settings: Unpack[FinetuneSettings],
) -> FinetuneConfig:
    """Resolve the settings of an online phase; what an accident is comes from the pretrain run.

    ``preset`` is a YAML file that takes the place of the environment's, see :func:`load_config`.
    """
    # The pretrain run.
    inputs, source = parse_run_yaml(
        pretrained.config_text, "pretrain", PretrainConfig, pretrained.path
    )
    require_own_limit(source.safety, settings)
    require_given_once(settings.get("limit"), overrides, settings, {})
    given = given_limits(source.safety, settings, overrides)
    of_safety = {field.name for field in fields(SafetySpec)}
    # What an accident is must not change between the phases, so it overrides the preset too.
    flags = {f"safety.{key}": value for key, value in to_dict(source.safety).items()}
    flags["safety.limits"] = given
    for key, value in settings.items():
        if value is not None and key != "limit":
            flags[f"safety.{key}" if key in of_safety else key] = value
    # Settings.
    config = load_config(
        FinetuneConfig,
        section="finetune",
        env_id=inputs.env_id,
        preset=preset,
        inherited=inherited(source),
        flags=flags,
        overrides=overrides,
    )
    # The rule that the critic learnt under.
    for key in ("accident", "cost_threshold", "constraint", "horizon", "signals"):
        learnt, asked = getattr(source.safety, key), getattr(config.safety, key)
        if learnt != asked:
            raise ConfigError(
                f'safety.{key} is {asked}, but the critic of "{pretrained.name}" learnt under '
                f"{learnt}. Leave it out, or pretrain with it."
            )
    require_same_limits(source.safety, config.safety, pretrained.name)
    # Discount and learner.
    config = _with_own_settings(config)
    _require_one_discount(config, discount_of(source), pretrained.name)
    learner = config.baseline.learner
    if learner not in ("rlpd", source.agent) and find_online(learner).own_values:
        raise ConfigError(
            f'baseline.learner is {learner}, but "{pretrained.name}" was pretrained by '
            f"{source.agent}, which has not its values. Pretrain with --agent {learner}."
        )
    # Sizes of the networks.
    shapes = ("members", "reference", "hidden")
    if config.networks != source.networks or any(
        getattr(config.critic, key) != getattr(source.critic, key) for key in shapes
    ):
        raise ConfigError(
            f'The networks are those of the pretrain run "{pretrained.name}" and cannot be '
            "resized. Leave networks.* and the critic's sizes out, or pretrain with them."
        )
    return config


def _with_own_settings(config: FinetuneConfig) -> FinetuneConfig:
    """Settings in which those of the agent that goes on online are complete; imports its module."""
    baseline = config.baseline
    if baseline.learner == "rlpd":
        return config
    agents = with_own_settings(baseline.learner, baseline.agents)
    return replace(config, baseline=replace(baseline, agents=agents))


def _require_one_discount(config: FinetuneConfig, learnt: float, name: str) -> None:
    key, discount = "learner.discount", config.learner.discount
    if config.baseline.learner != "rlpd":
        agent, agents = find_agent(config.baseline.learner), config.baseline.agents
        key, discount = (
            f"baseline.agents.{agents.key(agent)}.discount",
            agents.settings_for(agent).discount,
        )
    if discount not in (None, learnt) and not config.baseline.from_scratch:
        raise ConfigError(
            f'{key} is {discount}, but the values of "{name}" are discounted by {learnt}. Leave it '
            "out, or pretrain with it."
        )


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

    Where the log does not show that the pretrained policy keeps the limit (it is assessed first if
    it has not been) the run is on probation. RunError where the log shows that it does not, and in
    reality without an accident budget, unless ``accept_risk`` is given or the constraint is off.
    ``device`` and ``compile_mode`` take the place of the configured ones.
    """
    # Compute.
    configure(threads)
    updates = config.budget // config.update_every * config.utd
    device = find_device(device or config.device)
    compute, compiling = choose_compute(
        compile_mode or config.compile, config.precision, updates, device
    )
    # The pretrain run.
    source, source_config = parse_run_yaml(
        pretrained.config_text, "pretrain", PretrainConfig, pretrained.path
    )
    require_trusted(pretrained, source, source_config.safety)
    config = _with_own_settings(config)
    _require_finished(pretrained)
    # Environment.
    env = make_env(source.env_id, config.safety, timeout=config.env.timeout)
    try:
        _require_same_horizon(source, env, pretrained.name)
        # Dataset and limit.
        dataset = stored_dataset(source, config.safety, discount_of(source_config))
        sizes = env.observation_size, env.action_size
        check_matches_env(dataset, source.env_id, *sizes, discrete=env.discrete)
        largest = dataset.cost_max, dataset.signals_max
        limits = config.safety.all_limits(env.horizon, *largest)
        if config.videos:
            require_pictures(env)
        # Pretrained policy and shield.
        checkpoint, refusals = pretrained_policy(pretrained, limits)
        if not config.baseline.from_scratch:
            kind = stored_policy(pretrained, checkpoint).actor.kind
            require_learner(config.baseline.learner, kind)
        controller_for(config, env, Normalizer.restored(checkpoint.tensors))
        confidence = shared_confidence(config.safety.confidence, len(limits))
        provable = tuple(
            certifiable(config.budget, env.horizon, limit, confidence) for limit in limits
        )
        # The risk comes last, for it may take a minute: every other mistake is found before.
        accepted = "accepted by --accept-risk" if accept_risk else None
        if not config.safety_constraint:
            accepted = "not limited"
        elif config.baseline.from_scratch:
            accepted = "not that of the pretrained policy"
        subject = Subject(pretrained, config.safety, dataset, checkpoint, source_config, source)
        # In reality an accident is one: how many are allowed is not ours to say.
        allowed = config.env.kind != "real" or config.accident_budget is not None
        risk, probation = gate(subject, accepted=accepted, allowed=allowed, say=say)
        config = replace(config, probation=config.probation or probation)
        # Changes of the environment.
        identity = env.identity()
        changes = learnt_lines(since_log(dataset, identity), since_run(pretrained, identity))
        if changes:
            risk = f"{risk}; judged in another environment"
        # Plan.
        inputs = replace(
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
            held_out=source_config.held_out,
            pretrained=checkpoint,
            refusals=refusals,
            limits=limits,
            certifiable=provable,
            compiling=compiling,
            changes=tuple(changes),
        )
    except BaseException:
        env.close()
        raise


def _require_finished(pretrained: RunDir) -> None:
    if pretrained.state["status"] != "finished":
        raise RunError(
            f'The run "{pretrained.name}" is not finished. '
            f"Finish it with `safe-offrl pretrain --resume {pretrained.name}`."
        )


def _require_same_horizon(source: RunInputs, env: AccidentEnv, name: str) -> None:
    """ConfigError if episodes have another length than those that the run ``name`` learnt from."""
    if source.horizon not in (None, env.horizon):
        raise ConfigError(
            f'An episode of "{source.env_id}" has {env.horizon} steps now, but '
            f'"{name}" learnt what happens within {source.horizon}. Register the '
            "environment as it was, or pretrain again."
        )
