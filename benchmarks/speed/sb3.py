"""Stable-Baselines3's SAC (MIT), the reference of the ratios: ``train`` from its replay buffer."""

from __future__ import annotations

import os
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.logger import configure
from worker import BATCH, DEVICE, HIDDEN, ROWS, Shape

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


class Spaces(gym.Env[np.ndarray, np.ndarray]):
    """An environment of the right shapes that is never stepped."""

    def __init__(self, shape: Shape) -> None:
        self.observation_space = gym.spaces.Box(-10.0, 10.0, (shape.observation,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (shape.action,), np.float32)


def sac(critics: int, gradient_steps: int) -> Callable[[Shape], Callable[[int], None]]:
    """``gradient_steps`` updates a call, each of critics AND actor: it has no other UTD."""

    def build(shape: Shape) -> Callable[[int], None]:
        model = SAC(
            "MlpPolicy",
            Spaces(shape),
            buffer_size=ROWS,
            batch_size=BATCH,
            policy_kwargs={"net_arch": [HIDDEN, HIDDEN], "n_critics": critics},
            device=DEVICE,
            seed=0,
        )
        model.set_logger(configure(format_strings=[]))
        rng, buffer = np.random.default_rng(0), model.replay_buffer
        assert buffer is not None
        buffer.observations[:] = rng.standard_normal(buffer.observations.shape)
        buffer.next_observations[:] = rng.standard_normal(buffer.observations.shape)
        buffer.actions[:] = rng.uniform(-1.0, 1.0, buffer.actions.shape)
        buffer.rewards[:] = rng.standard_normal(buffer.rewards.shape)
        buffer.full = True

        def run(n: int) -> None:
            for _ in range(max(1, n // gradient_steps)):
                model.train(gradient_steps=gradient_steps, batch_size=BATCH)

        return run

    return build


CASES = {
    "sac 2 critics": sac(2, 1),
    "sac 10 critics": sac(10, 1),
    "sac 10 critics utd 20": sac(10, 20),
}
