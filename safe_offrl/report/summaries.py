"""Runs in numbers: one row a run, one row a method whose seeds are pooled.

An accident is an EPISODE with at least one accident throughout a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from safe_offrl.report.run_data import RunData, StoredEvaluation, StoredReplay
from safe_offrl.stats.anytime import run_level_interval, run_level_upper
from safe_offrl.stats.fixed import Mean, clopper_pearson, mean_and_error
from safe_offrl.stats.resampling import bootstrap_interval, iqm
from safe_offrl.types import Episode

EARLY_STEPS = 5_000  # where most accidents of fine-tuning happen
LAST_EPISODES = 100  # behind "final return" and "final cost", at most ...
LAST_SHARE = 0.2  # ... and of those that began in this last share of a run's steps
BOOTSTRAP_SEED = 0  # so that the same runs give the same table
ALL_ENVIRONMENTS = "all environments"


class Interval(NamedTuple):
    """A value between its bounds; NaN where there is nothing to measure."""

    value: float
    low: float
    high: float


NOTHING = Interval(math.nan, math.nan, math.nan)
_NO_MEAN = Mean(math.nan, math.nan)


class Replays(NamedTuple):
    """Of the versions that acted in one run or several, as each was played again afterwards."""

    versions: int
    above: int  # shown to exceed the limit
    correlation: Mean  # of estimates with truths over a run's versions; mean over runs
    most_cost: float  # of an episode


class SignalCosts(NamedTuple):
    """What an episode costs in one named signal, in one run or several."""

    learning: Mean  # over the whole run
    final: Mean
    evaluated: Mean


@dataclass(frozen=True)
class Row:
    """One run, or several seeds of one method pooled.

    Rates: accidents over episodes, with a two-sided anytime-valid interval at run level (policies
    may change). ``certified_rate`` is the one-sided upper bound alone. Returns of one run: mean and
    standard error over episodes; of a group: over the runs' means. ``..._iqm``: interquartile mean
    over runs with a bootstrap interval (NaN bounds for one run), stratified by environment.
    """

    label: str
    method: str
    environment: str  # its id, or ALL_ENVIRONMENTS: then returns are scores, see ``scales``
    pooled: bool
    seeds: list[int]
    episodes: int
    steps: int
    accidents: int
    rate: Interval
    per_1000_steps: Interval
    early_accidents: int  # in episodes that ended within the first EARLY_STEPS steps of a run
    certified_rate: float
    accidents_iqm: Interval  # per run
    most_accidents: int | None  # of a run; None without online runs
    cost: Mean  # per episode, over the whole run
    final_cost: Mean
    final_return: Mean
    final_return_iqm: Interval
    evaluated_return: Mean
    evaluated_return_iqm: Interval
    evaluated_cost: Mean
    evaluated_rate: Interval  # Clopper-Pearson: one look at a fixed number of episodes
    evaluated_episodes: int
    iterations: int
    accepted: int
    satisfied: int | None  # iterations after which both measured constraints held; None: unmeasured
    violations: int | None  # None for a method without constraints
    recovering: int
    constraint: str  # what the estimate is of: "accident", "cost", or a signal
    estimate: Mean  # for the final policies, to be held against evaluated_rate or evaluated_cost
    # Iterations whose acting policy's estimate was not below the limit; None if never measured.
    above_limit: int | None
    replay: Replays | None  # None if no run's versions were played again
    signals: Mapping[str, SignalCosts]  # those that every run has, limited or not

    @property
    def accepted_share(self) -> float:
        """Accepted candidates over iterations; NaN without any."""
        return self.accepted / self.iterations if self.iterations else math.nan

    @property
    def satisfied_share(self) -> float:
        """Share of the iterations after which both measured constraints held; NaN if unmeasured."""
        return math.nan if self.satisfied is None else self.satisfied / self.iterations


def scales_of(baseline: Sequence[RunData]) -> dict[str, float]:
    """By environment, the return that is called 1: the mean of the baseline's runs there.

    Returns of different environments differ in scale, so only these scores are pooled. A mean that
    is not positive cannot be a unit and makes the scores NaN.
    """
    means = {}
    for environment in {run.env_id for run in baseline}:
        returns = [outcome(run) for run in baseline if run.env_id == environment]
        mean = mean_and_error(returns).value
        means[environment] = mean if mean > 0 else math.nan
    return means


def row_of(
    runs: Sequence[RunData],
    label: str = "",
    *,
    pooled: bool = False,
    scales: Mapping[str, float] | None = None,
) -> Row:
    """Pool the runs. Independent runs one after the other are one long run to the bounds.

    ``scales``: for runs of several environments, what to divide the returns of each by; costs and
    estimates, whose limits differ, are not pooled then.
    """
    # Units of returns.
    environments = list(dict.fromkeys(run.env_id for run in runs))
    several = len(environments) > 1 or scales is not None
    unit = {e: (scales or {}).get(e, math.nan) if several else 1.0 for e in environments}
    # Online phases.
    online = [run for run in runs if run.episodes]
    episodes = [episode for run in runs for episode in run.episodes]
    accidents, steps = sum(e.accident for e in episodes), sum(e.steps for e in episodes)
    confidence = min(run.confidence for run in runs)
    decisions = [decision for run in runs for decision in run.decisions]
    # Evaluations.
    played = [run for run in runs if run.evaluation is not None]
    evaluations = [run.evaluation for run in runs if run.evaluation is not None]
    evaluated = sum(e.episodes for e in evaluations)
    evaluated_accidents = sum(e.accidents for e in evaluations)
    # Final episodes.
    last = {id(run): final_episodes(run) for run in online}
    counts = [float(run.accidents) for run in online]
    upper = run_level_upper(accidents, confidence) / len(episodes) if episodes else 1.0
    final = [mean_and_error(np.divide(_returns(last[id(run)]), unit[run.env_id])) for run in online]
    shown = [
        Mean(e.mean_return / unit[run.env_id], e.return_standard_error / unit[run.env_id])
        for run, e in zip(played, evaluations, strict=True)
    ]
    return Row(
        label=label,
        method=runs[0].method,
        environment=ALL_ENVIRONMENTS if several else environments[0],
        pooled=pooled,
        seeds=[run.seed for run in runs],
        # Accidents.
        episodes=len(episodes),
        steps=steps,
        accidents=accidents,
        rate=_rate(accidents, len(episodes), confidence, most=1.0),
        per_1000_steps=_rate(accidents, steps / 1000, confidence),
        early_accidents=sum(e.accident and e.total_steps <= EARLY_STEPS for e in episodes),
        certified_rate=min(1.0, upper),
        accidents_iqm=_iqm(online, counts, confidence),
        most_accidents=int(max(counts)) if counts else None,
        # Costs and returns.
        cost=_NO_MEAN if several else _over_runs([_costs(run.episodes) for run in online]),
        final_cost=_NO_MEAN if several else _over_runs([_costs(last[id(run)]) for run in online]),
        final_return=_over_runs(final),
        final_return_iqm=_iqm(online, [m.value for m in final], confidence),
        # Evaluations.
        evaluated_return=_over_runs(shown),
        evaluated_return_iqm=_iqm(played, [m.value for m in shown], confidence),
        evaluated_cost=_NO_MEAN
        if several
        else _over_runs([Mean(e.mean_cost, e.cost_standard_error) for e in evaluations]),
        evaluated_rate=Interval(
            evaluated_accidents / evaluated,
            *clopper_pearson(evaluated_accidents, evaluated, confidence),
        )
        if evaluated
        else NOTHING,
        evaluated_episodes=evaluated,
        # Decisions.
        iterations=len(decisions),
        accepted=sum(d.accepted for d in decisions),
        satisfied=sum(d.satisfied for d in decisions)
        if any(d.measured for d in decisions)
        else None,
        violations=sum(d.violation for d in decisions)
        if any(run.constrained for run in runs)
        else None,
        recovering=sum(d.recovering for d in decisions),
        constraint=runs[0].constraint,
        estimate=_NO_MEAN if several else mean_and_error([run.estimate for run in runs]),
        # A single NaN among the estimates counts as above.
        above_limit=sum(not d.deployed_below for d in decisions)
        if any(not math.isnan(d.v_deployed) for d in decisions)
        else None,
        # Replays, and named costs.
        replay=_replays([run.replay for run in runs if run.replay is not None]),
        signals={} if several else _signals(online, list(last.values()), evaluations),
    )


def _replays(found: Sequence[StoredReplay]) -> Replays | None:
    if not found:
        return None
    known = [r.correlation for r in found if not math.isnan(r.correlation)]
    return Replays(
        versions=sum(r.versions for r in found),
        above=sum(r.above for r in found),
        correlation=mean_and_error(known),
        most_cost=max(r.most_cost for r in found),
    )


def _signals(
    online: Sequence[RunData],
    final: Sequence[Sequence[Episode]],
    evaluations: Sequence[StoredEvaluation],
) -> dict[str, SignalCosts]:
    """Of the names that all episodes of these runs have; ``final`` are each run's final ones."""
    every = [set(e.signal_costs) for run in online for e in run.episodes]
    names = sorted(set.intersection(*every)) if every else []
    return {
        name: SignalCosts(
            _over_runs([_costs(run.episodes, name) for run in online]),
            _over_runs([_costs(episodes, name) for episodes in final]),
            _over_runs([Mean(*e.signals[name]) for e in evaluations if name in e.signals]),
        )
        for name in names
    }


