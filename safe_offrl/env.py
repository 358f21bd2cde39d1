"""One way to make an environment, and one adapter that makes any environment look the same.

Every command goes through :func:`make_env`: observations are float32 vectors, actions live in
[-1, 1]^A, every episode ends within a known horizon, and every step says whether it was an
accident. Nothing else of this package reads ``info["cost"]`` or an environment's action bounds.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import math
import platform
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from safe_offrl.errors import EnvError
from safe_offrl.safety import SafetySpec

Vector = NDArray[np.float32]
AccidentRule = Callable[[Any, Any, Any, float, bool, bool, Mapping[str, Any]], bool]


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


def make_env(env_id: str, spec: SafetySpec, *, render_mode: str | None = None) -> AccidentEnv:
    """Make any Gymnasium environment, adapted to this package.

    ``env_id`` is a registered id ("PointHazard-v0") or "package.module:Env-v0", where importing
    ``package.module`` registers the id; the module may lie in the working directory. Raises
    EnvError for an unknown id, a module that does not import, or an environment that cannot be
    used (see :class:`AccidentEnv`).
    """
    importlib.import_module("safe_offrl.envs")  # registers the environments that come with us
    module, separator, _ = env_id.partition(":")
    if separator:
        _import_user_module(module, f'environment "{env_id}"')
    # A constructor need not know render_mode, not even as None.
    options: dict[str, Any] = {} if render_mode is None else {"render_mode": render_mode}
    try:
        # The passive checker repeats, as warnings, what AccidentEnv refuses with an error.
        env = gymnasium.make(env_id, disable_env_checker=True, **options)
    except gymnasium.error.UnregisteredEnv as error:
        raise EnvError(
            f'There is no environment "{env_id}": {_sentence(error)} Give a registered Gymnasium '
            'id, or "package.module:Env-v0" so that the module that registers it is imported.'
        ) from error
    except Exception as error:  # whatever the environment's constructor raises
        raise EnvError(
            f'The environment "{env_id}" could not be made: {_sentence(error)} '
            "Check that gymnasium.make accepts this id."
        ) from error
    try:
        return AccidentEnv(env, spec, env_id=env_id)
    except EnvError:
        env.close()
        raise


class AccidentEnv(gymnasium.Wrapper[Vector, Vector, Any, Any]):
    """A Gymnasium environment as the loops see it.

    * Observations: a Box, or a Dict or Tuple of Boxes (nested too), flattened to one float32
      vector [O] in the order of the space: the keys as the Dict space lists them, a Tuple from
      left to right, each Box in C order.
    * Actions: [A] in [-1, 1], clipped and rescaled to the bounds of the environment's Box.
    * ``info["accident"]``: bool, the verdict of the one rule ``spec.accident``.
      ``info["cost"]``: float, the environment's own number; 1 for an accident and 0 otherwise
      where the environment gives none.
    * The episode is truncated after ``horizon`` steps. A step that terminates is not truncated.

    A user's accident function is given the environment's own observations and actions, not the
    flattened ones. EnvError is raised for spaces that cannot be used, for an environment without
    horizon or accident signal, and for non-finite observations, rewards, costs or actions.
    """

    def __init__(
        self, env: gymnasium.Env[Any, Any], spec: SafetySpec, *, env_id: str | None = None
    ) -> None:
        super().__init__(env)
        self.env_id: str = env_id or (env.spec.id if env.spec else type(env.unwrapped).__name__)
        self.horizon: int = _horizon(self.env_id, env, spec)
        self._threshold = spec.cost_threshold
        self._rule_name = spec.accident
        self._rule = None if spec.accident == "cost" else _accident_rule(spec.accident)
        self._boxes_space = env.observation_space
        boxes = _boxes(self.env_id, env.observation_space)
        with np.errstate(over="ignore"):  # a float64 bound beyond float32 becomes infinite
            low = np.concatenate([box.low.ravel() for box in boxes]).astype(np.float32)
            high = np.concatenate([box.high.ravel() for box in boxes]).astype(np.float32)
        self.observation_size: int = len(low)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        box = _action_box(self.env_id, env.action_space)
        self.action_size: int = math.prod(box.shape)
        self.action_space = spaces.Box(-1.0, 1.0, (self.action_size,), np.float32)
        self._action_box = box
        self._action_low = box.low.astype(np.float64)
        self._action_range = box.high.astype(np.float64) - self._action_low
        self._steps = 0
        self._raw_observation: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Vector, dict[str, Any]]:
        """Start an episode; returns (observation [O], info)."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._steps = 0
        self._raw_observation = observation
        return self._flatten(observation), info

    def step(self, action: Vector) -> tuple[Vector, float, bool, bool, dict[str, Any]]:
        """Act with ``action`` [A] in [-1, 1]; ``info`` holds "accident" (bool), "cost" (float)."""
        raw_action = self._rescale(action)
        raw_next, raw_reward, raw_terminated, raw_truncated, info = self.env.step(raw_action)
        self._steps += 1
        terminated = bool(raw_terminated)
        truncated = (bool(raw_truncated) or self._steps >= self.horizon) and not terminated
        observation = self._flatten(raw_next)
        reward = float(raw_reward)
        if not math.isfinite(reward):
            raise EnvError(
                f'"{self.env_id}" gave the reward {reward} at step {self._steps}. '
                "Fix the environment: rewards must be finite numbers."
            )
        if self._rule is None:
            cost = self._cost(info)
            accident = cost > self._threshold
        else:
            accident = self._rule(
                self._raw_observation, raw_action, raw_next, reward, terminated, truncated, info
            )
            if not isinstance(accident, bool | np.bool_):
                raise EnvError(
                    f'The accident rule "{self._rule_name}" returned {accident!r}. '
                    "Make it return True or False."
                )
            cost = self._cost(info) if "cost" in info else float(accident)
        self._raw_observation = raw_next
        return (
            observation,
            reward,
            terminated,
            truncated,
            {**info, "accident": bool(accident), "cost": cost},
        )

    def versions(self) -> dict[str, str]:
        """What the behaviour of this environment depends on: packages, and its own source file.

        "environment" is the installed distribution that holds it, or the module's name;
        "environment_source" the sha256 of the file that defines it ("unknown" if there is none).
        """
        cls = type(self.unwrapped)
        package = cls.__module__.partition(".")[0]
        try:
            distribution = f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            distribution = cls.__module__
        try:
            source = hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
        except (OSError, TypeError):  # defined in an interactive session or in C
            source = "unknown"
        return {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "gymnasium": gymnasium.__version__,
            "environment": distribution,
            "environment_source": source,
        }

    def _rescale(self, action: Vector) -> NDArray[Any]:
        """[A] in [-1, 1] -> the environment's own bounds, shape and dtype."""
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
        share = (np.clip(unit, -1.0, 1.0).reshape(self._action_box.shape) + 1.0) / 2.0
        raw = self._action_low + share * self._action_range
        return raw.astype(self._action_box.dtype)

    def _flatten(self, observation: Any) -> Vector:
        """The environment's observation -> float32 [O]."""
        parts: list[NDArray[Any]] = []
        _gather(self._boxes_space, observation, parts)
        with np.errstate(over="ignore"):  # what overflows float32 is refused below
            flat = np.concatenate(parts).astype(np.float32)
        if flat.shape != (self.observation_size,):
            raise EnvError(
                f'"{self.env_id}" gave an observation of {flat.size} numbers, but its observation '
                f"space has {self.observation_size}. Fix the environment: "
                "gymnasium.utils.env_checker.check_env finds such faults."
            )
        if not np.isfinite(flat).all():
            raise EnvError(
                f'"{self.env_id}" gave an observation with NaN or infinity at step {self._steps}. '
                "Fix the environment: observations must be finite numbers."
            )
        return flat

    def _cost(self, info: Mapping[str, Any]) -> float:
        if "cost" not in info:
            raise EnvError(
                f'"{self.env_id}" gives no accident signal: the accident rule is "cost", but '
                'info has no "cost". Put info["cost"] into the environment\'s step(), or set '
                "safety.accident=terminated, or safety.accident=package.module:function."
            )
        cost = float(info["cost"])
        if not math.isfinite(cost):
            raise EnvError(
                f'"{self.env_id}" gave the cost {cost} at step {self._steps}. '
                "Fix the environment: costs must be finite numbers."
            )
        return cost


