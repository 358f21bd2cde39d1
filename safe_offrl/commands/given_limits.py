"""Limits as they are given to a command: in short forms, and by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from safe_offrl.errors import ConfigError
from safe_offrl.limits import QUANTITIES
from safe_offrl.spec import SafetySpec


class Limits(TypedDict, total=False):
    """A limit instead of a run's own; None means not given."""

    epsilon: float | None  # of P(accident)
    cost_limit: float | None  # of the expected cost per episode
    limit: Sequence[str] | None  # NAME=VALUE each


def require_own_limit(safety: SafetySpec, limits: Limits) -> None:
    """ConfigError if a limit is given of what the run does not constrain."""
    for other in QUANTITIES.values():
        if other.constraint not in safety.bounds and limits.get(other.limit) is not None:
            known = '" and "'.join(safety.bounds)
            raise ConfigError(
                f'The run was pretrained under the constraint "{known}", so '
                f"{other.limit} means nothing to it. Leave it out, or pretrain under the other "
                "constraint."
            )


def limits_by_name(limits: Limits) -> dict[str, float]:
    """All that are given, in the order of their options: {what is limited: its limit}."""
    short = {q.constraint: limits.get(q.limit) for q in QUANTITIES.values()}
    given = {name: float(x) for name, x in short.items() if isinstance(x, int | float)}
    named = parse_limits(limits.get("limit")) or {}
    if twice := [name for name in named if name in given]:
        raise ConfigError(f"The limit of {twice[0]} is given twice. Give it once.")
    return given | named


def parse_limits(arguments: Sequence[str] | None) -> dict[str, float] | None:
    """NAME=VALUE of --limit, in their order; None if there is none.

    >>> parse_limits(["cost=25", "accident=0.05"])
    {'cost': 25.0, 'accident': 0.05}
    """
    found: dict[str, float] = {}
    for text in arguments or ():
        name, equals, value = text.partition("=")
        if name in found:
            raise ConfigError(f"The limit of {name} is given twice. Give it once.")
        try:
            found[name] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(
                f'--limit "{text}" is not of the form NAME=VALUE. Write, say, --limit cost=25.'
            )
    return found or None


def require_given_once(
    limit: Sequence[str] | None,
    overrides: Sequence[str],
    options: Mapping[str, Any],
    stated: Mapping[str, Any],
) -> None:
    """ConfigError if a limit is given in two ways: one of them would say nothing.

    ``options`` are the short ones of the command, ``stated`` the section "safety" of a file.
    """
    keys, named = [text.partition("=")[0] for text in overrides], parse_limits(limit) or {}
    in_file = stated.get("limits") or {}
    for quantity in QUANTITIES.values():
        name, short = quantity.constraint, quantity.limit
        by_name = [f"safety.limits.{name}"] if f"safety.limits.{name}" in keys else []
        by_name += ["--limit"] if name in named else []
        in_short = [f"safety.{short}"] if f"safety.{short}" in keys else []
        in_short += [f"--{short.replace('_', '-')}"] if options.get(short) is not None else []
        given = [*by_name, *in_short]
        if name in in_file and stated.get(short, in_file[name]) != in_file[name]:
            given = [f"limits.{name} of the file", f"{short} of the file"]
        elif not by_name or len(given) < 2:
            continue
        raise ConfigError(
            f"The limit of {name} is given twice, as {' and as '.join(given)}. Give one of them."
        )
    if "safety.constraint" in keys and (named or any(k.startswith("safety.limits.") for k in keys)):
        raise ConfigError(
            "What is constrained is given twice, as safety.constraint and by the names of limits. "
            "Leave safety.constraint out: the first limit is the constraint."
        )


def given_limits(
    learnt: SafetySpec, settings: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, float]:
    """The limits of a run that has several, with what was given of them.

    ConfigError for a short form among the overrides, which would say nothing.
    """
    given = {**learnt.limits, **(parse_limits(settings.get("limit")) or {})}
    for quantity in QUANTITIES.values():
        if quantity.constraint not in given:
            continue
        if any(text.startswith(f"safety.{quantity.limit}=") for text in overrides):
            raise ConfigError(
                f"The run has a limit of each of {', '.join(given)}, and safety.{quantity.limit} "
                f"says nothing there. Give --limit {quantity.constraint}=VALUE."
            )
        if (value := settings.get(quantity.limit)) is not None:
            given[quantity.constraint] = float(value)
    return given


def require_same_limits(learnt: SafetySpec, asked: SafetySpec, name: str) -> None:
    """ConfigError if something else is limited than what the run ``name`` learnt to estimate."""
    if set(learnt.bounds) != set(asked.bounds):
        raise ConfigError(
            f'The limits are of {", ".join(asked.bounds)}, but the critics of "{name}" learnt of '
            f"{', '.join(learnt.bounds)}. Give --limit of the same, or pretrain with them."
        )
