"""Compare runs: accidents, returns and constraints, computed from the run folders alone.

One row a run, one row a method whose seeds are pooled, and paired comparisons of methods.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safe_offrl.errors import RunError
from safe_offrl.files import plain
from safe_offrl.record.find_run import Source, find_runs
from safe_offrl.report.comparability import separated
from safe_offrl.report.pairings import Pairing, has_outcome, pair
from safe_offrl.report.run_data import RunData, evaluation_notes, read_run
from safe_offrl.report.summaries import ALL_ENVIRONMENTS, Row, learned_online, row_of, scales_of

ALL_PAIRS = 3  # methods that are all compared with each other; of more, the first with the others

Methods = Mapping[str, Sequence[RunData]]


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; tables.py and charts show it.

    With several environments, ``groups`` holds a row for each method in each of them, and then one
    for each method in all, whose returns are scores (see :func:`summaries.scales_of`). Where runs
    of one environment are not comparable (see comparability.py), its variants stand for it, and no
    row and no pairing goes beyond one environment.
    """

    runs: list[RunData]
    rows: list[Row]
    groups: list[Row]  # empty unless some method has several runs
    pairings: list[Pairing]
    notes: list[str]

    @property
    def environments(self) -> list[str]:
        """Ids in the order they were named."""
        return list(dict.fromkeys(run.env_id for run in self.runs))

    @property
    def confidence(self) -> str:
        """Of every interval: "95 %"."""
        return f"{100 * min(run.confidence for run in self.runs):g} %"

    def as_dict(self) -> dict[str, Any]:
        """Plain, strict JSON: NaN and infinity are None. The episodes themselves are left out."""
        rows, groups = ([_row_dict(row) for row in table] for table in (self.rows, self.groups))
        pairings = plain(self.pairings)
        return {"runs": rows, "groups": groups, "pairings": pairings, "notes": self.notes}


def _row_dict(row: Row) -> dict[str, Any]:
    values = plain(row) | {n: plain(getattr(row, n)) for n in ("accepted_share", "satisfied_share")}
    if row.replay is None:
        del values["replay"]
    return dict(values)


def compare(
    run_names: Sequence[str | Path | Source],
    *,
    group_by: str | None = None,
    root: Path = Path("runs"),
) -> Comparison:
    """Read runs, and folders of runs, and compute every row, group and paired comparison.

    A folder that holds runs directly is one method, named like the folder.
    """
    # Runs by method and environment.
    sources = [source for run_name in run_names for source in find_runs(run_name, root)]
    if not sources:
        raise RunError("There is no run to compare. Name at least one run folder.")
    data, apart, differing = separated(_read_runs(sources, group_by))
    methods: dict[str, list[RunData]] = {}
    for run in data:
        methods.setdefault(run.method, []).append(run)
    environments = list(dict.fromkeys(run.env_id for run in data))
    where = {e: f", {e}" if len(environments) > 1 else "" for e in environments}
    # Groups and pairs, across environments where these can be compared.
    if apart:  # Nothing is compared beyond one environment.
        parts = {end: _within(methods, environment) for environment, end in where.items()}
        scales, pooled = None, [group for part in parts.values() for group in part.values()]
        pairings = [
            dataclasses.replace(found, first=found.first + end, second=found.second + end)
            for end, part in parts.items()
            for found in _pairings(part, None)
        ]
    else:
        scales = scales_of(next(iter(methods.values()))) if len(environments) > 1 else None
        pooled, pairings = list(methods.values()), _pairings(methods, scales)
    # Comparison.
    several = any(len(group) > 1 for group in pooled)
    return Comparison(
        runs=data,
        rows=[row_of([run], run.name + where[run.env_id]) for run in data],
        groups=_groups(methods, where, scales) if several else [],
        pairings=pairings,
        notes=[
            *differing,
            *_named_twice(sources),
            *_notes(data, methods, scales),
            *_unlike_starts(pairings),
        ],
    )


def _read_runs(sources: Sequence[Source], group_by: str | None) -> list[RunData]:
    """The runs. Two folders of one name are one method, unless they share an environment."""
    data = [
        read_run(s.path, group_by, s.group.resolve().name if s.group else None) for s in sources
    ]
    homes: dict[tuple[str, str], set[Path]] = {}
    for source, run in zip(sources, data, strict=True):
        if source.group is not None:
            home = source.group.resolve()
            homes.setdefault((home.name, run.env_id), set()).add(home)
    ambiguous = {name for (name, _), found in homes.items() if len(found) > 1}
    for i, source in enumerate(sources):
        if source.group is not None and source.group.resolve().name in ambiguous:
            home = source.group.resolve()
            data[i] = read_run(source.path, group_by, f"{home.parent.name}/{home.name}")
    return data


