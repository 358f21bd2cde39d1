"""What an environment and its accident rule are, beyond their names: one identity, JSON-able.

An id stays while what is behind it changes: keyword arguments of the registration, wrappers, the
numbers in a module. Two environments of one identity are made alike, from the same sources::

    environment  id, entry_point, kwargs, max_episode_steps and additional_wrappers of the
                 registration, wrappers as they lie around it, sources, packages
    rule         accident, cost_threshold (where it matters), sources, packages
    horizon      steps of an episode
    signals      where each named cost is found, sources, packages; only if there are any

``sources`` and ``packages`` (see :mod:`safe_offrl.env.module_sources`) are those of the classes of
the environment and its wrappers, of what they inherit from, of the entry point, of the module in
"module:Id" and of what keyword arguments name. No path and no memory address enters: where the
sources are the same, so is the identity. It does not see files that are read, unless a keyword
argument is the path of one. Versions of Python, numpy and gymnasium are kept beside it, and another
one does not make another environment.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import platform
import re
from collections.abc import Mapping, Set
from pathlib import Path, PurePath
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from safe_offrl.env.module_sources import sources_and_packages
from safe_offrl.spec import COST_RULES

KEY = "environment_identity"  # under which logs, runs, evaluations and certificates keep it

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_DEEPEST = 6  # level of attributes of attributes that is still looked at
_MOST_STORED = 1000  # characters of an argument as JSON; of a longer one the sha256 is kept


def environment_identity(env: gymnasium.Env[Any, Any], env_id: str) -> dict[str, Any]:
    """Of an environment as it was made, before its first reset.

    ``env_id`` is what it was asked for by, with the module that registers it if one was named.
    """
    spec = env.unwrapped.spec
    registered = gymnasium.registry.get(spec.id) if spec else None
    steps = env.spec.max_episode_steps if env.spec else None
    kwargs = {k: v for k, v in (spec.kwargs if spec else {}).items() if k != "render_mode"}
    entry_points = [spec.entry_point if spec else None]
    modules = {env_id.rpartition(":")[0], *_modules_of(env.unwrapped)}
    additional = []
    for wrapper in registered.additional_wrappers if registered else ():
        entry_points.append(wrapper.entry_point)
        given = _arguments(wrapper.kwargs or {}, modules)
        additional.append({"class": wrapper.entry_point, "kwargs": given})
    description = {
        "id": spec.id if spec else type(env.unwrapped).__name__,
        "entry_point": _described(entry_points[0], modules),
        "kwargs": _arguments(kwargs, modules),
        "max_episode_steps": steps,
        "additional_wrappers": additional,
        "wrappers": _wrappers(env, steps, modules),
    }
    modules |= {text.partition(":")[0] for text in entry_points if isinstance(text, str)}
    found = sources_and_packages(modules - {""})
    names = getattr(env.unwrapped, "packages", ())
    found["packages"] |= {name: importlib.metadata.version(name) for name in names}
    return description | found


def rule_identity(accident: str, cost_threshold: float) -> dict[str, Any]:
    """Of an accident rule, as SafetySpec names it; its module has been imported."""
    module, colon, _ = accident.partition(":")
    by_cost = accident in COST_RULES
    return {
        "accident": accident,
        **({"cost_threshold": cost_threshold} if by_cost else {}),
        **sources_and_packages([module] if colon else []),
    }


def signals_identity(signals: Mapping[str, str]) -> dict[str, Any]:
    """Of named cost signals, as SafetySpec has them; their modules have been imported."""
    modules = [source.partition(":")[0] for source in signals.values() if ":" in source]
    return {"signals": dict(signals), **sources_and_packages(modules)}


def _wrappers(
    env: gymnasium.Env[Any, Any], steps: int | None, modules: set[str]
) -> list[dict[str, Any]]:
    """From the outermost to the environment, without those that change no number.

    What a wrapper was made with is known of those that record it; for the others see
    "additional_wrappers". The time limit is "max_episode_steps" already.
    """
    found = []
    while isinstance(env, gymnasium.Wrapper):
        limit = isinstance(env, TimeLimit) and env._max_episode_steps == steps
        if not limit and not isinstance(env, OrderEnforcing | PassiveEnvChecker):
            modules |= _modules_of(env)
            saved = env._saved_kwargs if isinstance(env, RecordConstructorArgs) else {}
            given = _arguments({k: v for k, v in saved.items() if k != "env"}, modules)
            found.append({"class": _name(type(env)), "kwargs": given})
        env = env.env
    return found


# --- values -----------------------------------------------------------------------------------


def _arguments(kwargs: Mapping[str, Any], modules: set[str]) -> dict[str, Any]:
    """Keyword arguments as JSON, the same in every process; what they name joins ``modules``."""
    found = {str(key): _described(value, modules) for key, value in kwargs.items()}
    for key, value in found.items():
        text = json.dumps(value, sort_keys=True)
        if len(text) > _MOST_STORED:
            found[key] = {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    return dict(sorted(found.items()))


def _described(value: Any, modules: set[str], above: tuple[int, ...] = ()) -> Any:
    """A value as JSON: see :func:`_arguments`.

    An absolute path is its last part, with the sha256 of the file if there is one. An object is its
    class and its attributes, or its repr if that holds no memory address, or its class alone.
    """
    # Values that are their own description.
    if isinstance(value, enum.Enum):
        modules |= _modules_of(value)
        return f"{_name(type(value))}.{value.name}"
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, str | PurePath):
        return _described_path(Path(value)) if PurePath(value).is_absolute() else str(value)
    if isinstance(value, np.ndarray | np.generic):
        return _described(value.tolist(), modules, above)
    # What has a name.
    if isinstance(value, ModuleType):
        modules.add(value.__name__)
        return value.__name__
    if isinstance(value, type) or hasattr(value, "__qualname__"):  # a class, a function, a method
        modules.add(getattr(value, "__module__", None) or "")
        return _name(value)
    # Containers, down to a depth.
    if id(value) in above or len(above) > _DEEPEST:
        return _name(type(value))
    above = (*above, id(value))
    if isinstance(value, functools.partial):
        parts = [value.func, list(value.args), value.keywords]
        return {"partial": _described(parts, modules, above)}
    if isinstance(value, Mapping):
        return {str(k): _described(v, modules, above) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_described(member, modules, above) for member in value]
    if isinstance(value, Set):  # whose order is another one in each process
        members = [_described(member, modules, above) for member in value]
        return sorted(members, key=lambda member: json.dumps(member, sort_keys=True))
    # Objects.
    modules |= _modules_of(value)
    attributes = getattr(value, "__dict__", None) or {}
    if dataclasses.is_dataclass(value):  # may have slots
        attributes = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if attributes:
        return {_name(type(value)): _described(attributes, modules, above)}
    return _name(type(value)) if _ADDRESS.search(repr(value)) else repr(value)


def _described_path(path: Path) -> Any:
    if not path.is_file():  # no device either: reading one may wait for ever
        return path.name
    with path.open("rb") as file:
        return {"file": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', None)}.{thing.__qualname__}"


def _modules_of(thing: object) -> set[str]:
    """Modules of an object's class and of those that it inherits from."""
    return {cls.__module__ for cls in type(thing).__mro__}


def environment_versions(env: gymnasium.Env[Any, Any]) -> dict[str, str]:
    """What the behaviour of an environment depends on: packages, and its own source file.

    "environment" is the installed distribution that holds it, or the module's name;
    "environment_source" the sha256 of the file that defines it ("unknown" if there is none). An
    environment whose dynamics come from other distributions names them in an attribute
    ``packages``.
    """
    cls = type(env.unwrapped)
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
        **{
            name: importlib.metadata.version(name)
            for name in getattr(env.unwrapped, "packages", ())
        },
    }
