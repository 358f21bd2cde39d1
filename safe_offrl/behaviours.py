"""Behaviours that log data: scripted controllers with noise, smooth random actions, frozen PPO.

Each works for any environment; scripted ones need a module that offers them. Stable-Baselines3 is
imported here alone, and only where PPO is trained.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr

from safe_offrl.env import AccidentEnv, make_env
from safe_offrl.safety import SafetySpec

Vector = NDArray[np.float32]
Controller = Callable[[Vector], Vector]  # observation [O] -> action [A] in [-1, 1]
Progress = Callable[[str], None]

NOISE_LEVELS = (0.0, 0.1, 0.3)  # standard deviations; each scripted episode draws one
NOISE_CORRELATION = 0.8  # from one step to the next: noise that moves a system with inertia
RANDOM_CORRELATION = 0.95
TRAINING_STAGES = (0.2, 0.5, 1.0)  # shares of PPO's training after which its policy is frozen
PARALLEL_ENVS = 8  # PPO's; one batched forward pass serves all


@dataclass(frozen=True)
class Behaviour:
    """A named way to act: ``factory(rng)`` gives the controller of one episode."""

    name: str
    factory: Callable[[np.random.Generator], Controller]


def scripted_behaviours(env: AccidentEnv) -> list[Behaviour]:
    """Noisy versions of the controllers that the environment's module offers; [] if it has none.

    The module of the unwrapped environment's class may define ``scripted_behaviours()``, which
    returns a dict: name -> factory(rng) -> controller(observation [O]) -> action [A] in [-1, 1].
    """
    module = sys.modules.get(type(env.unwrapped).__module__)
    offered = getattr(module, "scripted_behaviours", None)
    if offered is None or offered is scripted_behaviours:  # a module that imports this function
        return []
    return [Behaviour(name, _with_noise(factory)) for name, factory in offered().items()]


def _with_noise(
    factory: Callable[[np.random.Generator], Controller],
) -> Callable[[np.random.Generator], Controller]:
    """Add correlated Gaussian noise of a level drawn per episode, so actions fill the space."""

    def noisy(rng: np.random.Generator) -> Controller:
        controller = factory(rng)
        level = float(rng.choice(NOISE_LEVELS))
        noise = _correlated_normal(rng, NOISE_CORRELATION)

        def act(observation: Vector) -> Vector:
            action = controller(observation)
            return np.asarray(action + level * noise(len(action)), dtype=np.float32)

        return act

    return noisy


def _correlated_normal(
    rng: np.random.Generator, correlation: float
) -> Callable[[int], NDArray[np.float64]]:
    """AR(1) noise ``z <- rho z + sqrt(1 - rho^2) n``: every value is standard normal."""
    state: NDArray[np.float64] | None = None

    def draw(size: int) -> NDArray[np.float64]:
        nonlocal state
        fresh = rng.standard_normal(size)
        if state is None:
            state = fresh
        else:
            state = correlation * state + math.sqrt(1.0 - correlation**2) * fresh
        return state

    return draw


def random_behaviour(action_size: int) -> Behaviour:
    """Actions that wander smoothly; each is uniform on [-1, 1], neighbours in time are close."""

    def factory(rng: np.random.Generator) -> Controller:
        noise = _correlated_normal(rng, RANDOM_CORRELATION)
        return lambda _: (2.0 * ndtr(noise(action_size)) - 1.0).astype(np.float32)

    return Behaviour("random", factory)


def ppo_behaviours(
    env_id: str, spec: SafetySpec, *, steps: int, seed: int, progress: Progress | None = None
) -> list[Behaviour]:
    """PPO (Stable-Baselines3) frozen at :data:`TRAINING_STAGES` of ``steps`` environment steps.

    PPO maximises the reward alone and knows nothing of accidents. The behaviours sample from its
    Gaussian policy. Deterministic given the seed (CPU, one thread); the global generators and the
    thread count are the caller's again afterwards.
    """
    behaviours = []
    with _isolated_torch():
        from stable_baselines3 import PPO  # here, because the import takes seconds
        from stable_baselines3.common.vec_env import DummyVecEnv

        envs = DummyVecEnv([lambda: make_env(env_id, spec) for _ in range(PARALLEL_ENVS)])
        model = PPO(
            "MlpPolicy",
            envs,
            n_steps=128,
            batch_size=256,
            n_epochs=5,
            learning_rate=1e-3,
            policy_kwargs={"net_arch": [64, 64], "log_std_init": -0.5},
            seed=seed,
            device="cpu",
        )
        for stage in TRAINING_STAGES:
            missing = max(1, round(stage * steps) - model.num_timesteps)
            model.learn(missing, reset_num_timesteps=False)
            behaviours.append(Behaviour(f"ppo-{model.num_timesteps}", _frozen(model.policy)))
            if progress is not None:
                progress(f"training PPO: {model.num_timesteps:,} of {steps:,} steps")
        envs.close()
    return behaviours


def _frozen(policy: Any) -> Callable[[np.random.Generator], Controller]:
    """Copy a PPO MlpPolicy's actor into numpy, ten times faster a step than SB3's predict()."""
    linears = [m for m in policy.mlp_extractor.policy_net if isinstance(m, torch.nn.Linear)]
    *hidden, output = [
        (m.weight.detach().numpy().copy(), m.bias.detach().numpy().copy())
        for m in (*linears, policy.action_net)
    ]
    std = np.exp(policy.log_std.detach().numpy())

    def factory(rng: np.random.Generator) -> Controller:
        def act(observation: Vector) -> Vector:
            x = observation
            for weight, bias in hidden:
                x = np.tanh(weight @ x + bias)
            mean = output[0] @ x + output[1]
            return np.asarray(mean + std * rng.standard_normal(len(mean)), dtype=np.float32)

        return act

    return factory


@contextlib.contextmanager
def _isolated_torch() -> Iterator[None]:
    """One thread, and the global generators (which SB3 seeds) restored at the end."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state()  # noqa: NPY002
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(torch_state)
        torch.set_num_threads(threads)
