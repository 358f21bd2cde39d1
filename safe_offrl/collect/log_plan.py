"""How a dataset is logged, what that takes, and how it is made to fit into so many steps."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np

from safe_offrl.collect.behaviours import random_behaviour, scripted_behaviours
from safe_offrl.collect.dropped import Dropped
from safe_offrl.collect.mixture import tell
from safe_offrl.collect.sb3 import (
    PARALLEL_ENVS,
    SAC_START,
    TRAINING_STAGES,
    LearnersConfig,
    PPOConfig,
    SACConfig,
    resolved,
    trainings,
)
from safe_offrl.env.adapter import AccidentEnv, episode_seed
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, EnvFault
from safe_offrl.record.env_report import EnvReport
from safe_offrl.record.progress import Say
from safe_offrl.spec import SafetySpec

PILOT_EPISODES = 250  # per behaviour, at most
SHORTEST_ROLLOUT = 16  # of each parallel environment, that PPO is given where steps are few
LONG = 600.0  # seconds of a log that need a word
TRIAL_STEPS, TRIAL_SECONDS = 100, 2.0  # behind a figure for the speed, whichever is reached first

AlgorithmConfig = TypeVar("AlgorithmConfig", PPOConfig, SACConfig)


@dataclass(frozen=True)
class CollectConfig:
    """How a dataset is logged.

    ``transitions``: at least so many, in whole episodes. ``unsafe_share``: share of the episodes
    that shall be unsafe, that is have an accident or, where the expected cost is constrained, cost
    more than the limit. ``pilot_share``: steps of the pilot, all behaviours together, as a share of
    the log's. ``workers``: processes that train at the same time; the log does not depend on it.
    """

    transitions: int = 100_000
    seed: int = 0
    unsafe_share: float = 0.15
    pilot_share: float = 1.0
    workers: int = 2
    learners: LearnersConfig = field(default_factory=LearnersConfig)

    def __post_init__(self) -> None:
        """Refuse values outside their range; comparisons are written so that NaN is refused too."""
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, but 0 or more is needed. Try 0.")
        if self.transitions < 1 or self.workers < 1:
            raise ConfigError(
                f"{self.transitions} transitions cannot be collected by {self.workers} workers. "
                "Ask for at least 1 of each."
            )
        if not 0.0 <= self.unsafe_share <= 1.0:
            raise ConfigError(
                f"The target share of unsafe episodes is {self.unsafe_share}, but a number in "
                "[0, 1] is needed. Try 0.15."
            )
        if not 0.0 < self.pilot_share < math.inf:
            raise ConfigError(
                f"collect.pilot_share is {self.pilot_share}, but a number above 0 is needed. "
                "Try 1: as many steps as the log."
            )


class LogPlan(NamedTuple):
    """Steps in the environment that a log takes, at most, and what they are for."""

    trainings: int
    pilot: int
    log: int
    trial: int = 0  # of its speed, see steps_per_second()

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)

    def __str__(self) -> str:
        """For people."""
        return (
            f"{self.total:,} steps in the environment: {self.trainings:,} of trainings, up to "
            f"{self.pilot:,} of the pilot and {self.log:,} of the log"
        )


def spelt_out(
    config: CollectConfig, env: AccidentEnv, spec: SafetySpec, scripted: int
) -> CollectConfig:
    """The settings with all that depends on the environment and its ``scripted`` controllers."""
    learners = resolved(config.learners, spec, scripted=scripted > 0, discrete=env.discrete)
    return replace(config, learners=learners)


def plan_log(config: CollectConfig, env: AccidentEnv, scripted: int) -> LogPlan:
    """What a log with resolved learners takes at most, beside ``scripted`` controllers.

    Episodes are whole: the last one of the log, and of each behaviour in the pilot, may go on for a
    horizon.
    """
    taken = trainings(config.learners, discrete=env.discrete)
    behaviours = scripted + 1 + len(TRAINING_STAGES) * len(taken)
    over = env.horizon - 1
    each = math.ceil(config.pilot_share * config.transitions / behaviours) + over
    pilot = behaviours * min(each, PILOT_EPISODES * env.horizon)
    return LogPlan(sum(taken), pilot, config.transitions + over, TRIAL_STEPS)


def bounded(config: CollectConfig, env: AccidentEnv, scripted: int, steps: int) -> CollectConfig:
    """The largest of the configurations like this one that takes ``steps`` at most.

    Trainings and log are shortened by one factor, and the pilot with the log. A training that
    becomes too short to learn anything is left out. ConfigError where not even one episode each
    fits.
    """
    low, high = 0.0, 1.0
    least = plan_log(_scaled(config, low), env, scripted).total
    if least > steps:
        raise ConfigError(
            f"{steps:,} steps are too few for a log of {env.env_id}: an episode of each behaviour "
            f"in the pilot and one that is logged may take {least:,}. Give at least as many."
        )
    if plan_log(config, env, scripted).total <= steps:
        return config
    for _ in range(50):
        middle = 0.5 * (low + high)
        fits = plan_log(_scaled(config, middle), env, scripted).total <= steps
        low, high = (middle, high) if fits else (low, middle)
    found = _scaled(config, low)
    if _trains(config) and not _trains(found):  # What the trainings leave is the log's.
        untrained = replace(config, learners=_scaled(config, 0.0).learners)
        return bounded(untrained, env, scripted, steps)
    return found


def steps_to_train(config: CollectConfig, env: AccidentEnv, scripted: int) -> int:
    """Steps that a log like this one takes at least if anything is to be trained for it."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if _trains(_scaled(config, middle)) else (middle, high)
    return plan_log(_scaled(config, high), env, scripted).total


