"""Log a dataset of mixed quality from a mixture of behaviours, deterministically.

The behaviours are scripted controllers where the environment's module offers them, PPO policies of
Stable-Baselines3 frozen at several stages of training, and smooth random actions. How often each of
them acts is chosen from a pilot so that the log holds a stated share of accident episodes. The
interaction of PPO's training and of the pilot is NOT part of the log.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from safe_offrl.behaviours import (
    Behaviour,
    Progress,
    Vector,
    ppo_behaviours,
    random_behaviour,
    scripted_behaviours,
)
from safe_offrl.data.hdf5 import write_dataset
from safe_offrl.env import AccidentEnv, episode_seed, make_env
from safe_offrl.errors import ConfigError, EnvError, UserError
from safe_offrl.safety import SafetySpec

MIN_SHARE = 0.1  # of an equal share: what each behaviour gets at least
PILOT_EPISODES = 250  # per behaviour, at most
PILOT_BUDGET = 1.0  # the pilot's steps, all behaviours together, as a share of the log's
SHARE_TOLERANCE = 0.05  # a log whose accident share is further from the target carries a warning


def accident_mixture(probabilities: Sequence[float], target: float) -> NDArray[np.float64]:
    """Share of the episodes for each behaviour, so that a share ``target`` has an accident.

    ``probabilities`` [K]: accident probability per episode of each behaviour. Exponential tilting
    of the equal mixture, ``w_k = m / K + (1 - m) softmax(theta p)_k`` with m = :data:`MIN_SHARE`;
    the mixture's accident share rises with theta, which is found by bisection. A target out of
    reach gives the nearest mixture.
    """
    p = np.asarray(probabilities, dtype=np.float64)

    def mixture(theta: float) -> NDArray[np.float64]:
        tilted = np.exp(theta * (p - (p.max() if theta > 0 else p.min())))
        return np.asarray(MIN_SHARE / len(p) + (1.0 - MIN_SHARE) * tilted / tilted.sum())

    low, high = -1e4, 1e4
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if mixture(middle) @ p < target else (low, middle)
    return mixture(0.5 * (low + high))


def collect(
    env: AccidentEnv,
    *,
    behaviours: Sequence[Behaviour],
    shares: Sequence[float] | NDArray[np.float64],
    transitions: int,
    seed: int,
    episodes: int | None = None,
    stream: str = "collect",
    progress: Progress | None = None,
) -> dict[str, NDArray[Any]]:
    """Log whole episodes until ``transitions`` steps (or ``episodes`` episodes) are reached.

    ``shares`` [K] sums to 1; episode by episode the behaviour furthest behind its share acts, so
    any prefix of the log has the mixture. Episode k is reset with
    ``episode_seed(seed, k, stream)``. Returns the arrays of
    :func:`safe_offrl.data.hdf5.write_dataset`, ``accidents`` and ``episode_behaviours`` included.
    """
    log = _Log()
    done = np.zeros(len(behaviours))
    index = accident_episodes = 0
    while len(log.rewards) < transitions and (episodes is None or index < episodes):
        k = int(np.argmax(np.asarray(shares) * (index + 1) - done))
        rng = np.random.default_rng(episode_seed(seed, index, f"{stream} behaviour"))
        accident_episodes += log.episode(
            env, behaviours[k], k, seed=episode_seed(seed, index, stream), rng=rng
        )
        done[k] += 1
        index += 1
        if index % 250 == 0:
            _tell(
                progress,
                f"logging: {min(len(log.rewards), transitions):,} of {transitions:,} transitions, "
                f"{accident_episodes / index:.1%} accident episodes",
            )
    return log.arrays()


def build_dataset(
    env_id: str,
    spec: SafetySpec,
    *,
    path: str | Path,
    transitions: int = 100_000,
    seed: int = 0,
    target_accident_share: float = 0.15,
    training_steps: int = 80_000,
    progress: Progress | None = None,
) -> Path:
    """Log a dataset of ``env_id`` into the HDF5 file ``path``; returns the path.

    Trains PPO for ``training_steps`` (0: no PPO), estimates each behaviour's accident probability
    in a pilot, and mixes the behaviours towards ``target_accident_share`` of the episodes. Where
    no mixture comes near it, the closest is taken; the metadata's "warning" and ``progress`` say
    so. Deterministic for given versions and machine: the same arguments give the same sha256.
    """
    if transitions < 1 or training_steps < 0:
        raise ConfigError(
            f"{transitions} transitions and {training_steps} training steps cannot be collected. "
            "Ask for at least 1 transition and 0 training steps."
        )
    if not 0.0 <= target_accident_share <= 1.0:
        raise ConfigError(
            f"The target share of accident episodes is {target_accident_share}, but a number in "
            "[0, 1] is needed. Try 0.15."
        )
    env = make_env(env_id, spec)
    behaviours = [*scripted_behaviours(env), random_behaviour(env.action_size)]
    if training_steps:
        behaviours += ppo_behaviours(
            env_id, spec, steps=training_steps, seed=seed, progress=progress
        )
    pilot = [
        _pilot(env, behaviour, math.ceil(PILOT_BUDGET * transitions / len(behaviours)), seed)
        for behaviour in behaviours
    ]
    arrays = collect(
        env,
        behaviours=behaviours,
        shares=accident_mixture(pilot, target_accident_share),
        transitions=transitions,
        seed=seed,
        progress=progress,
    )
    share = float(_accident_episodes(arrays).mean())
    metadata = {
        "env_id": env_id,
        "accident": spec.accident,
        "cost_threshold": spec.cost_threshold,
        "horizon": env.horizon,
        "seed": seed,
        "action_low": -1.0,
        "action_high": 1.0,
        "behaviours": [
            {"name": b.name, "episodes": int((arrays["episode_behaviours"] == k).sum())}
            for k, b in enumerate(behaviours)
        ],
        "accident_share": share,
        "target_accident_share": target_accident_share,
        "training": {"algorithm": "PPO", "steps": training_steps, "logged": False},
        "versions": _versions(env),
    }
    env.close()
    if abs(share - target_accident_share) > SHARE_TOLERANCE:
        metadata["warning"] = (
            f"{share:.1%} of the episodes have an accident, not the {target_accident_share:.0%} "
            "aimed at: the nearest mixture that the pilot found comes no closer."
        )
        _tell(progress, f"warning: {metadata['warning']}")
    write_dataset(path, arrays, metadata)
    _tell(
        progress,
        f"logged {len(arrays['rewards']):,} transitions in {len(arrays['episode_behaviours']):,} "
        f"episodes, {share:.1%} with an accident: {path}",
    )
    return Path(path)


def default_dataset(
    env_id: str = "PointHazard-v0",
    spec: SafetySpec | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Path of the cached default dataset of an environment; built on first use.

    It lies in ``$SAFE_OFFRL_CACHE``, else ``~/.cache/safe-offrl``, under a name that depends on the
    environment, the accident rule, all versions, and the sources of this module and behaviours.py,
    so a change of any of them builds a new file. Processes that ask at the same time wait for one
    of them to build it.
    """
    spec = spec or SafetySpec()
    env = make_env(env_id, spec)
    key = {
        "env_id": env_id,
        "accident": spec.accident,
        "cost_threshold": spec.cost_threshold,
        "horizon": env.horizon,
        "versions": _versions(env),
        "sources": [
            hashlib.sha256(Path(__file__).with_name(name).read_bytes()).hexdigest()
            for name in ("behaviours.py", "collect.py")
        ],
    }
    env.close()
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("SAFE_OFFRL_CACHE") or Path.home() / ".cache" / "safe-offrl")
    path = folder / f"{env_id.rpartition(':')[2].replace('/', '-')}-{digest}.hdf5"
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():  # another process may have built it meanwhile
                _tell(progress, f"building the default dataset of {env_id} (once): {path}")
                build_dataset(env_id, spec, path=path, progress=progress)
    except OSError as error:
        raise UserError(
            f'The dataset cache "{folder}" cannot be written ({error}). '
            "Set the environment variable SAFE_OFFRL_CACHE to a folder of yours."
        ) from error
    return path


