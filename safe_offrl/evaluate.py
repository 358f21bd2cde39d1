"""Frozen evaluation: complete episodes of one policy, nothing learnt, everything counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from safe_offrl.acting import NumpyActor
from safe_offrl.env import AccidentEnv, episode_seed
from safe_offrl.rollout import PlayedEpisode, play_episode
from safe_offrl.shield import Shield
from safe_offrl.types import Episode, Normalizer


def evaluate(
    env: AccidentEnv,
    actor: NumpyActor,
    shield: Shield,
    normalizer: Normalizer,
    episodes: int,
    seed: int,
    *,
    version: int = 0,
    mean_action: bool = False,
    watch: Callable[[Episode, PlayedEpisode], None] | None = None,
) -> Iterator[Episode]:
    """Play ``episodes`` episodes on seeds of their own stream and yield each as it ends.

    ``watch`` is shown each episode together with its transitions.
    """
    rng = np.random.default_rng([seed, 1])  # not the stream that the online phase acts with
    steps = 0
    for index in range(episodes):
        reset_seed = episode_seed(seed, index, "evaluate")
        played = play_episode(
            env, actor, shield, normalizer, reset_seed, rng, mean_action=mean_action
        )
        episode = played.recorded(
            index=index, seed=reset_seed, steps_before=steps, version=version, phase="evaluate"
        )
        if watch is not None:
            watch(episode, played)
        yield episode
        steps += len(played.rows)
