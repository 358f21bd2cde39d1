"""One complete episode of the policy behind its shield, as rows for the buffer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from safe_offrl.acting import NumpyActor
from safe_offrl.env import AccidentEnv
from safe_offrl.errors import EnvError
from safe_offrl.shield import Shield
from safe_offrl.types import Episode, Normalizer


class PlayedEpisode(NamedTuple):
    """What happened; ``rows`` [n, D] are transitions with the EXECUTED actions."""

    rows: Tensor
    episode_return: float
    cost: float
    accident: bool
    accident_steps: int
    shield_interventions: int

    def recorded(
        self, *, index: int, seed: int, steps_before: int, version: int, phase: str
    ) -> Episode:
        """What the ledger keeps of it; ``steps_before`` were charged by earlier episodes."""
        return Episode(
            index=index,
            seed=seed,
            steps=len(self.rows),
            total_steps=steps_before + len(self.rows),
            episode_return=self.episode_return,
            cost=self.cost,
            accident=self.accident,
            accident_steps=self.accident_steps,
            version=version,
            phase=phase,
            shield_interventions=self.shield_interventions,
        )


class Reservation(NamedTuple):
    """An episode is about to begin; until its end is known it counts as ``worst``."""

    worst: Episode

    @classmethod
    def of(
        cls,
        *,
        index: int,
        seed: int,
        steps: int,
        steps_before: int,
        cost: float,
        version: int,
        phase: str,
    ) -> Reservation:
        """The most that an episode can take: all its steps, this cost, and an accident."""
        return cls(
            Episode(
                index=index,
                seed=seed,
                steps=steps,
                total_steps=steps_before + steps,
                episode_return=0.0,
                cost=cost,
                accident=True,
                accident_steps=1,
                version=version,
                phase=phase,
                shield_interventions=0,
                outcome="lost",
            )
        )


def play_episode(
    env: AccidentEnv,
    actor: NumpyActor,
    shield: Shield,
    normalizer: Normalizer,
    seed: int,
    rng: np.random.Generator,
    *,
    mean_action: bool = False,
) -> PlayedEpisode:
    """Reset with ``seed`` and act until the episode ends.

    Observations are standardised by ``normalizer``, in what the policy sees and in the rows.
    Return-to-go is left at 0 in the rows: only Cal-QL reads it, from the log. Raises EnvError when
    the policy wants a non-finite action, which is never sent.
    """
    observation = normalizer(env.reset(seed=seed)[0])
    shield.start_episode()
    rows: list[np.ndarray] = []
    total = cost = 0.0
    accidents = interventions = 0
    ended = False
    while not ended:
        time_to_go = 1.0 - len(rows) / env.horizon
        action, replaced = shield.choose(
            actor, observation, time_to_go, rng, mean_action=mean_action
        )
        if not np.isfinite(action).all():
            raise EnvError(
                "The policy's action is not finite, so nothing was sent to the environment. Go "
                "back to an earlier checkpoint, or lower the learning rate."
            )
        raw, reward, terminated, truncated, info = env.step(action)
        following = normalizer(raw)
        accident = bool(info["accident"])
        tail = (reward, accident, info["cost"], terminated, time_to_go, 0.0)
        rows.append(
            np.concatenate([observation, action, following, np.asarray(tail, dtype=np.float32)])
        )
        observation, ended = following, terminated or truncated
        total += float(reward)
        cost += float(info["cost"])
        accidents += accident
        interventions += replaced
    return PlayedEpisode(
        rows=torch.from_numpy(np.stack(rows)),
        episode_return=total,
        cost=cost,
        accident=accidents > 0,
        accident_steps=accidents,
        shield_interventions=interventions,
    )