def _pilot(env: AccidentEnv, behaviour: Behaviour, steps: int, seed: int) -> float:
    """Estimated accident probability per episode, (k + 1/2) / (n + 1), from unlogged episodes."""
    arrays = collect(
        env,
        behaviours=[behaviour],
        shares=[1.0],
        transitions=steps,
        episodes=PILOT_EPISODES,
        seed=seed,
        stream=f"pilot {behaviour.name}",
    )
    accidents = _accident_episodes(arrays)
    return float((accidents.sum() + 0.5) / (len(accidents) + 1))


def _accident_episodes(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Whether each episode of a log of complete episodes had an accident [M]."""
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"])
    starts = np.concatenate([[0], ends[:-1] + 1])
    result: NDArray[np.bool_] = np.logical_or.reduceat(arrays["accidents"], starts)
    return result


def _versions(env: AccidentEnv) -> dict[str, str]:
    """What the content of a dataset depends on besides the arguments."""
    names = ("safe-offrl", "torch", "stable-baselines3")
    return env.versions() | {name: importlib.metadata.version(name) for name in names}


def _tell(progress: Progress | None, message: str) -> None:
    if progress is not None:
        progress(message)


class _Log:
    """Transitions of complete episodes, as lists until :meth:`arrays`."""

    def __init__(self) -> None:
        self.observations: list[Vector] = []
        self.next_observations: list[Vector] = []
        self.actions: list[Vector] = []
        self.rewards: list[float] = []
        self.costs: list[float] = []
        self.terminals: list[bool] = []
        self.timeouts: list[bool] = []
        self.accidents: list[bool] = []
        self.behaviours: list[int] = []

    def episode(
        self,
        env: AccidentEnv,
        behaviour: Behaviour,
        behaviour_index: int,
        *,
        seed: int,
        rng: np.random.Generator,
    ) -> bool:
        """Log one episode; returns whether it had an accident."""
        controller = behaviour.factory(rng)
        observation, _ = env.reset(seed=seed)
        start, ended = len(self.rewards), False
        while not ended:
            action = np.asarray(controller(observation), dtype=np.float32)
            if action.shape != (env.action_size,):
                raise EnvError(
                    f'The behaviour "{behaviour.name}" gave an action of shape {action.shape}, but '
                    f'"{env.env_id}" needs ({env.action_size},). Fix its scripted_behaviours().'
                )
            # Stored as executed: the environment would clip silently.
            action = np.clip(action, -1.0, 1.0)
            following, reward, terminated, truncated, info = env.step(action)
            self.observations.append(observation)
            self.next_observations.append(following)
            self.actions.append(action)
            self.rewards.append(reward)
            self.costs.append(info["cost"])
            self.terminals.append(terminated)
            self.timeouts.append(truncated)
            self.accidents.append(info["accident"])
            observation, ended = following, terminated or truncated
        self.behaviours.append(behaviour_index)
        return any(self.accidents[start:])

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The log in the DSRL layout."""
        return {
            "observations": np.array(self.observations, dtype=np.float32),
            "next_observations": np.array(self.next_observations, dtype=np.float32),
            "actions": np.array(self.actions, dtype=np.float32),
            "rewards": np.array(self.rewards, dtype=np.float32),
            "costs": np.array(self.costs, dtype=np.float32),
            "terminals": np.array(self.terminals, dtype=bool),
            "timeouts": np.array(self.timeouts, dtype=bool),
            "accidents": np.array(self.accidents, dtype=bool),
            "episode_behaviours": np.array(self.behaviours, dtype=np.int32),
        }
