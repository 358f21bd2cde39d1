"""Frozen evaluation: complete episodes of one policy, nothing learnt, everything counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from safe_offrl.deploy.episodes import PlayedEpisode, faults_in_a_row, play_episode
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.adapter import AccidentEnv, episode_seed
from safe_offrl.types import Episode


def evaluate(
    env: AccidentEnv,
    policy: DeployedPolicy,
    episodes: int,
    seed: int,
    *,
    mean_action: bool = False,
    watch: Callable[[Episode, PlayedEpisode], None] | None = None,
    worst_cost: float,
    worst_signals: Mapping[str, float] | None = None,
) -> Iterator[Episode]:
    """Play ``episodes`` episodes on seeds of their own stream and yield each as it ends.

    ``watch`` is shown each episode together with its transitions. ``worst_cost`` is what an episode
    counts as in which the environment fails, ``worst_signals`` those of named signals; EnvError if
    it does so in three in a row.
    """
    rng = np.random.default_rng([seed, 1])  # not the stream that the online phase acts with
    steps = faults = 0
    for index in range(episodes):
        # One episode, on a seed of its own.
        reset_seed = episode_seed(seed, index, "evaluate")
        played = play_episode(env, policy, reset_seed, rng, mean_action=mean_action)
        faults = faults_in_a_row(faults, played.fault)
        # What is kept of it.
        episode = played.recorded(
            index=index,
            seed=reset_seed,
            steps_before=steps,
            worst_cost=worst_cost,
            worst_signals=worst_signals,
            version=policy.version,
            phase="evaluate",
            content=played.content,
        )
        if watch is not None:
            watch(episode, played)
        yield episode
        steps += played.steps
