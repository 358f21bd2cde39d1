"""What a dataset holds, and what cannot be learnt from it, for ``safe-offrl inspect``."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.check.groups import EpisodeGroup, Identification, group_episodes, identify
from safe_offrl.check.signals import SignalSummary, summarise_signals
from safe_offrl.data.dataset import FLOAT32_EPS, Dataset
from safe_offrl.limits import Limit, quantity_named
from safe_offrl.safety.calibration import MIN_HELD_OUT_EPISODES
from safe_offrl.spec import SafetySpec
from safe_offrl.stats.fixed import clopper_pearson

INSPECTED = 2_000_000  # a larger dataset is judged by whole episodes drawn at random
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
BINS = 20  # the coverage histograms have so many per axis, fewer for a small dataset
MIN_TRANSITIONS = 1000
MIN_ACTION_RANGE = 0.2  # -1 to 1 is 2
MIN_ACTION_COVERAGE = 0.1
TIME_BINS = 10  # of the horizon, for the times of first accidents


@dataclass(frozen=True)
class DatasetSummary:
    """Figures of one dataset; all rates and coverages are shares in [0, 1].

    ``lengths``, ``returns`` and ``costs`` are the quantiles 0, .25, .5, .75, 1 over episodes
    (steps; undiscounted reward and cost). ``accident_interval`` is the 95 % Clopper-Pearson
    interval of the share of accident episodes. ``action_coverage`` is the share of the bins of
    [-1, 1]^2 that are visited, averaged over the pairs of action dimensions, or of the discrete
    actions that were tried;
    ``observation_coverage`` the same within the range of the first two principal components of the
    standardised observations. ``state_action_coverage``: of those bins of states that were
    visited, weighted by visits, the share of directions (signs of the first three actions) that
    were tried there. ``accident_times`` [10] counts the episodes whose first accident fell into
    each tenth of the horizon. ``groups``: behaviours, or quarters of the return.
    ``identification``: whether a behaviour of the log itself keeps the limit of ``constraint``.
    """

    env_id: str | None
    sha256: str
    horizon: int
    transitions: int
    episodes: int
    lengths: tuple[float, ...]
    returns: tuple[float, ...]
    costs: tuple[float, ...]
    accident_episodes: int
    accident_interval: tuple[float, float]
    accident_steps: int
    accident_times: tuple[int, ...]
    terminated_episodes: int
    truncated_episodes: int
    action_shares: tuple[float, ...]  # of each discrete action; () for continuous ones
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    action_coverage: float
    observation_coverage: float
    state_action_coverage: float
    groups: tuple[EpisodeGroup, ...]
    constraint: str
    limit: float
    within_limit: float  # share of the episodes
    identification: Identification
    warnings: tuple[str, ...]
    signals: tuple[SignalSummary, ...]

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able dict of all fields."""
        return asdict(self) | {
            "groups": [group._asdict() for group in self.groups],
            "identification": self.identification._asdict(),
            "signals": [signal._asdict() for signal in self.signals],
        }


