"""A run's final policy for whoever acts with it: predict, as in Stable-Baselines3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.errors import ConfigError
from safe_offrl.record.final_policy import final_policy
from safe_offrl.record.find_run import find_run

Costs = float | Sequence[float]  # of an episode so far, or of each of several


class Policy:
    """The deployed policy behind shield and guard. Takes and gives the environment's own values.

    :meth:`predict` has the signature of Stable-Baselines3, so its ``evaluate_policy`` works (not
    with a guard that asks for ``episode_cost``, which it has no place for): hand
    the second thing it returns back in, and None (or ``episode_start``) where an episode begins.
    """

    def __init__(self, env: AccidentEnv, policy: DeployedPolicy, seed: int) -> None:
        self.observation_space = env.env.observation_space
        self.action_space = env.env.action_space
        self.horizon = env.horizon
        self._env = env
        self._policy = policy
        self._rng = np.random.default_rng(seed)

    def predict(
        self,
        observation: Any,
        state: Sequence[int] | None = None,
        episode_start: Sequence[bool] | NDArray[np.bool_] | None = None,
        deterministic: bool = False,
        *,
        episode_cost: Costs | Mapping[str, Costs] | None = None,
    ) -> tuple[Any, tuple[int, ...]]:
        """The action to execute, and the state to hand back at the next step: the steps so far.

        ``observation`` is one of the environment's own, or a stack [n, ...] of a Box's from n
        environments; so is the action. Accident probabilities were learnt, and certified, for
        sampled actions: ``deterministic`` acts with the mean. ``episode_cost`` is what the episode
        has cost so far, or that of each: a guard that keeps a limit of cost asks for it, and under
        the accident rule "episode_cost" the policy sees it. Of several costs it is a mapping,
        {"cost": ..., and a cost signal by its name}. EnvError for an observation that does not fit
        the space, ConfigError where a guard is not told the cost.
        """
        guard = self._policy.guard
        if guard is not None and guard.until_end:
            raise ConfigError(
                "The guard of this run is a baseline's, which never hands an episode back, and "
                "predict has no memory for that. Give load_policy(..., guard=False)."
            )
        asked = () if guard is None else guard.spends
        if episode_cost is None and asked:
            raise ConfigError(
                "The guard of this policy keeps a limit of cost, and must be told what the episode "
                "has cost so far. Give predict(..., episode_cost=...), or load the policy without "
                "it: load_policy(..., guard=False)."
            )
        # One observation, or a stack.
        shape = getattr(self.observation_space, "shape", None)
        stacked = shape is not None and np.ndim(observation) == len(shape) + 1
        observations = list(observation) if stacked else [observation]
        # Steps of the episodes so far.
        steps = list(state) if state is not None else [0] * len(observations)
        if episode_start is not None:
            started = np.atleast_1d(np.asarray(episode_start, dtype=bool))
            steps = [0 if begins else k for begins, k in zip(started, steps, strict=True)]
        # Actions.
        costs = self._costs(episode_cost, asked, len(observations))
        actions = []
        for i, (one, k) in enumerate(zip(observations, steps, strict=True)):
            spent = {name: values[i] for name, values in costs.items()}
            flat = self._policy.normalizer(self._env.observe(one, spent.get("cost", 0.0)))
            left = max(0.0, 1.0 - k / self.horizon)
            act = self._policy.act(flat, left, self._rng, spent, mean_action=deterministic)
            actions.append(self._env.own_action(act.action))
        return (np.stack(actions) if stacked else actions[0]), tuple(k + 1 for k in steps)

    def _costs(
        self, given: Costs | Mapping[str, Costs] | None, asked: Sequence[str], n: int
    ) -> dict[str, list[float]]:
        """Of each cost by its name, what each of ``n`` episodes has cost so far."""
        names = list(dict.fromkeys([*(["cost"] if self._env.sums_cost else []), *asked]))
        if not isinstance(given, Mapping):
            if len(names) > 1 and given is not None:
                raise ConfigError(
                    "What the episode has cost so far must be told of each of "
                    f"{', '.join(names)}. Give episode_cost={{name: cost}}."
                )
            given = dict.fromkeys(names or ["cost"], 0.0 if given is None else given)
        if missing := [name for name in asked if name not in given]:
            raise ConfigError(
                f"episode_cost does not say what the episode has cost in {missing[0]}, which the "
                "guard of this policy keeps a limit of. Give that too."
            )
        costs = {}
        for name, value in given.items():
            values = np.asarray(value, dtype=float)
            if (values.ndim or name in asked) and values.size != n:
                raise ConfigError(
                    f"episode_cost has {values.size} costs for {n} observations. Give one of each."
                )
            costs[name] = np.broadcast_to(values, n).tolist()
        return costs


def load_policy(
    run: str | Path, *, runs: str | Path = "runs", seed: int = 0, guard: bool = True
) -> Policy:
    """A run's policy at its newest checkpoint: as it acted, or a pretrained one by itself.

    The run's folder is all that it takes: no log, no pretrain run, no learner.
    ``run`` is a run folder, or a name in ``runs``; ``seed`` is that of its noise. Without ``guard``
    nothing bounds what an episode may cost, and no certificate is about what acts.
    """
    final = final_policy(find_run(run, Path(runs)))
    policy = final.policy if guard else final.policy._replace(guard=None)
    return Policy(final.env, policy, seed)
