"""Compare runs: accidents, returns and constraints, computed from the run folders alone.

One row a run, one row a group of seeds, and a paired comparison of groups that started from the
same pretrained policies. An accident is an EPISODE with at least one accident throughout this
module.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_offrl.errors import RunError
from safe_offrl.files import plain
from safe_offrl.run_data import RunData, read_run
from safe_offrl.statistics import (
    RateRatio,
    bootstrap_interval,
    clopper_pearson,
    rate_ratio,
    run_level_interval,
    run_level_upper,
)
from safe_offrl.types import Episode

EARLY_STEPS = 5_000  # where most accidents of fine-tuning happen
LAST_EPISODES = 100  # behind "final return" and "final cost", at most ...
LAST_SHARE = 0.2  # ... and of those that began in this last share of a run's steps
BOOTSTRAP_SEED = 0  # so that the same runs give the same table


class Interval(NamedTuple):
    """A value between its bounds; NaN where there is nothing to measure."""

    value: float
    low: float
    high: float


class Mean(NamedTuple):
    """A mean with its standard error (NaN for a single observation)."""

    value: float
    error: float


_NOTHING = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Row:
    """One run, or several seeds of one method pooled.

    Rates: accidents over episodes, with a two-sided anytime-valid interval at run level (policies
    may change). ``certified_rate`` is the one-sided upper bound alone. Returns of one run: mean and
    standard error over episodes; of a group: over the runs' means.
    """

    label: str
    method: str
    pooled: bool
    seeds: list[int]
    episodes: int
    steps: int
    accidents: int
    rate: Interval
    per_1000_steps: Interval
    early_accidents: int  # in episodes that ended within the first EARLY_STEPS steps of a run
    certified_rate: float
    cost: Mean  # per episode, over the whole run
    final_cost: Mean
    final_return: Mean
    evaluated_return: Mean
    evaluated_cost: Mean
    evaluated_rate: Interval  # Clopper-Pearson: one look at a fixed number of episodes
    evaluated_episodes: int
    iterations: int
    accepted: int
    violations: int | None  # None for a method without constraints
    recovering: int
    constraint: str  # what the estimate is of: "accident" or "cost"
    estimate: Mean  # for the final policies, to be held against evaluated_rate or evaluated_cost
    # Iterations whose acting policy's estimate was not below the limit; None if never measured.
    above_limit: int | None

    @property
    def accepted_share(self) -> float:
        """Accepted candidates over iterations; NaN without any."""
        return self.accepted / self.iterations if self.iterations else math.nan


@dataclass(frozen=True)
class Pairing:
    """``first`` against ``second`` over the runs that share pretrained policy and seed."""

    first: str
    second: str
    pairs: int
    accidents: tuple[int, int]
    accident_ratio: RateRatio  # per step, exact (conditional binomial)
    return_ratio: Interval  # of summed final returns, bootstrap over pairs; NaN unless both > 0
    return_difference: Interval  # mean over pairs
    cost_ratio: Interval  # of costs per step; NaN unless both are above 0


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; tables.py and charts.py show it."""

    runs: list[RunData]
    rows: list[Row]
    groups: list[Row]  # empty unless some method has several runs
    pairings: list[Pairing]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain, strict JSON: NaN and infinity are None. The episodes themselves are left out."""
        rows, groups = (
            [plain(row) | {"accepted_share": plain(row.accepted_share)} for row in table]
            for table in (self.rows, self.groups)
        )
        pairings = plain(self.pairings)
        return {"runs": rows, "groups": groups, "pairings": pairings, "notes": self.notes}


def compare(runs: Sequence[Path], *, group_by: str | None = None) -> Comparison:
    """Read the run folders and compute every row, group and paired comparison."""
    if not runs:
        raise RunError("There is no run to compare. Name at least one run folder.")
    data = [read_run(Path(path), group_by) for path in runs]
    by_method: dict[str, list[RunData]] = {}
    for run in data:
        by_method.setdefault(run.method, []).append(run)
    several = any(len(group) > 1 for group in by_method.values())
    groups = [_row(group, pooled=True) for group in by_method.values()] if several else []
    online = [group for group in by_method.values() if any(run.episodes for run in group)]
    pairings = [_pair(a, b) for a, b in itertools.combinations(online, 2)]
    return Comparison(
        runs=data,
        rows=[_row([run]) for run in data],
        groups=groups,
        pairings=[p for p in pairings if p is not None],
        notes=_notes(data, by_method),
    )


def _row(runs: Sequence[RunData], *, pooled: bool = False) -> Row:
    """Pool the runs. Independent runs one after the other are one long run to the bounds."""
    episodes = [episode for run in runs for episode in run.episodes]
    accidents, steps = sum(e.accident for e in episodes), sum(e.steps for e in episodes)
    confidence = min(run.confidence for run in runs)
    decisions = [decision for run in runs for decision in run.decisions]
    evaluations = [run.evaluation for run in runs if run.evaluation is not None]
    evaluated = sum(e.episodes for e in evaluations)
    evaluated_accidents = sum(e.accidents for e in evaluations)
    last = [final_episodes(run) for run in runs]
    # Nobody saw what an episode without its end would have returned.
    whole = [[e for e in episodes if e.outcome == "complete"] for episodes in last]
    final = [_mean([e.episode_return for e in episodes]) for episodes in whole]
    final_costs = [_mean([e.cost for e in episodes]) for episodes in last]
    costs = [_mean([e.cost for e in run.episodes]) for run in runs]
    measured = any(not math.isnan(d.v_deployed) for d in decisions)
    upper = run_level_upper(accidents, confidence) / len(episodes) if episodes else 1.0
    return Row(
        label=f"ALL {len(runs)} run{'s' * (len(runs) > 1)}" if pooled else runs[0].name,
        method=runs[0].method,
        pooled=pooled,
        seeds=[run.seed for run in runs],
        episodes=len(episodes),
        steps=steps,
        accidents=accidents,
        rate=_rate(accidents, len(episodes), confidence, most=1.0),
        per_1000_steps=_rate(accidents, steps / 1000, confidence),
        early_accidents=sum(e.accident for e in episodes if e.total_steps <= EARLY_STEPS),
        certified_rate=min(1.0, upper),
        cost=_over_runs(costs),
        final_cost=_over_runs(final_costs),
        final_return=_over_runs(final),
        evaluated_return=_over_runs(
            [Mean(e.mean_return, e.return_standard_error) for e in evaluations]
        ),
        evaluated_cost=_over_runs([Mean(e.mean_cost, e.cost_standard_error) for e in evaluations]),
        evaluated_rate=Interval(
            evaluated_accidents / evaluated,
            *clopper_pearson(evaluated_accidents, evaluated, confidence),
        )
        if evaluated
        else _NOTHING,
        evaluated_episodes=evaluated,
        iterations=len(decisions),
        accepted=sum(d.accepted for d in decisions),
        violations=sum(d.violation for d in decisions) if runs[0].constrained else None,
        recovering=sum(d.recovering for d in decisions),
        constraint=runs[0].constraint,
        estimate=_mean([run.estimate for run in runs]),
        # Written so that a single NaN among the estimates counts as above.
        above_limit=sum(not d.v_deployed < d.limit for d in decisions) if measured else None,
    )


def final_episodes(run: RunData) -> list[Episode]:
    """The episodes that say how a run ended; see LAST_EPISODES and LAST_SHARE."""
    if not run.episodes:
        return []
    begin = (1.0 - LAST_SHARE) * run.episodes[-1].total_steps
    last = [e for e in run.episodes[-LAST_EPISODES:] if e.total_steps - e.steps >= begin]
    return last or run.episodes[-1:]


def _over_runs(means: Sequence[Mean]) -> Mean:
    """One run's own mean and error; of several, the mean of their means and its error."""
    return means[0] if len(means) == 1 else _mean([m.value for m in means])


