"""Log whole episodes of a mixture of behaviours: how often each acts, and what is kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.collect.behaviours import Behaviour, Vector
from safe_offrl.collect.dropped import Dropped
from safe_offrl.env.adapter import AccidentEnv, episode_seed
from safe_offrl.errors import EnvError, EnvFault
from safe_offrl.record.progress import Say
from safe_offrl.types import signal_column

MIN_SHARE = 0.1  # of an equal share: what each behaviour gets at least


def unsafe_mixture(probabilities: Sequence[float], target: float) -> NDArray[np.float64]:
    """Share of the episodes for each behaviour, so that a share ``target`` is unsafe.

    ``probabilities`` [K]: that an episode of each behaviour is. Exponential tilting of the equal
    mixture, ``w_k = m / K + (1 - m) softmax(theta p)_k`` with m = :data:`MIN_SHARE`; the mixture's
    unsafe share rises with theta, which is found by bisection. A target out of reach gives the
    nearest mixture.
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


def log_episodes(
    env: AccidentEnv,
    *,
    behaviours: Sequence[Behaviour],
    shares: Sequence[float] | NDArray[np.float64],
    transitions: int,
    seed: int,
    episodes: int | None = None,
    stream: str = "collect",
    progress: Say | None = None,
    log: Log | None = None,
) -> dict[str, NDArray[Any]]:
    """Log whole episodes until ``transitions`` steps (or ``episodes`` episodes) are reached.

    ``shares`` [K] sums to 1; episode by episode the behaviour furthest behind its share acts, so
    any prefix of the log has the mixture. Episode k is reset with
    ``episode_seed(seed, k, stream)``. One that the environment fails in is left out; EnvError for
    too many in a row. Returns the arrays of :func:`safe_offrl.data_formats.hdf5.write_dataset`,
    ``accidents``, ``episode_behaviours`` and signals included; observations are float64 where the
    environment's are. They are in ``log`` too, whatever is raised.
    """
    # What has been done so far.
    log = Log() if log is None else log
    done = np.zeros(len(behaviours))
    index = accident_episodes = told = 0
    while len(log.rewards) < transitions and (episodes is None or index < episodes):
        # An episode of the behaviour that is furthest behind.
        k = int(np.argmax(np.asarray(shares) * (index + 1) - done))
        rng = np.random.default_rng(episode_seed(seed, index, f"{stream} behaviour"))
        accident_episodes += log.episode(
            env, behaviours[k], k, seed=episode_seed(seed, index, stream), rng=rng
        )
        done[k] += 1
        index += 1
        # Progress, after each tenth.
        if 10 * len(log.rewards) >= (told + 1) * transitions:
            told = 10 * len(log.rewards) // transitions
            logged = max(1, len(log.behaviours))
            tell(
                progress,
                f"logging: {min(len(log.rewards), transitions):,} of {transitions:,} transitions, "
                f"{accident_episodes / logged:.1%} accident episodes, "
                f"cost {sum(log.costs) / logged:.2f} per episode",
            )
    return log.arrays(env)


def tell(progress: Say | None, message: str) -> None:
    """Pass a line of progress on to whoever wants it."""
    if progress is not None:
        progress(message)


class Log:
    """Transitions of complete episodes, as lists until :meth:`arrays`."""

    def __init__(self) -> None:
        self.dropped = Dropped()  # episodes that the environment failed in
        self.observations: list[NDArray[Any]] = []
        self.next_observations: list[NDArray[Any]] = []
        self.actions: list[Vector] = []
        self.rewards: list[float] = []
        self.costs: list[float] = []
        self.terminals: list[bool] = []
        self.timeouts: list[bool] = []
        self.accidents: list[bool] = []
        self.behaviours: list[int] = []
        self.signals: dict[str, list[float]] = {}  # by their columns

    def episode(
        self,
        env: AccidentEnv,
        behaviour: Behaviour,
        behaviour_index: int,
        *,
        seed: int,
        rng: np.random.Generator,
    ) -> bool:
        """Log one episode; returns whether it had an accident (if it is left out: False)."""
        start = len(self.rewards)
        try:
            self._play(env, behaviour, seed, rng)
        except BaseException as error:
            for rows in self._columns():
                del rows[start:]
            if not isinstance(error, EnvFault):
                raise
            self.dropped.add(error)
            return False
        self.dropped.completed()
        self.behaviours.append(behaviour_index)
        return any(self.accidents[start:])

    def _play(
        self, env: AccidentEnv, behaviour: Behaviour, seed: int, rng: np.random.Generator
    ) -> None:
        """Append the rows of one episode."""
        controller = behaviour.factory(rng)
        observation, _ = env.reset(seed=seed)
        kind = np.float64 if env.wide else np.float32
        kept, ended = env.exact.astype(kind), False
        while not ended:
            action = np.asarray(controller(observation), dtype=np.float32)
            if action.shape != (env.action_size,):
                raise EnvError(
                    f'The behaviour "{behaviour.name}" gave an action of shape {action.shape}, but '
                    f'"{env.env_id}" needs ({env.action_size},). Fix its scripted_behaviours().'
                )
            # Stored as executed: the environment would clip silently, or take the largest entry.
            action = env.executed(action)
            observation, reward, terminated, truncated, info = env.step(action)
            self.observations.append(kept)
            kept = env.exact.astype(kind)
            self.next_observations.append(kept)
            self.actions.append(action)
            self.rewards.append(reward)
            self.costs.append(info["cost"])
            self.terminals.append(terminated)
            self.timeouts.append(truncated)
            self.accidents.append(info["accident"])
            for name in env.signals:
                column = self.signals.setdefault(signal_column(name), [])
                column.append(info["signals"][name])
            ended = terminated or truncated

    def _columns(self) -> tuple[list[Any], ...]:
        """Everything that has a row for each step."""
        return (
            *(self.observations, self.next_observations, self.actions, self.rewards, self.costs),
            *(self.terminals, self.timeouts, self.accidents),
            *self.signals.values(),
        )

    def arrays(self, env: AccidentEnv) -> dict[str, NDArray[Any]]:
        """The log of ``env`` in the DSRL layout."""
        kind = np.float64 if env.wide else np.float32
        arrays: dict[str, NDArray[Any]] = {
            "observations": np.array(self.observations, dtype=kind),
            "next_observations": np.array(self.next_observations, dtype=kind),
            "actions": np.array(self.actions, dtype=np.float32),
            "rewards": np.array(self.rewards, dtype=np.float32),
            "costs": np.array(self.costs, dtype=np.float32),
            "terminals": np.array(self.terminals, dtype=bool),
            "timeouts": np.array(self.timeouts, dtype=bool),
            "accidents": np.array(self.accidents, dtype=bool),
            "episode_behaviours": np.array(self.behaviours, dtype=np.int32),
            **{key: np.array(values, dtype=np.float32) for key, values in self.signals.items()},
        }
        if env.sums_cost:  # the share of the threshold used is no part of a file: loading adds it
            for key in ("observations", "next_observations"):
                arrays[key] = arrays[key][:, :-1]
        return arrays
