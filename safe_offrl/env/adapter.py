"""One adapter that makes any environment look the same.

Every command goes through :func:`safe_offrl.env.make.make_env`: observations are float32 vectors,
actions live in [-1, 1]^A or are one-hot rows, every episode ends within a known horizon, and every
step says whether it was an accident, and what it cost. Nothing else of this package reads
``info["cost"]`` or an environment's action bounds.
"""

from __future__ import annotations

import copy
import math
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from safe_offrl.env.contract import (
    accident_rule,
    accident_verdict,
    ask,
    cost_of,
    horizon_of,
    last_observation,
    no_cost,
    no_signal,
    require_actions,
    reset_values,
    step_values,
)
from safe_offrl.env.identity import (
    environment_identity,
    environment_versions,
    rule_identity,
    signals_identity,
)
from safe_offrl.env.observations import flatten, layout
from safe_offrl.env.process import ProcessEnv
from safe_offrl.env.signals import Signals
from safe_offrl.env.user_code import raised
from safe_offrl.errors import EnvError, EnvFault
from safe_offrl.spec import COST_SHARE_MAX, SafetySpec

Vector = NDArray[np.float32]


def episode_seed(seed: int, index: int, stream: str) -> int:
    """Seed of the ``index``-th episode of a run: independent across runs, episodes and streams.

    ``stream`` names the purpose ("collect", "finetune", "evaluate"), so that evaluation never
    replays a training episode. The result fits in 31 bits, which every simulator accepts.

    >>> episode_seed(0, 0, "collect") == episode_seed(0, 0, "collect")
    True
    >>> episode_seed(0, 0, "collect") == episode_seed(0, 0, "evaluate")
    False
    """
    entropy = [seed, zlib.crc32(stream.encode()), index]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0]) >> 1