def _groups(
    methods: Methods, where: Mapping[str, str], scales: Mapping[str, float] | None
) -> list[Row]:
    """A row for each method in each environment; of several, one for each method in all."""
    rows = [
        row_of(here, _all(here) + end, pooled=True)
        for environment, end in where.items()
        for here in _within(methods, environment).values()
    ]
    if scales is not None:
        rows += [
            row_of(group, f"{_all(group)}, {ALL_ENVIRONMENTS}", pooled=True, scales=scales)
            for group in methods.values()
        ]
    return rows


def _all(runs: Sequence[RunData]) -> str:
    return f"ALL {len(runs)} run{'s' * (len(runs) > 1)}"


def _within(methods: Methods, environment: str) -> Methods:
    """The methods that have runs in an environment, with these."""
    here = {m: [run for run in runs if run.env_id == environment] for m, runs in methods.items()}
    return {method: runs for method, runs in here.items() if runs}


def _pairings(methods: Methods, scales: Mapping[str, float] | None) -> list[Pairing]:
    return [found for a, b in _against(methods) if (found := pair(a, b, scales)) is not None]


def _against(methods: Methods) -> list[tuple[Sequence[RunData], Sequence[RunData]]]:
    """Whom to compare with whom: all with all, or the first with every other if there are many."""
    known = [group for group in methods.values() if any(map(has_outcome, group))]
    # A policy that never learned is no method of interest, wherever it was named.
    known.sort(key=lambda group: not any(run.episodes for run in group))
    if len(known) <= ALL_PAIRS:
        return list(itertools.combinations(known, 2))
    return [(known[0], other) for other in known[1:]]


def _named_twice(sources: Sequence[Source]) -> list[str]:
    paths = [source.path.resolve() for source in sources]
    return [f"{p.name} is named twice." for p in sorted(set(paths)) if paths.count(p) > 1]


def _unlike_starts(pairings: Sequence[Pairing]) -> list[str]:
    return [
        f"{p.first} and {p.second} are paired by seed alone: their runs started from different "
        "policies."
        for p in pairings
        if not p.same_policy
    ]


def _limits_in_words(run: RunData) -> str:
    limits = run.limits or {run.constraint: run.limit}
    return " and ".join(f"{name} < {value:g}" for name, value in limits.items())


def _notes(
    data: Sequence[RunData], methods: Methods, scales: Mapping[str, float] | None
) -> list[str]:
    """What the reader must know before believing the table."""
    # Differences between runs.
    notes = []
    for what, values in (
        ("environments", {run.env_id for run in data}),
        ("constraint", {_limits_in_words(run) for run in data if not math.isnan(run.limit)}),
        ("budgets", {f"{run.budget:,}" for run in data if run.budget is not None}),
    ):
        if len(values) > 1:
            notes.append(f"The runs differ in {what}: {', '.join(sorted(values))}.")
    # Units of scores.
    if scales is not None:
        units = ", ".join(f"{e} {unit:.4g}" for e, unit in sorted(scales.items()))
        notes.append(
            f"Over all environments a return is a score: divided by the mean of {data[0].method} "
            f"in its environment ({units}; it must be positive)."
        )
    # Runs that did not finish or did not learn.
    notes += [f"{run.name} is {run.status}." for run in data if run.status != "finished"]
    notes += [
        f"{run.name} took no step online."
        for run in data
        if run.episodes and not learned_online(run)
    ]
    # Copies of a seed.
    for method, group in methods.items():
        copies = Counter((run.env_id, run.pretrained, run.seed) for run in group)
        notes += [
            f"{method} has {n} runs of seed {seed} in {env}, which are not independent: the totals "
            "count each, and pairs pair each once."
            for (env, _, seed), n in copies.items()
            if n > 1
        ]
    # Missing seeds.
    online = {m: g for m, g in methods.items() if any(run.episodes for run in g)}
    keys = {m: {(run.env_id, run.seed) for run in g} for m, g in online.items()}
    for method, own in keys.items():
        others = set().union(*(k for m, k in keys.items() if m != method))
        if others - own:
            seeds = ", ".join(str(seed) for seed in sorted({seed for _, seed in others - own}))
            notes.append(f"{method} has no run of seed: {seeds}.")
    # Evaluations.
    notes += evaluation_notes(methods)
    return notes
