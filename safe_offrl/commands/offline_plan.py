"""What an offline phase is to be, decided and checked before its first step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from safe_offrl.agents import kind_of
from safe_offrl.collect.build import default_dataset
from safe_offrl.collect.log_plan import CollectConfig
from safe_offrl.commands.common import (
    DEFAULT_ENV,
    constraint_line,
    data_line,
    device_line,
    logged_signals,
    require_both_outcomes,
    say_plain,
    warning_lines,
    with_logged_rule,
    with_own_settings,
)
from safe_offrl.commands.environment import learnt_lines, since_log
from safe_offrl.commands.given_limits import parse_limits, require_given_once
from safe_offrl.compute.descent import choose_compute
from safe_offrl.compute.device import configure, find_device
from safe_offrl.config import load_config, read_yaml
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.loading import find_dataset, load_dataset, stated_metadata
from safe_offrl.data_formats.validation import check_learnable, check_matches_env, check_same_env
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.make import make_env, time_limit
from safe_offrl.errors import DataError
from safe_offrl.limits import ACCIDENT, COST
from safe_offrl.record.progress import Heartbeat, Say
from safe_offrl.record.run_config import RunInputs
from safe_offrl.record.trust import is_trusted_log
from safe_offrl.train.pretrain_config import PretrainConfig, discount_of

AS_PUBLISHED = "steering    none: the actor learns as published, beside the safety critic"


@dataclass(frozen=True)
class PretrainPlan:
    """Everything that is decided before the first gradient step."""

    config: PretrainConfig
    inputs: RunInputs
    dataset: Dataset
    env_versions: dict[str, str]
    env_identity: dict[str, Any]
    compiling: str  # whether, and why, in words
    units: str | None  # of the log's actions, where it does not say

    @property
    def header(self) -> str:
        """What a person should know before it starts."""
        config = self.config
        return "\n".join(
            [
                f"pretrain    {config.agent} on {self.inputs.env_id}, {config.steps:,} gradient "
                f"steps, {config.alignment_steps:,} of value alignment and "
                f"{config.fallback_steps:,} of the guard's fallback, seed {config.seed}",
                data_line(self.dataset, self.inputs),
                *learnt_lines(since_log(self.dataset, self.env_identity)),
                *([f"actions     {self.units}"] if self.units else []),
                *warning_lines(self.dataset, config.safety, config.held_out),
                constraint_line(config.safety, self.dataset.horizon),
                *([] if config.safety_constraint else [AS_PUBLISHED]),
                device_line(self.inputs, config.precision, self.compiling),
            ]
        )


def pretrain_config(
    *,
    env: str | None = None,
    dataset: str | None = None,
    agent: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    limit: Sequence[str] | None = None,
    preset: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> PretrainConfig:
    """Resolve the settings of an offline phase; None means not given.

    ``preset`` is a YAML file that takes the place of the environment's, see :func:`load_config`.
    Environment and accident rule are the dataset's own where nothing else is said.
    """
    # What is given.
    env = env or _logged_env(dataset, overrides)
    named = [text.partition("=")[2] for text in overrides if text.partition("=")[0] == "env"]
    flags: dict[str, Any] = {"env": env, "dataset": dataset, "agent": agent, "steps": steps}
    flags |= {"seed": seed, "safety.limits": parse_limits(limit)}
    signals = logged_signals(_stated(dataset), overrides, flags["safety.limits"] or ())

    def resolve(
        inherited: Mapping[str, Any] | None = None, logged: Mapping[str, Any] | None = None
    ) -> PretrainConfig:
        return load_config(
            PretrainConfig,
            section="pretrain",
            env_id=(named[-1:] or [env or DEFAULT_ENV])[0],
            preset=preset,
            inherited=inherited,
            logged={**signals, **(logged or {})},
            flags=flags,
            overrides=overrides,
        )

    # What settings begin with depends on what is constrained, which they say themselves.
    own = functools.partial(resolve, COST.pretraining)
    config = own()
    if config.safety.quantity is ACCIDENT:
        own = functools.partial(resolve, None)
        config = own()
    stated_safety: Any = {}
    if preset is not None:  # It has been read once, so it can be.
        file = read_yaml(Path(preset).read_text(encoding="utf-8"), str(preset))
        stated_safety = (file.get("pretrain") or {}).get("safety") or {}
    require_given_once(limit, overrides, {}, stated_safety)
    # The log's own rule.
    if config.dataset is not None:
        config = with_logged_rule(config, _stated(config.dataset), own)
    return replace(config, agents=with_own_settings(config.agent, config.agents))


def _logged_env(dataset: str | None, overrides: Sequence[str]) -> str | None:
    """The environment that a dataset names; None where another is, or it would import a module."""
    if any(text.partition("=")[0] == "env" for text in overrides):
        return None
    stated = _stated(dataset)
    env_id = stated.get("env_id")
    if not isinstance(env_id, str) or (":" in env_id and not is_trusted_log(stated)):
        return None
    return env_id


def _stated(dataset: str | None) -> dict[str, Any]:
    """What a log says of itself; nothing of none, or of one that whoever loads it refuses."""
    try:
        return {} if dataset is None else stated_metadata(dataset)
    except DataError:
        return {}


def plan_pretrain(
    config: PretrainConfig,
    *,
    threads: int = 1,
    preset: str | Path | None = None,
    say: Say = say_plain,
) -> PretrainPlan:
    """Check environment and dataset against each other; builds the default dataset if needed.

    ``preset`` is the file that ``config`` was read from, if it was: its section "collect" says how
    the default dataset is logged.
    """
    # Compute.
    configure(threads)
    updates = config.steps + config.alignment_steps + config.fallback_steps
    device = find_device(config.device)
    compute, compiling = choose_compute(config.compile, config.precision, updates, device)
    # Environment and dataset.
    config = _with_logged_horizon(config)
    env = make_env(config.env, config.safety)
    try:
        kind_of(config.agent, discrete=env.discrete)  # This refuses an agent for other actions.
        path = config.dataset or _default_dataset(config, preset, say)
        path = find_dataset(path)
        check_same_env(stated_metadata(path), config.env)
        dataset = load_dataset(
            path, discount=discount_of(config), spec=config.safety, horizon=env.horizon
        )
        # Fit of both, and of the constraint.
        sizes = env.observation_size, env.action_size
        check_matches_env(dataset, config.env, *sizes, discrete=env.discrete)
        check_learnable(dataset, config.safety)
        require_both_outcomes(dataset, path, config.safety)
        # This refuses a limit that cannot bind.
        config.safety.all_limits(dataset.horizon, dataset.cost_max, dataset.signals_max)
        env_versions, env_identity = env.versions(), env.identity()
        units = _assumed_units(dataset, env)
    finally:
        env.close()
    # What the run remembers.
    inputs = RunInputs(
        env_id=config.env,
        dataset=str(path),
        dataset_sha256=dataset.sha256,
        threads=threads,
        compiled=compute.compiled,
        device=device,
        horizon=env.horizon,
    )
    return PretrainPlan(config, inputs, dataset, env_versions, env_identity, compiling, units)


def _with_logged_horizon(config: PretrainConfig) -> PretrainConfig:
    """Settings with the log's horizon where neither they nor the environment have one."""
    if config.dataset is None or config.safety.horizon or time_limit(config.env):
        return config
    horizon = stated_metadata(config.dataset).get("horizon")
    if not isinstance(horizon, int | float) or horizon < 1 or horizon % 1:
        return config
    return replace(config, safety=replace(config.safety, horizon=int(horizon)))


def _assumed_units(dataset: Dataset, env: AccidentEnv) -> str | None:
    """How actions are read that could be in the environment's own units; None if it is known."""
    if env.discrete or {"action_low", "action_high"} <= dataset.metadata.keys():
        return None
    unit = np.ones(env.action_size, np.float32)
    low, high = np.unique(env.own_action(-unit)), np.unique(env.own_action(unit))
    if low.tolist() == [-1.0] and high.tolist() == [1.0]:
        return None
    one = len(low) == len(high) == 1
    bounds = f"[{low[0]:g}, {high[0]:g}]" if one else "bounds of each number"
    return (
        f"the log's [-1, 1] is taken as the environment's {bounds}; if it is in the environment's "
        "own units, store these bounds as action_low and action_high in its metadata"
    )


def _default_dataset(config: PretrainConfig, preset: str | Path | None, say: Say) -> Path:
    """The cached log of the environment, as its preset or this one says how to make it."""
    settings = load_config(CollectConfig, section="collect", env_id=config.env, preset=preset)
    with contextlib.closing(Heartbeat(say, "collect     at work, {} so far".format)) as heart:
        return default_dataset(config.env, config.safety, config=settings, progress=heart.say)
