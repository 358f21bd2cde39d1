"""Named cost signals beside ``info["cost"]``: where each is found, and what it is in a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from safe_offrl.env.user_code import raised, user_function
from safe_offrl.env.values import kind_in_words, scalar
from safe_offrl.errors import EnvError, EnvFault


class Signals:
    """Reads the signals of an environment's steps.

    A signal is one number of 0 or more. EnvError if it is not there or is no number, which no
    episode can mend; EnvFault if it is not finite or below 0, or if a user's function raises.
    """

    def __init__(self, env_id: str, sources: Mapping[str, str]) -> None:
        """``sources``: those of SafetySpec. EnvError for a function that cannot be had."""
        self._env_id = env_id
        self._sources = sources
        self._functions: dict[str, Callable[..., Any]] = {
            name: user_function(source, "signal", f"safety.signals.{name}")
            for name, source in sources.items()
            if ":" in source
        }

    @property
    def look_back(self) -> bool:
        """Whether a function is to be shown the observation before the step."""
        return bool(self._functions)

    def of_step(self, step: int, info: Mapping[str, Any], *told: Any) -> dict[str, float]:
        """{name: cost} of one step; ``told`` is what a function gets before ``info``."""
        return {name: self._of(name, step, info, told) for name in self._sources}

    def _of(self, name: str, step: int, info: Mapping[str, Any], told: tuple[Any, ...]) -> float:
        # What there is.
        source, where = self._sources[name], f'"{self._env_id}" at step {step}'
        if name in self._functions:
            try:
                given = self._functions[name](*told, info)
            except Exception as error:  # whatever the user's function raises
                raise EnvFault(
                    f'The signal "{source}" raised {raised(error)}. Repair it.'
                ) from error
        else:
            given = self._found(name, info, step)
        # What it must be.
        value = scalar(given)
        if value is None:
            raise EnvError(
                f'The signal "{name}" ({source}) is {kind_in_words(given)} in {where}, but it must '
                f"be one number. Correct safety.signals.{name}, or give the number."
            )
        if not math.isfinite(value) or value < 0.0:
            raise EnvFault(
                f'"{self._env_id}" gave the signal "{name}" ({source}) as {value:g} at step '
                f"{step}. Fix the environment: signals are costs, finite numbers of 0 or more."
            )
        return value

    def _found(self, name: str, info: Mapping[str, Any], step: int) -> Any:
        """What info holds at the path of a signal."""
        source, place = self._sources[name], "info"
        value: Any = info
        # A key may have dots of its own.
        for part in [source] if source in info else source.split("."):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif _has_index(value, part):
                value = value[int(part)]
            else:
                raise EnvError(
                    f'The signal "{name}" is {source} of info, but in "{self._env_id}" {place} is '
                    f"{kind_in_words(value)} at step {step}. Correct safety.signals.{name}, or put "
                    "the number there in every step()."
                )
            place = f"{place}[{part!r}]"
        return value


def _has_index(value: Any, part: str) -> bool:
    """Whether a part of a path is the position of an entry in a list or an array."""
    long = isinstance(value, np.ndarray) and value.ndim > 0
    return part.isdecimal() and (long or isinstance(value, Sequence)) and int(part) < len(value)