def _trains(config: CollectConfig) -> bool:
    learners = config.learners
    return any(each.steps or each.penalised_steps for each in (learners.ppo, learners.sac))


def fitted(
    env: AccidentEnv,
    spec: SafetySpec,
    config: CollectConfig,
    scripted: int,
    steps: int | None,
    minutes: float | None,
    progress: Say | None,
) -> CollectConfig:
    """The settings spelt out and within the bound; says what they take before anything begins."""
    # Settings, spelt out and within the bound.
    whole = config = spelt_out(config, env, spec, scripted)
    rate = steps_per_second(env)
    if minutes is not None:
        steps = math.floor(60.0 * minutes * rate)
    if steps is not None:
        config = bounded(config, env, scripted, steps)
    # Plan.
    plan = plan_log(config, env, scripted)
    speed = f"at {rate:,.0f} steps a second"
    tell(progress, f"plan: {plan}; {duration(plan.total / rate)} {speed}, learning apart")
    if steps is None and plan.total / rate > LONG:
        tell(
            progress,
            f"for a shorter one: safe-offrl collect --env {env.env_id} --minutes 30 --out FILE",
        )
    # What the bound takes away.
    if config != whole:
        full = plan_log(whole, env, scripted)
        tell(
            progress,
            f"bounded to {steps:,} steps: {config.transitions:,} transitions instead of "
            f"{whole.transitions:,}, which take {full.total:,} steps in all, "
            f"{duration(full.total / rate)}",
        )
        if _trains(whole) and not _trains(config):
            needed = steps_to_train(whole, env, scripted)
            tell(
                progress,
                "warning: too few steps to train anything, so the log is of scripted and random "
                f"actions alone; a training takes {needed:,} steps in all, "
                f"{duration(needed / rate)} and the learning",
            )
    return config


def _scaled(config: CollectConfig, factor: float) -> CollectConfig:
    """Trainings and log with this share of their steps."""
    learners = replace(
        config.learners,
        ppo=_shortened(config.learners.ppo, factor),
        sac=_shortened(config.learners.sac, factor),
    )
    transitions = max(1, math.floor(factor * config.transitions))
    return replace(config, learners=learners, transitions=transitions)


def _shortened(settings: AlgorithmConfig, factor: float) -> AlgorithmConfig:
    """A learner's settings with this share of its steps; a training that is too short has none."""
    steps, penalised = (math.floor(factor * n) for n in (settings.steps, settings.penalised_steps))
    if isinstance(settings, SACConfig):
        shortest = 2 * SAC_START
        return replace(
            settings,
            steps=steps * (steps >= shortest),
            penalised_steps=penalised * (penalised >= shortest),
        )
    stages = len(TRAINING_STAGES) * PARALLEL_ENVS
    steps *= steps >= stages * SHORTEST_ROLLOUT
    penalised *= penalised >= stages * SHORTEST_ROLLOUT
    wanted = [n // stages for n in (steps, penalised) if n]
    rollout = min(settings.rollout, *wanted) if wanted else settings.rollout
    return replace(settings, steps=steps, penalised_steps=penalised, rollout=rollout)


def steps_per_second(env: AccidentEnv, seed: int = 0) -> float:
    """How fast the environment is with random actions, resets included; takes up to 2 seconds.

    EnvError if it cannot be used, or fails in too many episodes in a row.
    """
    steps, episode, ended = 0, 0, True
    controller = random_behaviour(env.action_size).factory(np.random.default_rng(seed))
    observation, dropped = np.zeros(0, np.float32), Dropped()
    start = time.perf_counter()
    while steps < TRIAL_STEPS and (not steps or time.perf_counter() - start < TRIAL_SECONDS):
        try:
            if ended:
                episode += 1
                observation, _ = env.reset(seed=episode_seed(seed, episode, "trial"))
            steps += 1
            observation, _, terminated, truncated, _ = env.step(controller(observation))
        except EnvFault as fault:
            dropped.add(fault)
            ended = True
        else:
            ended = terminated or truncated
            if ended:
                dropped.completed()
    return steps / (time.perf_counter() - start)


def add_log_time(report: EnvReport, spec: SafetySpec, config: CollectConfig) -> None:
    """Add to what was found of an environment how long its default log takes."""
    with contextlib.closing(make_env(report.env_id, spec)) as env:
        scripted = len(scripted_behaviours(env))
        plan = plan_log(spelt_out(config, env, spec, scripted), env, scripted)
    found = report.measured
    resets = found["episodes"] / found["steps"]
    seconds = plan.total * (1.0 / found["steps_per_second"] + resets * found["reset_ms"] / 1e3)
    report.measured |= {"log_steps": plan.total, "log_seconds": seconds}
    text = f"`collect` takes up to {plan.total:,} steps, {duration(seconds)} and the learning"
    if seconds > LONG:
        report.add("warn", "default log", f"{text}. Bound it with its --minutes or --steps.")
    else:
        report.add("ok", "default log", text)


def duration(seconds: float) -> str:
    """A time for people.

    >>> [duration(s) for s in (0.4, 75, 660, 10_500)]
    ['less than a second', '1 min 15 s', '11 min', '2 h 55 min']
    """
    if seconds < 1.0:
        return "less than a second"
    if seconds < 600.0:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    hours, minutes = divmod(round(seconds / 60.0), 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min"