class AccidentEnv(gymnasium.Wrapper[Vector, Vector, Any, Any]):
    """A Gymnasium environment as the loops see it.

    * Observations: a Box, or a Dict or Tuple of Boxes (nested too), flattened to one float32
      vector [O] in the order of the space: the keys as the Dict space lists them, a Tuple from
      left to right, each Box in C order.
      Where ``offset`` [O] is set, it is subtracted before the numbers become float32, as it was
      from the log (:mod:`safe_offrl.data.offsets`); ``exact`` is the latest one in float64, as the
      environment gave it, and ``wide`` whether float32 may not hold it.
    * Actions: [A] in [-1, 1], clipped and rescaled to the bounds of the environment's Box. Of a
      Discrete space with A actions (``discrete``), a one-hot row [A]: the largest entry acts.
    * Under the rule "episode_cost" the observation ends with the share of the threshold that is
      used up, at most 2: without it the event would not be Markov (Saute RL, arXiv:2202.06558).
    * ``info["accident"]``: bool, the verdict of the one rule ``spec.accident``.
      ``info["cost"]``: float, the environment's own number; 1 for an accident and 0 otherwise
      where the environment gives none, or another thing than a number (which a limit on the cost
      refuses).
      ``info["signals"]``: {name: float}, the costs of ``spec.signals``, where there are any.
    * The episode is truncated after ``horizon`` steps. A step that terminates is not truncated.

    A user's accident function is given the environment's own observations and actions, not the
    flattened ones. EnvError is raised for spaces that cannot be used, for an environment without
    horizon or accident signal, and for non-finite actions; its EnvFault for whatever environment or
    rule raise, and for answers that cannot be used.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], spec: SafetySpec, *, env_id: str | None = None
    ) -> None:
        super().__init__(env)
        self.env_id: str = env_id or (env.spec.id if env.spec else type(env.unwrapped).__name__)
        self.horizon: int = horizon_of(self.env_id, env, spec)
        # Accident rule.
        self._threshold = spec.cost_threshold
        self._cost_limited = "cost" in spec.bounds
        self._rule_name = spec.accident
        self._rule = accident_rule(spec.accident)
        self.sums_cost: bool = spec.accident == "episode_cost"
        self._episode_cost = 0.0
        # Signals.
        self.signals: tuple[str, ...] = tuple(spec.signals)
        self._signal_sources = spec.signals
        self._signals = Signals(self.env_id, spec.signals)
        self._look_back = ":" in spec.accident or self._signals.look_back
        # Observations.
        self.layout = layout(self.env_id, env.observation_space)
        boxes = [part.box for part in self.layout]
        self.wide: bool = not all(np.can_cast(box.dtype, np.float32) for box in boxes)
        self.offset: NDArray[np.float64] | None = None
        self.exact: NDArray[np.float64] = np.zeros(0)
        with np.errstate(over="ignore"):  # a float64 bound beyond float32 becomes infinite
            low = np.concatenate([box.low.ravel() for box in boxes]).astype(np.float32)
            high = np.concatenate([box.high.ravel() for box in boxes]).astype(np.float32)
        if self.sums_cost:
            low, high = np.append(low, np.float32(0.0)), np.append(high, np.float32(COST_SHARE_MAX))
        self.observation_size: int = len(low)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        # Actions.
        self._actions = require_actions(self.env_id, env.action_space)
        self.discrete: bool = isinstance(self._actions, spaces.Discrete)
        if isinstance(self._actions, spaces.Discrete):
            self.action_size: int = int(self._actions.n)
        else:
            self.action_size = math.prod(self._actions.shape)
            self._action_low = self._actions.low.astype(np.float64)
            self._action_range = self._actions.high.astype(np.float64) - self._action_low
        lowest = 0.0 if self.discrete else -1.0
        self.action_space = spaces.Box(lowest, 1.0, (self.action_size,), np.float32)
        # Episode.
        self._steps = 0
        self._raw_observation: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Vector, dict[str, Any]]:
        """Start an episode; returns (observation [O], info)."""
        answer = ask(self.env.reset, seed=seed, options=options)
        observation, info = reset_values(self.env_id, answer)
        self._steps = 0
        self._episode_cost = 0.0
        self._remember(observation)
        return self.observe(observation, 0.0), info

    def step(self, action: Vector) -> tuple[Vector, float, bool, bool, dict[str, Any]]:
        """Act with ``action`` [A]; ``info`` holds "accident" (bool), "cost" (float), "signals"."""
        # Step.
        raw_action = self.own_action(action)
        # It gets a copy, because some environments write into the action that they are given.
        answer = ask(self.env.step, copy.copy(raw_action))
        self._steps += 1
        raw_next, reward, terminated, cut, info = step_values(self.env_id, answer, self._steps)
        truncated = (cut or self._steps >= self.horizon) and not terminated
        told = (self._raw_observation, raw_action, raw_next, reward, terminated, truncated)
        # Cost and accident.
        cost = cost_of(self.env_id, info, self._steps, limited=self._cost_limited)
        if self._rule is None:
            if cost is None:
                raise no_signal(self.env_id, info, self._rule_name, self._steps)
            self._episode_cost += cost
            accident = (self._episode_cost if self.sums_cost else cost) > self._threshold
        else:
            accident = accident_verdict(self._rule_name, self._rule, *told, info)
            if cost is None and self._cost_limited and info.get("cost") is not None:
                raise no_cost(self.env_id, info)
            cost = float(accident) if cost is None else cost
        found: dict[str, Any] = {"accident": accident, "cost": cost}
        if self.signals:
            found["signals"] = self._signals.of_step(self._steps, info, *told)
        # Observation.
        observation = self.observe(raw_next, self._episode_cost)
        if terminated or truncated:
            self._require_last(observation, info)
        self._remember(raw_next)
        return observation, reward, terminated, truncated, {**info, **found}

    def close(self) -> None:
        """Close the environment; a warning where that fails, for no result depends on it."""
        try:
            super().close()
        except Exception as error:  # whatever the environment raises
            text = f'Closing "{self.env_id}" failed: {raised(error)}. Nothing is lost by it.'
            warnings.warn(text, stacklevel=2)

    def _remember(self, observation: Any) -> None:
        """Keep what a user's rule is shown: as it was, should the environment write into it."""
        if self._look_back:
            self._raw_observation = copy.deepcopy(observation)

    def _require_last(self, observation: Vector, info: Mapping[str, Any]) -> None:
        """EnvError if an episode ends with an observation that is the next one's first."""
        last = last_observation(info)
        if last is not None and not np.array_equal(
            self.observe(last, self._episode_cost), observation
        ):
            raise EnvError(
                f'"{self.env_id}" resets itself within the step that ends an episode, so that its '
                "last observation is the first one of the next episode. Take the wrapper off that "
                "does it: every episode is begun with reset() here."
            )

    def versions(self) -> dict[str, str]:
        """What the behaviour of this environment depends on, see :func:`.environment_versions`."""
        env = self.unwrapped
        return (
            dict(env.described["versions"])
            if isinstance(env, ProcessEnv)
            else environment_versions(env)
        )

    def identity(self) -> dict[str, Any]:
        """What this environment and its rule are, see :mod:`safe_offrl.env.identity`; JSON-able.

        To be asked for before the first reset: an environment may change what it was made with.
        """
        env = self.unwrapped
        return {
            "environment": dict(env.described["identity"])
            if isinstance(env, ProcessEnv)
            else environment_identity(self.env, self.env_id),
            "rule": rule_identity(self._rule_name, self._threshold),
            "horizon": self.horizon,
            **({"signals": signals_identity(self._signal_sources)} if self.signals else {}),
        }

    def executed(self, action: Vector) -> Vector:
        """The action [A] that ``step`` carries out when given this one: clipped, or one-hot."""
        if not self.discrete:
            return np.clip(action, -1.0, 1.0)
        return np.eye(self.action_size, dtype=np.float32)[self._finite(action).argmax()]

    def one_hot(self, number: int) -> Vector:
        """The row [A] of an action of the environment's Discrete space, by its own number."""
        assert isinstance(self._actions, spaces.Discrete)
        return np.eye(self.action_size, dtype=np.float32)[number - int(self._actions.start)]

    def own_action(self, action: Vector) -> Any:
        """[A] -> the environment's own bounds, shape and dtype; of a Discrete space, its number."""
        unit = self._finite(action)
        if isinstance(self._actions, spaces.Discrete):
            return self._actions.start + unit.argmax()
        share = (np.clip(unit, -1.0, 1.0).reshape(self._actions.shape) + 1.0) / 2.0
        raw = self._action_low + share * self._action_range
        return raw.astype(self._actions.dtype)

    def _finite(self, action: Vector) -> NDArray[np.float64]:
        """The action [A] if it is one."""
        unit = np.asarray(action, dtype=np.float64)
        if unit.shape != (self.action_size,):
            raise ValueError(
                f"an action of shape ({self.action_size},) is needed, not {unit.shape}"
            )
        if not np.isfinite(unit).all():
            raise EnvError(
                f"The policy chose the action {unit.tolist()}, which was not sent. "
                "Training has diverged: use an earlier checkpoint or a lower learning rate."
            )
        return unit

    def observe(self, observation: Any, episode_cost: float) -> Vector:
        """The flattened observation and, if the accident depends on it, the cost so far, [O]."""
        flat = self._flatten(observation)
        if not self.sums_cost:
            return flat
        share = min(episode_cost / self._threshold, COST_SHARE_MAX)
        self.exact = np.append(self.exact, share)
        return np.append(flat, np.float32(share))

    def _flatten(self, observation: Any) -> Vector:
        """The environment's observation -> float32 vector."""
        self.exact = flatten(self.env_id, self.layout, observation)
        flat = self.exact
        expected = self.observation_size - self.sums_cost
        if flat.shape != (expected,):
            raise EnvFault(
                f'"{self.env_id}" gave an observation of {flat.size} numbers, but its observation '
                f"space has {expected}. Fix the environment: "
                "gymnasium.utils.env_checker.check_env finds such faults."
            )
        if self.offset is not None:
            flat = flat - self.offset
        with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite
            seen = flat.astype(np.float32)
        if not np.isfinite(seen).all():
            raise EnvFault(
                f'"{self.env_id}" gave an observation with NaN or infinity at step {self._steps}. '
                "Fix the environment: observations must be finite numbers."
            )
        return seen
