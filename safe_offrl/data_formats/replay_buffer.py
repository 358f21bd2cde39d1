"""What Stable-Baselines3 keeps of its training, as a dataset: a ReplayBuffer object, unimported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.data_formats.complete import complete, stand_in_warning
from safe_offrl.data_formats.flags import at_horizon
from safe_offrl.data_formats.validation import validate_arrays
from safe_offrl.errors import DataError
from safe_offrl.spec import SafetySpec
from safe_offrl.types import signal_column


def from_replay_buffer(
    buffer: Any,
    *,
    costs: NDArray[Any] | None = None,
    signals: Mapping[str, NDArray[Any]] | None = None,
    env_id: str | None = None,
    horizon: int | None = None,
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays and metadata, as write_dataset takes them, of a Stable-Baselines3 ReplayBuffer.

    ``costs`` [buffer_size, n_envs] (or [buffer_size] of one environment) stand in the buffer's own
    slots; the buffer itself keeps none, unless a subclass has an attribute ``costs``. So do named
    cost ``signals``, {name: array}. Environments
    follow each other, each from its first whole episode (in a full ring the oldest one has lost its
    beginning) to its last step, where an unfinished episode counts as cut. ``horizon`` is needed
    without handle_timeout_termination, as time limits are then unknown. optimize_memory_usage=True
    also forgets the observation after an episode's last step, for which that step's own stands in.
    Actions are taken as SAC, TD3 and DQN store them: scaled to [-1, 1], or integers, which become
    one-hot. Raises DataError.
    """
    if isinstance(buffer.observations, dict):
        raise DataError(
            "The replay buffer holds dict observations. Train on a flattened environment "
            "(gymnasium.wrappers.FlattenObservation)."
        )
    # Costs.
    costs = getattr(buffer, "costs", None) if costs is None else costs
    if costs is None:
        raise DataError(
            "The replay buffer holds no costs. Give them as `costs`, an array "
            f"[{buffer.buffer_size}, {buffer.n_envs}] in the buffer's own slots."
        )
    SafetySpec(signals={name: name for name in signals or {}})  # which refuses what is no name
    named = {signal_column(name): values for name, values in (signals or {}).items()}
    slots = {key: _slots(buffer, key, values) for key, values in {"costs": costs, **named}.items()}
    # Arrays.
    parts = [_environment(buffer, slots, k, horizon) for k in range(buffer.n_envs)]
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    if not len(arrays["rewards"]):
        raise DataError(
            "The replay buffer holds no episode from its beginning. Give it more room, or take it "
            "earlier."
        )
    # Metadata.
    guessed = int((arrays.pop("guessed") & arrays["timeouts"]).sum())
    metadata: dict[str, Any] = {"source": "Stable-Baselines3 ReplayBuffer"}
    metadata |= {k: v for k, v in {"env_id": env_id, "horizon": horizon}.items() if v is not None}
    if hasattr(buffer.action_space, "n"):
        metadata["action_count"] = int(buffer.action_space.n)
    else:
        metadata |= {"action_low": -1.0, "action_high": 1.0}
    if guessed:
        metadata["warning"] = stand_in_warning(guessed)
    # Completion.
    found, noted, remarks, _ = complete(arrays, metadata)
    validate_arrays(found)
    if remarks:
        noted["warning"] = " ".join([*remarks, *filter(None, [noted.get("warning")])])
    return found, noted


def _slots(buffer: Any, name: str, values: Any) -> NDArray[Any]:
    """Costs [buffer_size, n_envs], if they are; DataError if not."""
    costs = np.asarray(values)
    costs = costs[:, None] if costs.ndim == 1 else costs
    if costs.shape != buffer.rewards.shape:
        raise DataError(
            f"`{name}` is {list(costs.shape)}, but the replay buffer "
            f"{list(buffer.rewards.shape)}. Give one cost for each of its slots."
        )
    return costs


def _environment(
    buffer: Any, costs: Mapping[str, NDArray[Any]], k: int, horizon: int | None
) -> dict[str, NDArray[Any]]:
    """The steps of environment k from its first whole episode on, in the order of time.

    ``guessed`` [n] says where the next observation is not known.
    """
    # Slots in the order of time.
    compact = bool(buffer.optimize_memory_usage)
    slots = np.arange(buffer.pos)
    if buffer.full:
        slots = (np.arange(buffer.buffer_size) + buffer.pos) % buffer.buffer_size
        if compact:  # the newest next observation has replaced the oldest observation
            slots = slots[1:]
        ends = np.flatnonzero(buffer.dones[slots, k])
        slots = slots[ends[0] + 1 :] if len(ends) else slots[:0]
    # Timeouts.
    n, dones = len(slots), buffer.dones[slots, k] > 0
    if buffer.handle_timeout_termination:
        timeouts = buffer.timeouts[slots, k] > 0
    else:
        timeouts = dones & at_horizon(dones, horizon)
    # Next observations.
    guessed = dones & compact
    guessed[-1:] = False  # of the newest step it is still there
    observations = buffer.observations[:, k].reshape(buffer.buffer_size, -1)
    if compact:
        following = observations[(slots + 1) % buffer.buffer_size]
        following[guessed] = observations[slots[guessed]]
    else:
        following = buffer.next_observations[slots, k].reshape(n, observations.shape[1])
    # Ends.
    terminals = dones & ~timeouts
    timeouts[-1:] |= ~dones[-1:]  # the next environment's steps are another episode
    return {
        "observations": observations[slots],
        "next_observations": following,
        "actions": buffer.actions[slots, k],
        "rewards": buffer.rewards[slots, k],
        **{key: values[slots, k] for key, values in costs.items()},
        "terminals": terminals,
        "timeouts": timeouts,
        "guessed": guessed,
    }
