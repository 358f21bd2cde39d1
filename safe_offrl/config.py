"""Settings: dataclass defaults, the environment's preset, flags and key=value, in that order.

The dataclasses live beside their owners; this module knows how to fill any of them, refuses what
does not fit in one sentence, and reads and writes them as YAML. OmegaConf is used here alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from safe_offrl.errors import ConfigError

T = TypeVar("T")
_COUNT = re.compile(r"([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)([kKmM]?)")
_FACTORS = {"": 1, "k": 1_000, "m": 1_000_000}


def parse_count(text: str) -> int:
    """Read a whole number of steps or episodes; k and M are thousands and millions.

    >>> parse_count("50k"), parse_count("1.5M"), parse_count("1e5"), parse_count("200")
    (50000, 1500000, 100000, 200)
    """
    match = _COUNT.fullmatch(text.strip())
    value = math.nan
    if match is not None and match[1].replace("_", "").isdecimal():  # A float has 16 digits.
        return int(match[1]) * _FACTORS[match[2].lower()]
    if match is not None:
        value = float(match[1].replace("_", "")) * _FACTORS[match[2].lower()]
    # 1.1M is 1100000.0000000002 in floating point: allow that, and refuse 1.5.
    if not math.isfinite(value) or abs(value - round(value)) > 1e-6 * max(1.0, value):
        raise ConfigError(
            f'"{text}" is not a whole number of 0 or more. Write 200, 50k, 1.5M or 1e5.'
        )
    return round(value)


# ---------------------------------------------------------------------------------------------
# The schema as dotted keys.


def schema_keys(schema: type[Any], prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a (nested) dataclass and its type: {"safety.epsilon": float, ...}."""
    keys: dict[str, Any] = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            keys |= schema_keys(typing.cast(type[Any], hint), f"{prefix}{field.name}.")
        else:
            keys[prefix + field.name] = hint
    return keys


def suggestion(key: object, known: Iterable[str]) -> str:
    """The known key that was probably meant: same last part first, then similar spelling."""
    key, known = str(key), list(known)  # YAML has keys that are no text.
    leaf = key.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        leaves = {k.rpartition(".")[2]: k for k in known}
        close = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    meant = (same or close)[:1]
    if meant:
        return f'Did you mean "{meant[0]}"?'
    if any("." in k for k in known):
        return "--print-config lists every key."
    return f"There are {', '.join(known)}."


def _flatten(
    values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = ""
) -> dict[str, Any]:
    """Nested mapping -> {dotted key: value}; a key that is already dotted passes too."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if dotted not in known and isinstance(value, Mapping):
            if not any(k.startswith(f"{dotted}.") for k in known):
                raise ConfigError(f'Unknown key "{dotted}". {suggestion(dotted, known)}')
            flat |= _flatten(value, known, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def _take(flat: dict[str, Any], known: Mapping[str, Any], key: str, value: Any) -> None:
    """Put one value into ``flat`` as its field declares it; "a.b" may be an entry of a dict "a".

    ConfigError if no field is meant, or the value is of another type.
    """
    owner, _, entry = key.rpartition(".")
    if key not in known and typing.get_origin(known.get(owner)) is dict:
        key, value = owner, {entry: value}
    if key not in known:
        raise ConfigError(f'Unknown key "{key}". {suggestion(key, known)}')
    value = coerce(known[key], value, key)
    flat[key] = {**flat.get(key, {}), **value} if isinstance(value, dict) else value


def _wrong(key: str, value: Any, needed: str) -> ConfigError:
    return ConfigError(f'"{key}" is {value!r}, but {needed} is needed. Correct the value.')


def coerce(hint: Any, value: Any, key: str) -> Any:
    """Turn a value of YAML, a flag or the command line into the type a field declares.

    Raises ConfigError on a wrong type, NaN or infinity.
    """
    # Optional values.
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "~")):
            if type(None) in arguments:
                return None
            raise _wrong(key, value, "a value")
        (inner,) = (a for a in arguments if a is not type(None))
        return coerce(inner, value, key)
    # Choices.
    if origin is typing.Literal:
        if value not in arguments:
            raise _wrong(key, value, "one of " + ", ".join(map(str, arguments)))
        return value
    # Lists.
    if origin is tuple:
        items = value
        if isinstance(value, str):
            items = [part for part in re.split(r"[\s,]+", value.strip().strip("[]()")) if part]
        if not isinstance(items, list | tuple):
            raise _wrong(key, value, "a list such as [256,256]")
        return tuple(coerce(arguments[0], item, key) for item in items)
    # Mappings.
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(key, value, "a mapping of keys to values")
        if arguments[1] not in (Any, object):
            return {str(k): coerce(arguments[1], v, f"{key}.{k}") for k, v in value.items()}
        # What else an entry must be is known to whoever the dict is for.
        return {str(k): coerce(str, v, key) if isinstance(v, str) else v for k, v in value.items()}
    # Truth values.
    if hint is bool:
        words = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if not isinstance(value, bool):
            raise _wrong(key, value, "true or false")
        return value
    # Numbers and text.
    if hint is int:
        return _integer(value, key)
    if hint is float:
        return _number(value, key)
    if hint is str:
        if not isinstance(value, str):
            raise _wrong(key, value, "text")
        if "${" in value:
            raise ConfigError(
                f'"{key}" holds "${{", which would be resolved from outside the file. '
                "Write the value itself."
            )
        return value
    raise TypeError(f"field {key} has a type that settings cannot have: {hint}")


def _integer(value: Any, key: str) -> int:
    if isinstance(value, str):
        sign = -1 if value.startswith("-") else 1
        return sign * parse_count(value.removeprefix("-"))
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
        raise _wrong(key, value, "a whole number (200, 50k, 1.5M)")
    return int(value)


def _number(value: Any, key: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        raise _wrong(key, value, "a number") from None
    if not math.isfinite(number):
        raise _wrong(key, value, "a finite number")
    return number


def _build(schema: type[T], flat: Mapping[str, Any], prefix: str = "") -> T:
    """Make the dataclass from converted dotted values; its own range checks run here."""
    hints = typing.get_type_hints(schema)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, schema)):
        hint, key = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            inner = {k: v for k, v in flat.items() if k.startswith(f"{key}.")}
            if inner:
                arguments[field.name] = _build(typing.cast(type[Any], hint), flat, f"{key}.")
        elif key in flat:
            arguments[field.name] = flat[key]
    try:
        return schema(**arguments)
    except ValueError as error:
        raise ConfigError(f"{error}. Correct the setting.") from error


# ---------------------------------------------------------------------------------------------
# Files.


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """Parse YAML into plain values; resolvers (``${...}``) are refused, not resolved."""
    try:
        value = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except AssertionError:  # OmegaConf raises it for a lone number or truth value.
        value = None
    except (OmegaConfBaseException, yaml.YAMLError, RecursionError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{where} is not readable as YAML ({first}). Correct it.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where} holds no key: value pairs. Correct it.")
    return typing.cast(dict[str, Any], value)


def yaml_text(values: Mapping[str, Any]) -> str:
    """Plain values as YAML; :func:`read_yaml` reads it back equal."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))