def _returns(episodes: Sequence[Episode]) -> list[float]:
    """Of the episodes that were seen to their end: nobody knows what another would have brought."""
    return [e.episode_return for e in episodes if e.outcome == "complete"]


def final_episodes(run: RunData) -> list[Episode]:
    """The episodes that say how a run ended; see LAST_EPISODES and LAST_SHARE."""
    if not run.episodes:
        return []
    begin = (1.0 - LAST_SHARE) * run.episodes[-1].total_steps
    last = [e for e in run.episodes[-LAST_EPISODES:] if e.total_steps - e.steps >= begin]
    return last or run.episodes[-1:]


def final_return(run: RunData) -> float:
    """Mean return of the run's final episodes; NaN without any."""
    return mean_and_error(_returns(final_episodes(run))).value


def learned_online(run: RunData) -> bool:
    """Whether it took a step online: an environment may fail before the first."""
    return bool(run.episodes) and run.episodes[-1].total_steps > 0


def outcome(run: RunData) -> float:
    """What a run came to: its final return, or, for a policy that never learned, the evaluated."""
    if learned_online(run) or run.evaluation is None:
        return final_return(run)
    return run.evaluation.mean_return


def _iqm(runs: Sequence[RunData], values: Sequence[float], confidence: float) -> Interval:
    """IQM of one value a run, with its bootstrap interval over runs, drawn by environment."""
    if len(values) < 2 or not np.isfinite(values).all():
        return Interval(iqm(values), math.nan, math.nan)
    environments = dict.fromkeys(run.env_id for run in runs)
    strata = [
        [value for run, value in zip(runs, values, strict=True) if run.env_id == environment]
        for environment in environments
    ]
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    return Interval(iqm(values), *bootstrap_interval(strata, iqm, rng, confidence=confidence))


def _costs(episodes: Sequence[Episode], signal: str = "") -> Mean:
    costs = [e.signal_costs[signal] if signal else e.cost for e in episodes]
    return mean_and_error(costs)


def _over_runs(means: Sequence[Mean]) -> Mean:
    """One run's own mean and error; of several, the mean of their means and its error."""
    return means[0] if len(means) == 1 else mean_and_error([m.value for m in means])


def _rate(accidents: int, exposure: float, confidence: float, most: float = math.inf) -> Interval:
    if not exposure:
        return NOTHING
    low, high = run_level_interval(accidents, confidence)
    return Interval(accidents / exposure, low / exposure, min(most, high / exposure))
