"""Policies to log data with that Stable-Baselines3 trains: PPO and SAC, plain and penalised.

A penalised learner maximises ``(reward - penalty * cost) / (1 + penalty)``. Begun from nothing it
learns to keep away from everything and never finds the task, so each goes on from the plain policy:
what it logs on the way leads from reckless to careful. Stable-Baselines3 is imported here alone,
and only where something is trained.
"""

from __future__ import annotations

import contextlib
import io
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gymnasium import spaces

from safe_offrl.collect.behaviours import Behaviour
from safe_offrl.collect.frozen import freeze
from safe_offrl.collect.isolation import isolated_torch, narrow_seed
from safe_offrl.collect.penalty import Account, Penalised
from safe_offrl.collect.processes import run_jobs
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError
from safe_offrl.record.progress import Say
from safe_offrl.spec import SafetySpec

TRAINING_STAGES = (0.2, 0.5, 1.0)  # shares of a training after which its policy is frozen
PARALLEL_ENVS = 8  # of a learner; one batched forward pass serves all
SAFER = 0.6  # of the limit: what a policy for safe episodes is trained towards by default
LOG_STD = -0.5  # with which PPO begins to explore
EPOCHS, DISCRETE_EPOCHS = 5, 20  # of PPO over a rollout; see resolved()
SAC_START = 1000  # steps before SAC's first update


@dataclass(frozen=True)
class PPOConfig:
    """PPO's training.

    ``steps``: in the environment, 0 for none; ``penalised_steps``: of each penalised policy, which
    goes on from the plain one; ``rollout``: of each parallel environment, between two updates;
    ``epochs`` None: see :func:`resolved`.
    """

    steps: int = 80_000
    penalised_steps: int = 80_000
    learning_rate: float = 1e-3
    discount: float = 0.99
    hidden: tuple[int, ...] = (64, 64)
    rollout: int = 128
    batch_size: int = 256
    epochs: int | None = None


@dataclass(frozen=True)
class SACConfig:
    """SAC's training, as :class:`PPOConfig`; ``updates``: gradient steps per environment step."""

    steps: int = 0
    penalised_steps: int = 0
    learning_rate: float = 1e-3
    discount: float = 0.99
    hidden: tuple[int, ...] = (64, 64)
    batch_size: int = 256
    updates: float = 0.25