def load_preset(env_id: str) -> dict[str, Any]:
    """The preset whose ``env_id`` is this environment, {} if there is none."""
    for entry in sorted(importlib.resources.files("safe_offrl.configs").iterdir(), key=str):
        if entry.name.endswith(".yaml"):
            values = read_yaml(entry.read_text(encoding="utf-8"), entry.name)
            if values.get("env_id") == env_id:
                return values
    return {}


def _with_bases(preset: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A preset behind the bases that it builds on; a later one has the last word."""
    if "base" not in preset:
        return [preset]
    name = coerce(str, preset["base"], "base")
    folder = importlib.resources.files("safe_offrl.configs") / "base"
    known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir())
    if name not in known:
        raise ConfigError(f'There is no base "{name}" of presets. {suggestion(name, known)}')
    text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    return [*_with_bases(read_yaml(text, f"{name}.yaml")), preset]


SECTIONS = ("env_id", "base", "collect", "pretrain", "finetune")  # of a preset


def load_config(
    schema: type[T],
    *,
    section: str,
    env_id: str,
    preset: str | Path | None = None,
    inherited: Mapping[str, Any] | None = None,
    logged: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Iterable[str] = (),
) -> T:
    """Resolve a configuration; later sources win.

    dataclass defaults <- ``inherited`` (from the pretrain run) <- ``section`` ("pretrain",
    "finetune") of the environment's preset <- ``logged`` (what a dataset says of itself) <-
    ``section`` of the YAML file ``preset``, which takes the preset's place <- ``flags`` (None means
    not given) <- ``overrides`` ("a.b=c"). A preset comes after its base, if it names one. Unknown
    keys and wrong values raise ConfigError.
    """
    # Preset, or the file in its place.
    known = schema_keys(schema)
    if preset is None:
        file_values = load_preset(env_id)
    else:
        try:
            file_values = read_yaml(Path(preset).read_text(encoding="utf-8"), str(preset))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f'The preset "{preset}" cannot be read ({error}).') from error
        for name in file_values:
            if name not in (*SECTIONS, section):
                raise ConfigError(
                    f'Unknown key "{name}" in "{preset}". {suggestion(name, SECTIONS)}'
                )
    # The section, and that of its bases.
    chosen = [part.get(section) or {} for part in _with_bases(file_values)]
    if not all(isinstance(part, Mapping) for part in chosen):
        raise ConfigError(f'"{section}" of the preset holds no key: value pairs. Correct it.')
    # Layers, the last of which wins.
    words = [*chosen, logged or {}] if preset is None else [logged or {}, *chosen]
    layers = [inherited or {}, *words]
    layers.append({k: v for k, v in (flags or {}).items() if v is not None})
    layers += [_parse_override(text) for text in overrides]

    # Settings.
    flat: dict[str, Any] = {}
    for layer in layers:
        for key, value in _flatten(layer, known).items():
            _take(flat, known, key, value)
    return _build(schema, flat)


def _parse_override(text: str) -> dict[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f'"{text}" is not of the form key=value. Write, say, batch_size=128.')
    return {key.strip().lstrip("+"): value.strip()}


def to_dict(config: Any) -> dict[str, Any]:
    """A (nested) dataclass as plain YAML values; tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    return typing.cast(dict[str, Any], plain(dataclasses.asdict(config)))


def from_dict(schema: type[T], values: Mapping[str, Any]) -> T:
    """Fill a dataclass from plain values under the same checks as the command line's."""
    known = schema_keys(schema)
    flat: dict[str, Any] = {}
    for key, value in _flatten(values, known).items():
        _take(flat, known, key, value)
    try:
        return _build(schema, flat)
    except TypeError as error:
        raise ConfigError(f"A setting is missing ({error}). Add it.") from error