def _rate(accidents: int, exposure: float, confidence: float, most: float = math.inf) -> Interval:
    if not exposure:
        return _NOTHING
    low, high = run_level_interval(accidents, confidence)
    return Interval(accidents / exposure, low / exposure, min(most, high / exposure))


def _mean(values: Sequence[float]) -> Mean:
    x = np.asarray(values, dtype=np.float64)
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return Mean(float(x.mean()) if len(x) else math.nan, error)


def _pair(first: Sequence[RunData], second: Sequence[RunData]) -> Pairing | None:
    """Match runs by pretrained policy and seed; None if not one matches."""
    partners = {(run.pretrained, run.seed): run for run in second if run.episodes}
    pairs = [
        (run, partners[run.pretrained, run.seed])
        for run in first
        if run.episodes and (run.pretrained, run.seed) in partners
    ]
    if not pairs:
        return None
    a, b = (_row(side, pooled=True) for side in zip(*pairs, strict=True))
    returns = np.array([[_row([run]).final_return.value for run in pair] for pair in pairs])
    costs = np.array([[_cost_per_step(run) for run in pair] for pair in pairs])
    confidence = min(run.confidence for pair in pairs for run in pair)

    def interval(
        values: NDArray[np.float64], statistic: Callable[[NDArray[np.float64]], float]
    ) -> Interval:
        if len(pairs) == 1:
            return Interval(statistic(values), math.nan, math.nan)
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        return Interval(
            statistic(values),
            *bootstrap_interval([values], statistic, rng, confidence=confidence),
        )

    def ratio(values: NDArray[np.float64]) -> Interval:
        # A ratio means something only while every value is positive.
        if not (values > 0).all():
            return _NOTHING
        return interval(values, lambda x: float(x[:, 0].sum() / x[:, 1].sum()))

    return Pairing(
        first=a.method,
        second=b.method,
        pairs=len(pairs),
        accidents=(a.accidents, b.accidents),
        accident_ratio=rate_ratio(a.accidents, a.steps, b.accidents, b.steps, confidence),
        return_ratio=ratio(returns),
        return_difference=interval(returns, lambda x: float((x[:, 0] - x[:, 1]).mean())),
        cost_ratio=ratio(costs),
    )


def _cost_per_step(run: RunData) -> float:
    return sum(e.cost for e in run.episodes) / run.episodes[-1].total_steps


def _notes(data: Sequence[RunData], by_method: Mapping[str, Sequence[RunData]]) -> list[str]:
    """What the reader must know before believing the table."""
    notes = []
    for what, values in (
        ("environments", {run.env_id for run in data}),
        ("constraint", {f"{r.constraint} < {r.limit:g}" for r in data if not math.isnan(r.limit)}),
        ("budgets", {f"{run.budget:,}" for run in data if run.budget is not None}),
    ):
        if len(values) > 1:
            notes.append(f"The runs differ in {what}: {', '.join(sorted(values))}.")
    notes += [f"{run.name} is {run.status}." for run in data if run.status != "finished"]
    names = [run.name for run in data]
    notes += [f"{n} is named twice." for n in sorted(set(names)) if names.count(n) > 1]
    online = {m: g for m, g in by_method.items() if any(run.episodes for run in g)}
    keys = {m: {(run.pretrained, run.seed) for run in g} for m, g in online.items()}
    for method, own in keys.items():
        others = set().union(*(k for m, k in keys.items() if m != method))
        if others - own:
            seeds = ", ".join(str(seed) for _, seed in sorted(others - own))
            notes.append(f"{method} has no run for the pretrained policy and seed of: {seeds}.")
    return notes
