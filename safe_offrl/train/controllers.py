"""The environment's controller as a teacher: labels of what a learner has seen."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from safe_offrl.agents import find_agent
from safe_offrl.agents.protocol import Labeller
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.controllers import offered_controllers
from safe_offrl.errors import ConfigError, EnvError
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.types import Normalizer


def controller_for(
    config: FinetuneConfig, env: AccidentEnv, normalizer: Normalizer
) -> Labeller | None:
    """The controller of the environment that the settings of the learner name.

    None where they name none. Observations are given to it one by one, in the environment's units.
    ConfigError if the environment does not offer it, EnvError for an action that is none.
    """
    baseline = config.baseline
    if baseline.learner == "rlpd":
        return None
    asked = getattr(baseline.agents.settings_for(find_agent(baseline.learner)), "controller", None)
    if asked is None:
        return None
    offered = offered_controllers(env)
    name = next(iter(offered), "") if not asked and len(offered) == 1 else asked
    if name not in offered:
        raise ConfigError(_not_offered(config, env, asked, list(offered)))
    controller = offered[name](np.random.default_rng([config.seed, 3]))
    offset = 0.0 if normalizer.offset is None else normalizer.offset

    def row(observation: np.ndarray) -> np.ndarray:
        action = controller(observation)
        return env.one_hot(int(action)) if env.discrete else np.asarray(action, dtype=np.float32)

    def label(observations: Tensor) -> Tensor:
        raw = observations.cpu().numpy() * normalizer.std + normalizer.mean + offset
        actions = [row(observation) for observation in raw.astype(np.float32)]
        wrong = [x for x in actions if x.shape != (env.action_size,) or not np.isfinite(x).all()]
        if wrong:
            raise EnvError(
                f'The controller "{name}" of "{env.env_id}" gave {wrong[0].tolist()}, but '
                f"an action has {env.action_size} finite numbers. Fix its scripted_behaviours()."
            )
        labels = np.stack([env.executed(action) for action in actions])
        return torch.from_numpy(labels).to(observations)

    return label


def _not_offered(config: FinetuneConfig, env: AccidentEnv, asked: str, offered: list[str]) -> str:
    learner, agents = config.baseline.learner, config.baseline.agents
    if not offered:
        elsewhere = ", or leave env.timeout out" if config.env.timeout else ""
        return (
            f'{learner} asks a controller of the environment for labels, but "{env.env_id}" offers '
            "none. Define scripted_behaviours() in its module (see docs/custom_environments.md)"
            f"{elsewhere}, or set baseline.learner=rlpd."
        )
    which = f'"{asked}" is not among' if asked else "it must be told which of"
    return (
        f"{learner} asks a controller of the environment for labels: {which} the ones that "
        f'"{env.env_id}" offers, {", ".join(offered)}. Set '
        f"baseline.agents.{agents.key(find_agent(learner))}.controller."
    )
