"""One method against another over the runs that belong together: same start, same seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safe_offrl.report.run_data import RunData, StoredEvaluation
from safe_offrl.report.summaries import (
    BOOTSTRAP_SEED,
    NOTHING,
    Interval,
    final_return,
    learned_online,
)
from safe_offrl.stats.fixed import RateRatio, rate_ratio
from safe_offrl.stats.resampling import bootstrap_interval, ratio_interval, sign_flip_p_value

Pairs = Sequence[tuple[RunData, RunData]]
Rows = NDArray[np.float64]


@dataclass(frozen=True)
class Pairing:
    """``first`` against ``second`` over the runs that share environment, policy and seed.

    Accident totals are compared twice. ``accident_ratio``: these runs are given, accidents fall by
    chance (conditional binomial). ``..._over_seeds``: the pairs are drawn, other seeds would give
    other runs (bootstrap of pairs, sign flips of the differences per step).
    """

    first: str
    second: str
    pairs: int
    same_policy: bool  # False: matched by seed alone, as not one pair started from one policy
    accidents: tuple[int, int] | None  # None unless both learned online
    accident_ratio: RateRatio | None  # per step
    accident_ratio_over_seeds: Interval  # the same ratio; no bounds for a single pair
    p_value_over_seeds: float  # NaN for a single pair
    return_ratio: Interval  # of summed final returns, bootstrap over pairs; NaN unless both > 0
    return_difference: Interval  # mean over pairs
    cost_ratio: Interval  # of costs per step; NaN unless both are above 0
    evaluated_accidents: tuple[int, int] | None  # of the final policies; None unless both have one
    evaluated_ratio: RateRatio | None  # per episode
    evaluated_difference: Interval  # of evaluated returns, mean over pairs


def pair(
    first: Sequence[RunData], second: Sequence[RunData], scales: Mapping[str, float] | None = None
) -> Pairing | None:
    """Match runs and compare them; None if no two of them have the same numbers to show.

    ``scales``: what returns are divided by in each environment, where there are several.
    """
    # Pairs.
    pairs, same_policy = _matched(first, second)
    if not pairs:
        return None
    confidence = min(run.confidence for both in pairs for run in both)
    learned = [both for both in pairs if all(learned_online(run) for run in both)]
    played = [both for both in pairs if all(run.evaluation is not None for run in both)]
    if not learned and not played:
        return None
    unit = scales or {}

    # Differences and ratios.
    def difference(chosen: Pairs, value: Callable[[RunData], float]) -> Interval:
        strata = _paired_values(chosen, lambda run: value(run) / unit.get(run.env_id, 1.0))
        return _interval(strata, lambda x: float((x[:, 0] - x[:, 1]).mean()), confidence)

    def ratio(value: Callable[[RunData], float], unit: Mapping[str, float]) -> Interval:
        strata = _paired_values(learned, lambda run: value(run) / unit.get(run.env_id, 1.0))
        # A ratio means something only while every value is positive.
        if not all((x > 0).all() for x in strata):
            return NOTHING
        return _interval(strata, lambda x: float(x[:, 0].sum() / x[:, 1].sum()), confidence)

    # Comparison.
    online = _Totals.from_pairs(learned, lambda run: (run.accidents, run.episodes[-1].total_steps))
    final = _Totals.from_pairs(played, lambda run: (_played(run).accidents, _played(run).episodes))
    return Pairing(
        first=pairs[0][0].method,
        second=pairs[0][1].method,
        pairs=len(pairs),
        same_policy=same_policy,
        accidents=online.counts if online else None,
        accident_ratio=online.exact(confidence) if online else None,
        accident_ratio_over_seeds=online.over_seeds(confidence) if online else NOTHING,
        p_value_over_seeds=online.seeds_p_value() if online else math.nan,
        return_ratio=ratio(final_return, unit),
        return_difference=difference(learned, final_return),
        cost_ratio=ratio(_cost_per_step, {}),
        evaluated_accidents=final.counts if final else None,
        evaluated_ratio=final.exact(confidence) if final else None,
        evaluated_difference=difference(played, lambda run: _played(run).mean_return),
    )


@dataclass(frozen=True)
class _Totals:
    """Accidents over exposure: one array [n, 4] for each environment, a row a pair."""

    strata: list[Rows]

    @classmethod
    def from_pairs(
        cls, pairs: Pairs, count: Callable[[RunData], tuple[int, int]]
    ) -> _Totals | None:
        if not pairs:
            return None
        return cls([np.array([[*count(a), *count(b)] for a, b in g]) for g in _grouped(pairs)])

    @property
    def rows(self) -> Rows:
        return np.concatenate(self.strata)

    @property
    def counts(self) -> tuple[int, int]:
        k1, _, k2, _ = self.rows.sum(axis=0)
        return int(k1), int(k2)

    def exact(self, confidence: float) -> RateRatio:
        k1, e1, k2, e2 = self.rows.sum(axis=0).tolist()
        return rate_ratio(k1, e1, k2, e2, confidence)

    def over_seeds(self, confidence: float) -> Interval:
        k1, e1, k2, e2 = self.rows.sum(axis=0).tolist()
        value = (k1 / e1) / (k2 / e2) if k2 else math.inf if k1 else math.nan
        if len(self.rows) == 1:
            return Interval(value, math.nan, math.nan)
        rng = np.random.default_rng(BOOTSTRAP_SEED)
        return Interval(value, *ratio_interval(self.strata, rng, confidence=confidence))

    def seeds_p_value(self) -> float:
        k1, e1, k2, e2 = self.rows.T
        return sign_flip_p_value(k1 / e1 - k2 / e2) if len(k1) > 1 else math.nan


def _matched(first: Sequence[RunData], second: Sequence[RunData]) -> tuple[Pairs, bool]:
    """Pairs by environment, policy and seed; if there is none, by environment and seed alone.

    No run is in two pairs: of several that could be, the first is paired with the first.
    """
    keys: tuple[Callable[[RunData], object], ...] = (
        lambda run: (run.env_id, run.pretrained, run.seed),
        lambda run: (run.env_id, run.seed),
    )
    mine, theirs = ([run for run in side if has_outcome(run)] for side in (first, second))
    for same_policy, key in zip((True, False), keys, strict=True):
        partners: dict[object, list[RunData]] = {}
        for run in reversed(theirs):
            partners.setdefault(key(run), []).append(run)
        pairs = [(run, partners[key(run)].pop()) for run in mine if partners.get(key(run))]
        if pairs:
            return pairs, same_policy
    return [], True


def has_outcome(run: RunData) -> bool:
    """Whether a run learned online or was evaluated: else there is nothing to compare."""
    return learned_online(run) or run.evaluation is not None


def _grouped(pairs: Pairs) -> list[Pairs]:
    """The pairs of each environment."""
    environments = dict.fromkeys(a.env_id for a, _ in pairs)
    return [[both for both in pairs if both[0].env_id == e] for e in environments]


def _paired_values(pairs: Pairs, value: Callable[[RunData], float]) -> list[Rows]:
    """One array [n, 2] for each environment."""
    return [np.array([[value(a), value(b)] for a, b in group]) for group in _grouped(pairs)]


def _interval(
    strata: list[Rows], statistic: Callable[[Rows], float], confidence: float
) -> Interval:
    """The statistic with its bootstrap interval over pairs; no bounds for a single one."""
    if not strata:
        return NOTHING
    rows = np.concatenate(strata)
    if len(rows) == 1 or not np.isfinite(rows).all():
        return Interval(statistic(rows), math.nan, math.nan)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    bounds = bootstrap_interval(strata, statistic, rng, confidence=confidence)
    return Interval(statistic(rows), *bounds)


def _cost_per_step(run: RunData) -> float:
    return sum(e.cost for e in run.episodes) / run.episodes[-1].total_steps


def _played(run: RunData) -> StoredEvaluation:
    assert run.evaluation is not None
    return run.evaluation
