"""Controllers that an environment's module offers: functions from observations to actions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from safe_offrl.env.adapter import AccidentEnv, Vector

# Observation [O] -> action [A] in [-1, 1], or the number of a discrete one.
OfferedController = Callable[[Vector], Any]
Factory = Callable[[np.random.Generator], OfferedController]

COLLECTS = "safe_offrl.collect.behaviours"  # has a function of the same name, which offers nothing


def offered_controllers(env: AccidentEnv) -> dict[str, Factory]:
    """Name -> factory(rng) -> controller of the environment's observation; {} if there is none.

    The module of the unwrapped environment's class may define ``scripted_behaviours()``, which
    returns that dict. What comes back takes the adapter's observation.
    """
    module = sys.modules.get(type(env.unwrapped).__module__)
    offered = getattr(module, "scripted_behaviours", None)
    if offered is None or getattr(offered, "__module__", "") == COLLECTS:
        return {}
    return {name: _on_own_observation(factory, env) for name, factory in offered().items()}


def _on_own_observation(factory: Factory, env: AccidentEnv) -> Factory:
    """Hide the share of the cost threshold, which a controller of the environment cannot know."""
    if not env.sums_cost:
        return factory

    def made(rng: np.random.Generator) -> OfferedController:
        controller = factory(rng)
        return lambda observation: controller(observation[:-1])

    return made
