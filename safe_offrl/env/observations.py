"""Observations as one vector: which of its numbers is which entry of the environment's space."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from safe_offrl.errors import EnvError, EnvFault


class SpacePart(NamedTuple):
    """One Box of an observation space: where it is found, and its numbers [start, stop)."""

    path: tuple[str | int, ...]  # keys of Dicts and positions in Tuples; () for a plain Box
    box: spaces.Box
    start: int

    @property
    def stop(self) -> int:
        """One past the last of its numbers in the flat vector."""
        return self.start + math.prod(self.box.shape)

    @property
    def name(self) -> str:
        """The path with dots: "lidar", "arm.position", "state.0"."""
        return ".".join(map(str, self.path)) or "observation"


def layout(env_id: str, space: spaces.Space[Any]) -> tuple[SpacePart, ...]:
    """The Boxes of an observation space in the order in which they are flattened.

    A Dict in the order of its ``spaces`` (Gymnasium sorts the keys of a plain dict, and keeps the
    order of an OrderedDict, of pairs and of keyword arguments), a Tuple from left to right, each
    Box in C order. EnvError for any other space, and for images.
    """
    parts: list[SpacePart] = []

    def visit(path: tuple[str | int, ...], space: spaces.Space[Any]) -> None:
        # Spaces of spaces.
        if isinstance(space, spaces.Dict):
            for key, inner in space.spaces.items():
                visit((*path, key), inner)
        elif isinstance(space, spaces.Tuple):
            for index, inner in enumerate(space.spaces):
                visit((*path, index), inner)
        elif not isinstance(space, spaces.Box):
            # Spaces that are no vectors.
            raise EnvError(
                f'"{env_id}" has observations of type {type(space).__name__}. Only Box, and Dict '
                "or Tuple of Box, can be used: convert them with a gymnasium.ObservationWrapper."
            )
        elif len(space.shape) >= 3:
            raise EnvError(
                f'"{env_id}" has image observations of shape {space.shape}, which are not '
                "supported. Use an environment with vector observations, or wrap it in a feature "
                "extractor."
            )
        else:
            parts.append(SpacePart(path, space, parts[-1].stop if parts else 0))

    visit((), space)
    return tuple(parts)


def flatten(env_id: str, parts: tuple[SpacePart, ...], observation: Any) -> NDArray[np.float64]:
    """The environment's observation -> one float64 vector of its own; EnvFault if it lacks a part.

    How many numbers there are is the caller's to check.
    """
    flat: list[NDArray[Any]] = []
    for part in parts:
        value = observation
        try:
            for key in part.path:
                value = value[key]
            flat.append(np.asarray(value, dtype=np.float64).ravel())
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EnvFault(
                f'"{env_id}" gave an observation without numbers for "{part.name}" of its '
                f"observation space ({type(error).__name__}). Fix the environment: every "
                "observation must have all the parts of the space."
            ) from error
    return np.concatenate(flat)


def entry_name(parts: tuple[SpacePart, ...], index: int) -> str:
    """What number ``index`` of the flat vector is: "lidar[3]", or "grid[1, 0]" of a matrix."""
    for part in parts:
        if index < part.stop:
            within = np.unravel_index(index - part.start, part.box.shape or (1,))
            return f"{part.name}[{', '.join(map(str, within))}]"
    return "share of cost_threshold used"  # the entry that the rule "episode_cost" appends