def summarise(dataset: Dataset, safety: SafetySpec, held_out: float) -> DatasetSummary:
    """Measure a dataset; see :class:`DatasetSummary` for the definitions.

    ``held_out`` is the share of its episodes that the safety critic will be calibrated on.
    """
    # Counts.
    batch = dataset.transitions
    actions, observations = batch.actions.numpy(), batch.observations.numpy()
    accidents = int(dataset.episode_accidents.sum())
    last_steps = dataset.episode_starts[1:] - 1
    truncated = int(dataset.truncated[last_steps].sum())
    limit = safety.limit(dataset.horizon, dataset.cost_max, dataset.signals_max)
    seen = dataset.under(limit)
    outcomes = limit.quantity.select(dataset.episode_accidents, seen.episode_costs)
    components = principal_components(observations)
    return DatasetSummary(
        env_id=dataset.metadata.get("env_id"),
        sha256=dataset.sha256,
        horizon=dataset.horizon,
        transitions=len(actions),
        episodes=dataset.episodes,
        lengths=_floats(np.quantile(dataset.episode_lengths, QUANTILES)),
        returns=_floats(np.quantile(dataset.episode_returns, QUANTILES)),
        costs=_floats(np.quantile(dataset.episode_costs, QUANTILES)),
        accident_episodes=accidents,
        accident_interval=clopper_pearson(accidents, dataset.episodes, 0.95),
        accident_steps=int(batch.accidents.sum()),
        accident_times=tuple(
            np.histogram(first_accidents(dataset), TIME_BINS, (0.0, 1.0))[0].tolist()
        ),
        terminated_episodes=dataset.episodes - truncated,
        truncated_episodes=truncated,
        action_shares=_floats(actions.mean(axis=0)) if dataset.discrete else (),
        action_low=_floats(actions.min(axis=0)),
        action_high=_floats(actions.max(axis=0)),
        action_coverage=_action_coverage(dataset, actions),
        observation_coverage=_principal_coverage(components),
        state_action_coverage=_state_action_coverage(components, actions),
        groups=group_episodes(dataset),
        constraint=limit.constraint,
        limit=limit.value,
        within_limit=float((outcomes < limit.value).mean()),
        identification=identify(seen, group_episodes(seen), limit),
        warnings=tuple(dataset_warnings(dataset, limit, held_out)),
        signals=summarise_signals(dataset),
    )


def format_summary(summary: DatasetSummary) -> str:
    """The summary as a readable text of a few lines."""
    # Lines of the whole log.
    s = summary
    low, high = s.accident_interval
    within = f"; {s.within_limit:.0%} of the episodes below {s.limit:g}"
    quantity = quantity_named(s.constraint)
    lines = [
        f"dataset       {s.env_id or 'unknown environment'}, sha256 {s.sha256[:12]}",
        f"transitions   {s.transitions:,} in {s.episodes:,} episodes, horizon {s.horizon}",
        f"length        {_quantile_text(s.lengths, '.0f')} steps",
        f"return        {_quantile_text(s.returns, '.4g')}",
        f"cost          {_quantile_text(s.costs, '.4g')}"
        + quantity.select("", within) * (not quantity.signal),
        *(f"signal        {x}" + within * (x.name == quantity.signal) for x in s.signals),
        f"accidents     {s.accident_episodes:,} episodes = {s.accident_episodes / s.episodes:.1%} "
        f"(95 % interval {low:.1%} to {high:.1%}), {s.accident_steps:,} steps",
        f"first at      {_bars(s.accident_times)} of the horizon, in tenths: "
        + " ".join(map(str, s.accident_times)),
        f"episode ends  {s.terminated_episodes:,} terminated, {s.truncated_episodes:,} truncated",
        "actions       "
        + (
            ", ".join(f"{k}: {share:.0%}" for k, share in enumerate(s.action_shares))
            or ", ".join(
                f"[{a:+.2f}, {b:+.2f}]" for a, b in zip(s.action_low, s.action_high, strict=True)
            )
        ),
        f"coverage      actions {s.action_coverage:.0%}, observations {s.observation_coverage:.0%} "
        "of the bins of two dimensions; where it was, "
        f"{s.state_action_coverage:.0%} of the directions tried",
    ]
    # Lines of its groups.
    width = max(len(group.name) for group in s.groups)
    lines.append(f"{'group':<{width + 2}}  episodes    return            cost  accident episodes")
    lines += [
        f"  {g.name:<{width}}  {g.episodes:>8,}  {g.mean_return:>8.4g}  "
        f"{g.mean_cost:>7.4g} {_error_text(g)} {g.accident_episodes:>6,} = "
        f"{g.accident_episodes / g.episodes:.1%}"
        for g in s.groups
    ]
    # Conclusions.
    lines.append(f"identified    {quantity.symbol} < {s.limit:g}: {s.identification.sentence}")
    lines += [f"warning: {warning}" for warning in s.warnings]
    return "\n".join(lines)


