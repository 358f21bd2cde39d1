"""Which runs under one environment id can be pooled or compared: those that ask the same.

An accident is something else under another rule, threshold or horizon; under another kind of
constraint a method seeks something else; and an id may stand for another environment than before.
Such runs are kept apart as environments of their own: "Id (variant 1)" and so on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from safe_offrl.record.environment_changes import differences
from safe_offrl.report.run_data import RunData

_NAMED = 5  # runs that a note names


class Separated(NamedTuple):
    """Runs whose environment ids are comparable each, and what the reader must know of that."""

    runs: list[RunData]
    apart: bool  # whether some environment has variants
    notes: list[str]


def separated(runs: Sequence[RunData]) -> Separated:
    """The runs, those of an environment by variants where they are not comparable.

    What a run does not say (one of an earlier version knows no identity) is taken to be what the
    others say if these agree, and to be something else if they do not.
    """
    variant_of: dict[int, str] = {}
    notes = []
    for environment in dict.fromkeys(run.env_id for run in runs):
        here = [run for run in runs if run.env_id == environment]
        variants = _variants(here)
        if len(variants) == 1:
            continue
        first, others = variants[0][0], variants[1:]
        for number, members in enumerate(others, 2):
            notes.append(
                f"The runs of {environment} differ, and nothing is pooled or compared over them: "
                f"variant {number} ({_names_text(members)}) differs from variant 1 "
                f"({_names_text(variants[0])}) in {'; '.join(_unlike(first, members[0]))}."
            )
        for number, members in enumerate(variants, 1):
            variant_of |= {id(run): f"{environment} (variant {number})" for run in members}
    data = [dataclasses.replace(run, env_id=variant_of.get(id(run), run.env_id)) for run in runs]
    return Separated(data, bool(variant_of), notes + _evaluated_elsewhere(runs))


def _variants(runs: Sequence[RunData]) -> list[list[RunData]]:
    """Runs of one environment id, those together that agree in everything that any two say."""
    said = [{key: _canonical(value) for key, value in _aspects(run).items()} for run in runs]
    contested = [key for key in said[0] if len({s[key] for s in said} - {None}) > 1]
    variants: dict[tuple[str | None, ...], list[RunData]] = {}
    for run, aspects in zip(runs, said, strict=True):
        variants.setdefault(tuple(aspects[key] for key in contested), []).append(run)
    return list(variants.values())


def _aspects(run: RunData) -> dict[str, Any]:
    """What runs must have in common to be compared; None where a run does not say."""
    question = run.question
    rule: Mapping[str, Any] = question.identity.get("rule") or {}
    return {
        "accident": rule.get("accident"),
        "cost_threshold": rule.get("cost_threshold"),
        "rule_sources": [rule["sources"], rule.get("packages")] if "sources" in rule else None,
        "horizon": question.identity.get("horizon"),
        "environment": question.identity.get("environment"),
        "source": question.source,
        "constraint": run.constraint,
        "resumed": question.resumed,
        "evaluated": question.evaluated,
    }


def _canonical(value: Any) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True)


def _unlike(first: RunData, run: RunData) -> list[str]:
    """How a run differs from the first variant's, in phrases."""
    one, other = first.question, run.question
    found = differences(one.identity, other.identity)
    if run.constraint != first.constraint:
        found.append(f"constraint {first.constraint} -> {run.constraint}")
    if other.resumed != one.resumed:
        found.append("the environments that they were resumed in")
    evaluated = [text for text in differences(one.evaluated, other.evaluated) if text not in found]
    found += [f"the evaluation's {text}" for text in evaluated]
    return found or ["the source of the environment, or what is on record of it"]


def _evaluated_elsewhere(runs: Sequence[RunData]) -> list[str]:
    found = [(run, differences(run.question.identity, run.question.evaluated)) for run in runs]
    return [
        f"{run.name} was evaluated in another environment than it ran in: {'; '.join(texts)}."
        for run, texts in found
        if texts
    ]


def _names_text(runs: Sequence[RunData]) -> str:
    names = ", ".join(run.name for run in runs[:_NAMED])
    return names + (f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else "")