@dataclass(frozen=True)
class LearnersConfig:
    """Which policies are trained: by each algorithm one plain, one for each fixed penalty and one
    for each cost limit, towards which its penalty is adapted (dual ascent on the episode cost).

    ``cost_limits`` None is one limit, :data:`SAFER` times what the safety specification allows, or
    none at all for an environment that offers controllers itself.
    """

    penalties: tuple[float, ...] = ()
    cost_limits: tuple[float, ...] | None = None
    ppo: PPOConfig = field(default_factory=PPOConfig)
    sac: SACConfig = field(default_factory=SACConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        counts = [n for c in (self.ppo, self.sac) for n in (c.steps, c.penalised_steps)]
        if min(counts) < 0:
            raise ConfigError(
                f"{min(counts)} training steps cannot be taken. Ask for at least 0 (none)."
            )
        if self.ppo.epochs is not None and self.ppo.epochs < 1:
            raise ConfigError(
                f"learners.ppo.epochs is {self.ppo.epochs}, but at least 1 is needed. Try 5."
            )
        strengths = (*self.penalties, *(self.cost_limits or ()))
        if strengths and min(strengths) < 0.0:
            raise ConfigError(
                f"collect.penalties and collect.cost_limits hold {min(strengths):g}. "
                "Penalties and costs per episode are at least 0."
            )


@dataclass(frozen=True)
class _Job:
    """One training: plain, or from ``start`` (a saved model) on under a penalty or a limit."""

    algorithm: str  # "PPO" or "SAC"
    env_id: str
    spec: SafetySpec
    config: LearnersConfig
    seed: int
    start: bytes | None = None
    penalty: float | None = None
    cost_limit: float | None = None
    unit: float = 1.0

    @property
    def settings(self) -> PPOConfig | SACConfig:
        return self.config.ppo if self.algorithm == "PPO" else self.config.sac

    @property
    def label(self) -> str:
        if self.penalty is not None:
            return f"{self.algorithm.lower()}-penalty{self.penalty:g}"
        limit = "" if self.cost_limit is None else f"-limit{self.cost_limit:g}"
        return f"{self.algorithm.lower()}{limit}"


@dataclass(frozen=True)
class _Trained:
    behaviours: list[Behaviour]
    model: bytes
    unit: float


def learnt_behaviours(
    env_id: str,
    spec: SafetySpec,
    config: LearnersConfig,
    *,
    seed: int,
    workers: int = 1,
    progress: Say | None = None,
) -> list[Behaviour]:
    """Train what ``config`` names, and freeze each at :data:`TRAINING_STAGES` of its steps.

    The behaviours sample from their policies. Trainings run in up to ``workers`` processes; the
    result does not depend on how many. Deterministic given the seed (CPU, one thread); the global
    generators and the thread count are the caller's again afterwards. SAC needs continuous actions
    and is left out, with a message, where they are discrete.
    """
    # Trainings on the reward alone.
    plain = [_Job(name, env_id, spec, config, seed) for name in ("PPO", "SAC")]
    plain = [job for job in plain if job.settings.steps and not _unable(job, progress)]
    trained = run_jobs(_train, plain, workers=workers, progress=progress)
    # Trainings that go on from them, with the cost penalised or limited.
    strengths: list[tuple[float | None, float | None]] = [(p, None) for p in config.penalties]
    strengths += [(None, limit) for limit in config.cost_limits or ()]
    further = [
        replace(
            job, seed=seed + 1 + k, start=t.model, unit=t.unit, penalty=penalty, cost_limit=limit
        )
        for job, t in zip(plain, trained, strict=True)
        if job.settings.penalised_steps
        for k, (penalty, limit) in enumerate(strengths)
    ]
    trained += run_jobs(_train, further, workers=workers, progress=progress)
    return [behaviour for t in trained for behaviour in t.behaviours]


def resolved(
    config: LearnersConfig, spec: SafetySpec, *, scripted: bool, discrete: bool
) -> LearnersConfig:
    """``config`` with all that depends on the environment spelt out.

    ``scripted``: it has controllers, so that a careful policy need not be trained. Where actions
    are ``discrete`` and nothing is scripted, PPO goes over a rollout 20 times instead of 5: with
    5 it does not learn to balance CartPole in the steps it has, and its log has no safe episode.
    """
    if config.ppo.epochs is None:
        epochs = DISCRETE_EPOCHS if discrete and not scripted else EPOCHS
        config = replace(config, ppo=replace(config.ppo, epochs=epochs))
    if config.cost_limits is None:
        # An accident costs 1 where the environment does not say otherwise.
        config = replace(config, cost_limits=() if scripted else (SAFER * spec.limit_value,))
    return config


def trainings(config: LearnersConfig, *, discrete: bool) -> list[int]:
    """Steps that each training of a :func:`resolved` configuration takes, whole rollouts."""
    further = len(config.penalties) + len(config.cost_limits or ())
    taken = []
    for settings in (config.ppo, config.sac):
        if settings.steps and not (discrete and isinstance(settings, SACConfig)):
            taken.append(training_steps(settings, settings.steps))
            if settings.penalised_steps:
                taken += further * [training_steps(settings, settings.penalised_steps)]
    return taken


def training_steps(settings: PPOConfig | SACConfig, steps: int) -> int:
    """Steps that a training of so many really takes: whole rollouts, at least one a stage."""
    rollout = PARALLEL_ENVS * (settings.rollout if isinstance(settings, PPOConfig) else 1)
    taken = 0
    for stage in TRAINING_STAGES:
        taken += rollout * math.ceil(_steps_until(stage, steps, taken) / rollout)
    return taken


def _steps_until(stage: float, steps: int, done: int) -> int:
    """Steps that a training of ``steps`` asks for until ``stage``."""
    return max(1, round(stage * steps) - done)


def _unable(job: _Job, progress: Say | None) -> bool:
    if job.algorithm != "SAC":
        return False
    with contextlib.closing(make_env(job.env_id, job.spec)) as env:
        if env.discrete and progress is not None:
            progress("SAC is left out: it needs continuous actions")
        return env.discrete


def _train(job: _Job, progress: Say) -> _Trained:
    """One training; its policies are named after the steps that led to them."""
    # Account of penalties and costs.
    account = Account(penalty=job.penalty or 0.0, limit=job.cost_limit, unit=job.unit)
    steps = job.settings.steps if job.start is None else job.settings.penalised_steps
    behaviours = []

    def each_step(_locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
        account.adapt()
        return True

    with isolated_torch():
        from stable_baselines3.common.vec_env import DummyVecEnv

        # Environments and learner.
        envs = DummyVecEnv(
            [
                lambda: Penalised(make_env(job.env_id, job.spec), account, job.spec.quantity)
                for _ in range(PARALLEL_ENVS)
            ]
        )
        model = _model(job, envs)
        begun = model.num_timesteps
        # Stages, each frozen.
        for stage in TRAINING_STAGES:
            missing = _steps_until(stage, steps, model.num_timesteps - begun)
            model.learn(missing, reset_num_timesteps=False, callback=each_step)
            done = model.num_timesteps - begun
            origin = {
                "algorithm": job.algorithm,
                "penalty": account.penalty,
                "cost_limit": job.cost_limit,
                "stage": stage,
                "steps": model.num_timesteps,
            }
            name = f"{job.label}-{model.num_timesteps}"
            behaviours.append(Behaviour(name, freeze(model), origin))
            mean_return, mean_cost = account.recent()
            progress(
                f"training {job.label}: {done:,} of {steps:,} steps, return {mean_return:.2f}, "
                f"cost {mean_cost:.2f} per episode"
            )
        # Dropped episodes, and the learner as it is saved.
        envs.close()
        if account.dropped.count:
            progress(
                f"training {job.label}: {account.dropped.count:,} episodes were left out, because "
                f"the environment failed in them: {account.dropped.last}"
            )
        file = io.BytesIO()
        model.save(file)
    mean_return, mean_cost = account.recent()
    # The penalty at which the costs of an episode weigh as much as its return.
    unit = abs(mean_return) / mean_cost if mean_cost > 0.0 and mean_return != 0.0 else 1.0
    return _Trained(behaviours, file.getvalue(), unit)


def _model(job: _Job, envs: Any) -> Any:
    """The learner of a job, new or as it was saved."""
    from stable_baselines3 import PPO, SAC  # here, because the import takes seconds

    # A learner that was saved.
    if job.start is not None:
        learner = PPO if job.algorithm == "PPO" else SAC
        model: Any = learner.load(io.BytesIO(job.start), env=envs, device="cpu")
        model.set_random_seed(narrow_seed(job.seed, PARALLEL_ENVS))
        if isinstance(model, PPO) and isinstance(model.action_space, spaces.Box):
            with torch.no_grad():  # what it knows is narrow: it has to explore again
                model.policy.log_std.fill_(LOG_STD)
        if isinstance(model, SAC):  # its replay buffer, of unpenalised rewards, was not saved
            model.learning_starts = model.num_timesteps + SAC_START
        return model
    # A new learner.
    settings = job.settings
    common: dict[str, Any] = {
        "policy": "MlpPolicy",
        "env": envs,
        "learning_rate": settings.learning_rate,
        "gamma": settings.discount,
        "seed": narrow_seed(job.seed, PARALLEL_ENVS),
        "device": "cpu",
    }
    if isinstance(settings, PPOConfig):
        return PPO(
            n_steps=settings.rollout,
            n_epochs=settings.epochs or EPOCHS,
            batch_size=min(settings.batch_size, settings.rollout * envs.num_envs),
            policy_kwargs={"net_arch": list(settings.hidden), "log_std_init": LOG_STD},
            **common,
        )
    return SAC(
        buffer_size=max(settings.steps, settings.penalised_steps) + SAC_START,
        learning_starts=SAC_START,
        batch_size=settings.batch_size,
        train_freq=1,
        gradient_steps=max(1, round(settings.updates * envs.num_envs)),
        policy_kwargs={"net_arch": list(settings.hidden)},
        **common,
    )