def _error_text(group: EpisodeGroup) -> str:
    """The standard error of a mean cost; blank for a single episode, which has none."""
    return f"+- {group.cost_error:<5.2g}" if group.episodes > 1 else " " * 8


def first_accidents(dataset: Dataset) -> NDArray[np.float64]:
    """Time of the first accident of each episode that has one, as a share of the horizon [K]."""
    rows = np.flatnonzero(dataset.transitions.accidents.numpy() > 0)
    episode = np.searchsorted(dataset.episode_starts, rows, side="right") - 1
    _, first = np.unique(episode, return_index=True)
    steps = rows[first] - dataset.episode_starts[episode[first]]
    return np.asarray(steps / dataset.horizon, dtype=np.float64)


def _bars(counts: tuple[int, ...]) -> str:
    """Counts as a row of block characters, one eighth of the highest each step."""
    top = max(1, *counts)
    return "".join(" ▁▂▃▄▅▆▇█"[-(-8 * count // top)] for count in counts)


def _quantile_text(values: tuple[float, ...], form: str) -> str:
    low, lower, median, upper, high = (format(v, form) for v in values)
    return f"median {median}, half of them {lower} to {upper}, all {low} to {high}"


def _coverage(points: NDArray[Any], low: NDArray[Any], high: NDArray[Any]) -> float:
    """Share of bins of [low, high] hit by points [N, K], averaged over pairs of the K axes.

    With one axis, over that axis. There are at most N / 10 bins, so that a small N does not by
    itself read as poor coverage.
    """
    axes = 1 if points.shape[1] == 1 else 2
    bins = int(np.clip((len(points) / 10) ** (1 / axes), 2, BINS))
    index = ((points - low) / (high - low) * bins).astype(np.int64).clip(0, bins - 1)
    shares = [
        len(np.unique(np.ravel_multi_index(tuple(index[:, list(pair)].T), (bins,) * axes)))
        / bins**axes
        for pair in itertools.combinations(range(points.shape[1]), axes)
    ]
    return float(np.mean(shares))


def principal_components(observations: NDArray[Any]) -> NDArray[np.float64]:
    """The first two principal components of the standardised observations [N, O] -> [N, <= 2]."""
    values = observations.astype(np.float64)
    deviation = values.std(axis=0)
    varies = deviation > FLOAT32_EPS * np.abs(values).max(axis=0)
    values = (values - values.mean(axis=0))[:, varies] / deviation[varies]
    if values.shape[1] == 0:
        return values  # every observation is the same
    variances, vectors = np.linalg.eigh(values.T @ values)  # in ascending order
    components = vectors[:, variances > 1e-9 * variances[-1]]  # the others are rounding errors
    return np.asarray(values @ components[:, -2:])


def _principal_coverage(points: NDArray[np.float64]) -> float:
    """Coverage of the range of the principal components [N, <= 2]; 0 if nothing ever changes."""
    if points.shape[1] == 0:
        return 0.0
    return _coverage(points, points.min(axis=0), points.max(axis=0))


def _state_action_coverage(points: NDArray[np.float64], actions: NDArray[Any]) -> float:
    """Share of the signs of the first three actions that were tried in a state's bin.

    ``points`` [N, <= 2] are binned 10 by 10 over their range; the mean is over transitions, so that
    a bin counts as often as it was visited. A discrete action, one-hot, counts as itself.
    """
    one_hot = bool(((actions == 0) | (actions == 1)).all() and (actions.sum(axis=1) == 1).all())
    signs = actions[:, :3] > 0
    kinds = actions.shape[1] if one_hot else 2 ** signs.shape[1]
    tried = actions.argmax(axis=1) if one_hot else signs @ (1 << np.arange(signs.shape[1]))
    span = np.ptp(points, axis=0) if points.shape[1] else np.ones(0)
    low = points.min(axis=0) if points.shape[1] else np.zeros(0)
    index = ((points - low) / np.where(span > 0, span, 1.0) * 10).astype(np.int64).clip(0, 9)
    cell = index @ (10 ** np.arange(points.shape[1]))
    seen = np.zeros((100, kinds), dtype=bool)
    seen[cell, tried] = True
    return float(seen[cell].mean())


def _action_coverage(dataset: Dataset, actions: NDArray[Any]) -> float:
    if dataset.discrete:
        return float((actions > 0).any(axis=0).mean())
    edges = np.full(actions.shape[1], 1.0)
    return _coverage(actions, -edges, edges)


def dataset_warnings(dataset: Dataset, limit: Limit, held_out: float) -> list[str]:
    """What a load noticed, and what cannot be learnt from this dataset, one sentence each.

    ``held_out`` is the share of its episodes that the safety critic will be calibrated on.
    """
    # What a load noticed.
    batch = dataset.transitions
    found = list(dataset.remarks)
    if "warning" in dataset.metadata:
        found.append(str(dataset.metadata["warning"]))
    # Too few episodes or steps.
    found += _outcome_warnings(dataset.under(limit), limit, held_out)
    if len(dataset.rows) < MIN_TRANSITIONS:
        found.append(
            f"only {len(dataset.rows)} transitions: enough to try the commands, too few to learn. "
            f"Log {MIN_TRANSITIONS - len(dataset.rows)} more at least."
        )
    # Actions.
    actions = batch.actions.numpy()
    low, high = actions.min(axis=0), actions.max(axis=0)
    found += [
        f"action {k} stays within [{low[k]:+.2f}, {high[k]:+.2f}]: nothing is known outside."
        for k in np.flatnonzero(high - low < MIN_ACTION_RANGE)
        if not dataset.discrete
    ]
    action_coverage = _action_coverage(dataset, actions)
    if action_coverage < MIN_ACTION_COVERAGE:
        found.append(
            f"the actions cover {action_coverage:.0%} of their space: elsewhere estimates "
            "extrapolate."
        )
    if dataset.episode_behaviours is not None and len(group_episodes(dataset)) == 1:
        found.append(
            "a single behaviour logged everything: there is nothing to tell better from worse "
            "except its own noise."
        )
    returns = dataset.episode_returns  # of equal rewards, too, a longer episode may have more
    if returns.min() == returns.max():
        found.append("every episode has the same return: no policy is better than another.")
    return found


def _outcome_warnings(dataset: Dataset, limit: Limit, held_out: float) -> list[str]:
    """What is missing of safe or unsafe episodes, as far as the constraint needs them."""
    # How many are needed.
    episodes = dataset.episodes
    needed = math.ceil(MIN_HELD_OUT_EPISODES / held_out)
    too_few = (
        f"too few to calibrate the safety critic (about {needed}, so that {MIN_HELD_OUT_EPISODES} "
        "are held out)"
    )
    # Under a limit on the cost.
    if limit.constraint != "accident":
        kept = int((dataset.episode_costs < limit.value).sum())
        if min(kept, episodes - kept) >= needed:
            return []
        which = f"below the limit of {limit.value:g}{limit.quantity.inside}"
        if kept > episodes - kept:
            which, kept = which.replace("below", "above", 1), episodes - kept
        return [f"only {kept} episodes are {which}, {too_few}. Log {needed - kept} more."]
    # Under a limit on accidents.
    accidents, found = int(dataset.episode_accidents.sum()), []
    if accidents == 0:
        found.append(
            "no accident at all: what leads to one cannot be learnt, and no estimate of the "
            f"accident probability can be checked. Log about {needed} episodes with one."
        )
    elif accidents < needed:
        found.append(
            f"only {accidents} accident episodes, {too_few}. Log {needed - accidents} more."
        )
    if accidents == episodes:
        found.append(
            "every episode has an accident: what avoids one cannot be learnt. Log about "
            f"{needed} episodes without one."
        )
    elif (safe := episodes - accidents) < needed:
        found.append(
            f"only {safe} episodes without an accident, {too_few}. Log {needed - safe} more."
        )
    return found


def _floats(values: NDArray[Any]) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
