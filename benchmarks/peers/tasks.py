"""The logs that both libraries learn from, and the episodes that both are evaluated by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.peers.learner import Actions, Observations
from benchmarks.peers.settings import COMMON, TASKS
from safe_offrl.collect.build import default_dataset
from safe_offrl.collect.log_plan import CollectConfig
from safe_offrl.collect.sb3 import LearnersConfig, PPOConfig, SACConfig
from safe_offrl.commands.collect import collect_config
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.env.adapter import episode_seed
from safe_offrl.env.make import make_env
from safe_offrl.spec import SafetySpec
from safe_offrl.types import Normalizer

# Random, and SAC after a fifth, half and all of these steps, a quarter of the log each.
SAC_ALONE = LearnersConfig(
    cost_limits=(), ppo=PPOConfig(steps=0), sac=SACConfig(steps=15_000, updates=0.5)
)


class Log(NamedTuple):
    """A log as both learn from it, how to see the environment as it does, and what it returned."""

    dataset: Dataset  # observations standardised, rewards scaled
    normalizer: Normalizer
    mean_return: float  # of its episodes


def how_logged(task: str) -> tuple[SafetySpec, CollectConfig]:
    """The accident rule and the settings of `safe-offrl collect` for a task."""
    if task == "Pendulum-v1":  # which has no accidents
        return SafetySpec(accident="terminated"), CollectConfig(50_000, learners=SAC_ALONE)
    return collect_config(TASKS[task].env_id)


def read_log(task: str) -> Log:
    """The cached log of a task, made on first use."""
    spec, config = how_logged(task)
    path = default_dataset(TASKS[task].env_id, spec, config=config, progress=print)
    logged = load_dataset(path, discount=COMMON.discount, spec=spec)
    normalizer = logged.normalizer()
    mean_return = float(logged.episode_returns.mean())
    return Log(logged.normalised(normalizer), normalizer, mean_return)


def write_for_them(dataset: Dataset, path: Path) -> None:
    """The same transitions as plain arrays."""
    batch = dataset.transitions
    np.savez(
        path,
        observations=batch.observations.numpy(),
        actions=batch.actions.numpy(),
        rewards=batch.rewards.numpy(),
        terminals=batch.terminated.numpy(),
        timeouts=dataset.truncated.astype(np.float32),
    )


def evaluate(
    task: str,
    normalizer: Normalizer,
    act: Callable[[Observations], Actions],
    episodes: int,
) -> float:
    """Mean undiscounted return of so many episodes, the same ones for everybody, side by side."""
    spec, _ = how_logged(task)
    total = 0.0
    with contextlib.ExitStack() as stack:
        envs = [
            stack.enter_context(contextlib.closing(make_env(TASKS[task].env_id, spec)))
            for _ in range(episodes)
        ]
        seen = {
            env: env.reset(seed=episode_seed(0, index, "evaluate"))[0]
            for index, env in enumerate(envs)
        }
        while seen:
            actions = act(normalizer(np.stack(list(seen.values()))))
            for env, action in zip(list(seen), actions, strict=True):
                observation, reward, terminated, truncated, _ = env.step(action)
                total += float(reward)
                seen[env] = observation
                if terminated or truncated:
                    del seen[env]
    return total / episodes