def _horizon(env_id: str, env: gymnasium.Env[Any, Any], spec: SafetySpec) -> int:
    limit = env.spec.max_episode_steps if env.spec else None
    if spec.horizon is None and limit is None:
        raise EnvError(
            f'"{env_id}" has no time limit, so "an accident within the horizon" has no meaning. '
            "Set safety.horizon=STEPS, or register the environment with max_episode_steps."
        )
    if spec.horizon is not None and limit is not None and spec.horizon > limit:
        raise EnvError(
            f'safety.horizon is {spec.horizon}, but "{env_id}" ends every episode after {limit} '
            f"steps. Leave safety.horizon out, or set it to at most {limit}."
        )
    horizon = spec.horizon if spec.horizon is not None else limit
    assert horizon is not None
    return horizon


def _boxes(env_id: str, space: spaces.Space[Any]) -> list[spaces.Box]:
    """The Boxes of an observation space, in the order in which they are flattened."""
    if isinstance(space, spaces.Dict):
        return [box for part in space.spaces.values() for box in _boxes(env_id, part)]
    if isinstance(space, spaces.Tuple):
        return [box for part in space.spaces for box in _boxes(env_id, part)]
    if not isinstance(space, spaces.Box):
        raise EnvError(
            f'"{env_id}" has observations of type {type(space).__name__}. Only Box, and Dict or '
            "Tuple of Box, can be used: convert them with a gymnasium.ObservationWrapper."
        )
    if len(space.shape) >= 3:
        raise EnvError(
            f'"{env_id}" has image observations of shape {space.shape}, which are not supported. '
            "Use an environment with vector observations, or wrap it in a feature extractor."
        )
    return [space]


