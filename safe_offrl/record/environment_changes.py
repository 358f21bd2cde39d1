"""How the environment of today differs from the one that a log or a run was made in, in words."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

from safe_offrl.env.identity import KEY

_MOST_SHOWN = 60  # characters of a value in a sentence


def differences(before: object, now: object) -> list[str]:
    """What differs between two identities, a phrase each: "kwargs edge 1.0 -> 0.2".

    Empty if they are the same, or if one is unknown: None, or no identity at all.
    """
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return []
    found = []
    for section in ("environment", "rule", "signals"):
        found += _of_section(_mapping(before, section), _mapping(now, section))
    found += _changes(before, now, ["horizon"])
    return list(dict.fromkeys(found))  # One module may hold both.


def log_differences(metadata: Mapping[str, Any], now: object) -> list[str]:
    """What differs between the environment that a log was made in and an identity.

    How a log is read under another rule or horizon than its own is not decided here: of a rule of
    the same name, its source counts. So it is of signals.
    """
    logged = metadata.get(KEY)
    if not isinstance(logged, Mapping) or not isinstance(now, Mapping):
        return []
    named = ("accident", "cost_threshold")
    before, after = _mapping(logged, "rule"), _mapping(now, "rule")
    same_rule = [before.get(key) for key in named] == [after.get(key) for key in named]
    kept = ["environment", *(["rule"] if same_rule else [])]
    mine, theirs = (_mapping(part, "signals").get("signals") for part in (logged, now))
    kept += ["signals"] if mine == theirs else []
    return differences({k: logged.get(k) for k in kept}, {k: now.get(k) for k in kept})


def _of_section(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if not before or not now:  # It is not on record.
        return []
    found = _changes(before, now, ["id", "entry_point", "max_episode_steps"])
    found += _changes(before, now, ["accident"]) or _changes(before, now, ["cost_threshold"])
    old, new = (_mapping(part, "kwargs") for part in (before, now))
    found += [f"kwargs {text}" for text in _changes(old, new, sorted({*old, *new}))]
    found += _changes(before, now, ["signals"])
    # The wrappers of the registration are among those around the environment, and are named once.
    found += _changes(before, now, ["additional_wrappers"]) or _changes(before, now, ["wrappers"])
    old, new = (_mapping(part, "sources") for part in (before, now))
    if not {"sources", "packages"} <= before.keys() & now.keys():  # These are settings alone.
        return found
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    found += [_printable(f"the source of {name}") for name in changed]
    old, new = (_mapping(part, "packages") for part in (before, now))
    return found + _changes(old, new, sorted({*old, *new}))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Name, value and other value of each that differs; "none" where there is none."""
    found = []
    for key in keys:
        old, new = _text(before.get(key)), _text(now.get(key))
        if old != new:
            label = {"accident": "accident rule"}.get(key, key.replace("_", " "))
            found.append(_printable(f"{label} {_short(old, new)}"))
    return found


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(v, dict) and "class" in v for v in value):
        calls = [(v["class"], _mapping(v, "kwargs")) for v in value]
        value = ", ".join(
            f"{name}({', '.join(f'{k}={_text(v)}' for k, v in kwargs.items())})"
            for name, kwargs in calls
        )
    if value is None or value == "":
        return "none"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _short(old: str, new: str) -> str:
    """Both texts; of long ones the part where they begin to differ."""
    begin = 0
    if max(len(old), len(new)) > _MOST_SHOWN:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False))
        begin = max(0, sum(1 for _ in same) - 10)
    parts = [
        f"{'...' * (begin > 0)}{text[begin : begin + _MOST_SHOWN]}"
        f"{'...' * (len(text) > begin + _MOST_SHOWN)}"
        for text in (old, new)
    ]
    return " -> ".join(parts)


def _printable(text: str) -> str:
    """Metadata may come from anywhere."""
    return text if text.isprintable() else ascii(text)


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}
