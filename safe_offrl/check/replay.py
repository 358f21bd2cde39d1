"""Is an episode the same again? One seed and one list of actions, here and in another process."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_offrl.collect.processes import own_command
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.make import make_env
from safe_offrl.env.observations import entry_name
from safe_offrl.errors import EnvError, UserError
from safe_offrl.spec import SafetySpec

Array = NDArray[Any]
TIMEOUT = 120.0  # another process gets so many seconds for one episode
OUTCOMES = ("the reward", "the cost", "the accident", "the termination", "the truncation")


class Recording(NamedTuple):
    """One episode of n steps.

    ``observations`` [n + 1, O], the first one from reset; ``outcomes`` [n, 5 + K] float64, as
    :data:`OUTCOMES` names them, and the environment its signals; ``actions`` [n, A] as they were
    sent.
    """

    observations: Array
    outcomes: Array
    actions: Array


def record(
    env: AccidentEnv, seed: int, controller: Callable[[Array], Array], max_steps: int | None = None
) -> Recording:
    """Play one episode, or its first ``max_steps``; the controller maps [O] to [A]."""
    observation, _ = env.reset(seed=seed)
    observations: list[Array] = [observation]
    outcomes: list[list[float]] = []
    actions: list[Array] = []
    ended = False
    while not ended and len(actions) != max_steps:
        action = controller(observation)
        observation, reward, terminated, truncated, info = env.step(action)
        observations.append(observation)
        signals = info["signals"].values() if env.signals else ()
        outcomes.append([reward, info["cost"], info["accident"], terminated, truncated, *signals])
        actions.append(action)
        ended = terminated or truncated
    values = np.array(outcomes, dtype=np.float64)
    return Recording(np.array(observations), values, np.array(actions))


def replay(env: AccidentEnv, seed: int, actions: Array) -> Recording:
    """Play given actions [n, A], until the episode ends or there are no more."""
    left = iter(actions)
    return record(env, seed, lambda _: next(left), max_steps=len(actions))


def replay_elsewhere(env_id: str, spec: SafetySpec, seed: int, actions: Array) -> Recording:
    """The same in another process, which makes the environment anew.

    Raises EnvError if that does not come to an end, with the last line of the process's complaint.
    """
    request = {"env_id": env_id, "spec": dataclasses.asdict(spec), "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "request.json").write_text(json.dumps(request))
        np.save(Path(folder) / "actions.npy", actions)
        command = [*own_command("check.replay"), folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise EnvError(
                f"One episode took another process more than {TIMEOUT:.0f} seconds. "
                "Look for a lock, or for a simulator that allows one process only."
            ) from error
        if done.returncode:
            raise EnvError((done.stderr.strip().splitlines() or ["It ended without a word."])[-1])
        with np.load(Path(folder) / "recording.npz") as stored:
            return Recording(stored["observations"], stored["outcomes"], stored["actions"])


def first_difference(env: AccidentEnv, first: Recording, second: Recording) -> str | None:
    """Where two recordings of the same actions part, in words; None if every bit is equal."""
    names = (*OUTCOMES, *(f"the signal {name}" for name in env.signals))
    for step in range(min(len(first.observations), len(second.observations))):
        when = f"at step {step}" if step else "after reset"
        a, b = first.observations[step], second.observations[step]
        changed = np.flatnonzero(a != b)
        if len(changed):
            k = int(changed[0])
            return f"{when}, {entry_name(env.layout, k)} was {a[k]:.9g} and then {b[k]:.9g}"
        if step:
            a, b = first.outcomes[step - 1], second.outcomes[step - 1]
            changed = np.flatnonzero(a != b)
            if len(changed):
                k = int(changed[0])
                return f"{when}, {names[k]} was {a[k]:.9g} and then {b[k]:.9g}"
    return None


def _main(folder: Path) -> None:
    """What the other process does."""
    request = json.loads((folder / "request.json").read_text())
    env = make_env(request["env_id"], SafetySpec(**request["spec"]))
    recording = replay(env, request["seed"], np.load(folder / "actions.npy"))
    np.savez(folder / "recording.npz", **recording._asdict())


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]))
    except UserError as problem:
        sys.exit(str(problem))