def _gather(space: spaces.Space[Any], value: Any, parts: list[NDArray[Any]]) -> None:
    """Append the values of every Box of ``space`` to ``parts``, each raveled."""
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            _gather(part, value[key], parts)
    elif isinstance(space, spaces.Tuple):
        for part, element in zip(space.spaces, value, strict=True):
            _gather(part, element, parts)
    else:
        parts.append(np.asarray(value).ravel())


def _action_box(env_id: str, space: spaces.Space[Any]) -> spaces.Box:
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        kind = "integer Box" if isinstance(space, spaces.Box) else type(space).__name__
        raise EnvError(
            f'"{env_id}" has a discrete action space ({kind}), which is not supported yet. '
            "Use an environment with a continuous (Box) action space."
        )
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise EnvError(
            f'"{env_id}" has infinite action bounds, so actions cannot be scaled to [-1, 1]. '
            "Give its action space finite bounds, for example with gymnasium's RescaleAction."
        )
    return space


def _accident_rule(name: str) -> AccidentRule:
    """The function behind "terminated" or "package.module:function"."""
    if name == "terminated":
        return lambda _o, _a, _next, _reward, terminated, _truncated, _info: terminated
    module_name, _, function = name.partition(":")
    module = _import_user_module(module_name, f'accident rule "{name}"')
    rule: AccidentRule | None = getattr(module, function, None)
    if not callable(rule):
        raise EnvError(
            f'The accident rule "{name}" cannot be used: the module {module_name} has no function '
            f'"{function}". Check the spelling of safety.accident=package.module:function.'
        )
    return rule


def _import_user_module(name: str, purpose: str) -> Any:
    """Import a module that may lie in the working directory, as ``python -m`` would."""
    here = str(Path.cwd())
    if here not in sys.path:  # a console script does not have it
        sys.path.insert(0, here)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises
        raise EnvError(
            f"The module {name} of the {purpose} could not be imported: {_sentence(error)} "
            "Run from the folder that holds it, or install it."
        ) from error


def _sentence(error: Exception) -> str:
    """An exception as one line that ends in a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "?", "!")) else text + "."
