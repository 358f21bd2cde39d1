"""Do seeds matter? What an environment does under many seeds, given the same actions.

A situation is what a seed decides: where an episode starts, and all chance in it. Many episodes of
one situation are many looks at the policy's own chance, and none at any other situation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_offrl.check.replay import replay
from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.env.adapter import AccidentEnv, episode_seed
from safe_offrl.errors import ConfigError, EnvFault

SEEDS = 20  # so many are tried


class Situations(NamedTuple):
    """What so many seeds played, given the same actions; ``sizes``: by how many seeds each was."""

    seeds: int
    sizes: tuple[int, ...]

    @property
    def different(self) -> int:
        """How many situations were met."""
        return len(self.sizes)

    @property
    def one(self) -> bool:
        """Whether every seed plays the same."""
        return self.seeds > 1 and self.different == 1

    @property
    def few(self) -> bool:
        """Whether the environment has a small number of situations.

        None was met by a single seed. Were there ten equally likely ones, 20 seeds would look so
        with a probability of 3 %, with twenty 0.01 %; where noise is continuous no two ever meet.
        """
        return self.seeds > 1 and min(self.sizes) > 1

    def as_dict(self) -> dict[str, int]:
        """Plain values, for JSON."""
        return {"seeds": self.seeds, "different": self.different}

    def __str__(self) -> str:
        """In words."""
        if self.one:
            return f"every one of {self.seeds} seeds plays the same episode, given the same actions"
        count = f"only {self.different}" if self.few else f"{self.different}"
        return f"{self.seeds} seeds play {count} different episodes, given the same actions"


def find_situations(env: AccidentEnv, seeds: Sequence[int] | None = None) -> Situations:
    """Play the same random actions under many seeds and see which of them part.

    As few steps as that takes: seeds that start alike are played on, further and further, until
    they part or the episode ends. A seed under which the environment fails is left out.
    """
    seeds = seeds or [episode_seed(0, index, "situation") for index in range(SEEDS)]
    act = random_behaviour(env.action_size).factory(np.random.default_rng(seeds[0]))
    nothing = np.zeros(env.observation_size, np.float32)
    actions = np.array([act(nothing) for _ in range(env.horizon)])
    groups, steps = [list(seeds)], 0
    while True:
        groups = [part for group in groups for part in _parted(env, group, actions[:steps])]
        if steps >= len(actions) or all(len(group) == 1 for group in groups):
            break
        steps = min(len(actions), max(1, 4 * steps))
    sizes = tuple(sorted((len(group) for group in groups), reverse=True))
    return Situations(sum(sizes), sizes)


def _parted(env: AccidentEnv, seeds: list[int], actions: NDArray[Any]) -> list[list[int]]:
    """The seeds that play the same, together."""
    if len(seeds) == 1 and len(actions):
        return [seeds]
    groups: dict[bytes, list[int]] = {}
    for seed in seeds:
        try:
            played = replay(env, seed, actions)
        except EnvFault:
            continue
        content = played.observations.tobytes() + played.outcomes.tobytes()
        groups.setdefault(content, []).append(seed)
    return list(groups.values())


def require_situations(env_id: str, situations: Situations) -> None:
    """ConfigError where every seed plays the same: then no number of episodes shows anything."""
    if situations.one:
        raise ConfigError(
            f'"{env_id}" has a single situation: {situations}. Any number of episodes would be '
            "looks at that one, and a certificate would read as if it were about others. Draw the "
            "start or the noise from self.np_random, which super().reset(seed=seed) seeds. If the "
            "task really has no chance in it, `safe-offrl evaluate` counts what the policy does."
        )
