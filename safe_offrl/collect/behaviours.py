"""Behaviours that log data: scripted controllers with noise, and smooth random actions.

Both work for any environment; scripted ones need a module that offers them. What is learnt lies in
:mod:`safe_offrl.collect.sb3`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.controllers import offered_controllers

Vector = NDArray[np.float32]
Controller = Callable[[Vector], Vector]  # observation [O] -> action [A]

# Standard deviations, or rates of a random action where actions are discrete; each scripted
# episode draws one.
NOISE_LEVELS = (0.0, 0.1, 0.3)
NOISE_CORRELATION = 0.8  # from one step to the next: noise that moves a system with inertia
RANDOM_CORRELATION = 0.95


@dataclass(frozen=True)
class Behaviour:
    """A named way to act: ``factory(rng)`` gives the controller of one episode.

    ``origin`` says where it comes from, in JSON-able values, for the dataset's metadata.
    """

    name: str
    factory: Callable[[np.random.Generator], Controller]
    origin: Mapping[str, Any] = field(default_factory=dict)


def scripted_behaviours(env: AccidentEnv) -> list[Behaviour]:
    """Noisy versions of the controllers that the environment's module offers; [] if it has none.

    See :mod:`safe_offrl.env.controllers`.
    """
    factories = offered_controllers(env)
    if env.discrete:
        return [Behaviour(name, _with_chance(factory, env)) for name, factory in factories.items()]
    return [Behaviour(name, _with_noise(factory)) for name, factory in factories.items()]


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


def _with_chance(
    factory: Callable[[np.random.Generator], Callable[[Vector], int]], env: AccidentEnv
) -> Callable[[np.random.Generator], Controller]:
    """Discrete actions as one-hot rows, and a random one at a rate drawn per episode."""

    def noisy(rng: np.random.Generator) -> Controller:
        controller = factory(rng)
        rate = float(rng.choice(NOISE_LEVELS))
        every = np.eye(env.action_size, dtype=np.float32)

        def act(observation: Vector) -> Vector:
            if rng.random() < rate:
                return every[rng.integers(env.action_size)]
            return env.one_hot(controller(observation))

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
    """Actions that wander smoothly; each is uniform on [-1, 1], neighbours in time are close.

    Of discrete actions the largest entry acts, so each is chosen equally often, and kept a while.
    """

    def factory(rng: np.random.Generator) -> Controller:
        noise = _correlated_normal(rng, RANDOM_CORRELATION)
        return lambda _: (2.0 * ndtr(noise(action_size)) - 1.0).astype(np.float32)

    return Behaviour("random", factory)
