"""What a dataset holds, and what cannot be learnt from it, for ``safe-offrl inspect``."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.statistics import clopper_pearson
from safe_offrl.types import Dataset

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
BINS = 20  # per axis of the coverage histograms, fewer for a small dataset
MIN_CALIBRATION_EPISODES = 30  # with and without accident: fewer leave a calibration to chance
MIN_TRANSITIONS = 1000
MIN_ACTION_RANGE = 0.2  # of the 2 from -1 to 1
MIN_ACTION_COVERAGE = 0.1


@dataclass(frozen=True)
class DatasetSummary:
    """Figures of one dataset; all rates and coverages are shares in [0, 1].

    ``lengths`` and ``returns`` are the quantiles 0, .25, .5, .75, 1 over episodes (steps;
    undiscounted reward). ``accident_interval`` is the 95 % Clopper-Pearson interval of the share of
    accident episodes. ``action_coverage`` is the share of the bins of [-1, 1]^2 that are visited,
    averaged over the pairs of action dimensions; ``observation_coverage`` the same within the range
    of the first two principal components of the standardised observations.
    """

    env_id: str | None
    sha256: str
    horizon: int
    transitions: int
    episodes: int
    lengths: tuple[float, ...]
    returns: tuple[float, ...]
    accident_episodes: int
    accident_interval: tuple[float, float]
    accident_steps: int
    terminated_episodes: int
    truncated_episodes: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    action_coverage: float
    observation_coverage: float
    behaviours: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able dict of all fields."""
        return asdict(self)


def summarise(dataset: Dataset) -> DatasetSummary:
    """Measure a dataset; see :class:`DatasetSummary` for the definitions."""
    batch = dataset.transitions
    actions, observations = batch.actions.numpy(), batch.observations.numpy()
    accidents = int(dataset.episode_accidents.sum())
    last_steps = dataset.episode_starts[1:] - 1
    truncated = int(dataset.truncated[last_steps].sum())
    edges = np.full(actions.shape[1], 1.0)
    action_coverage = _coverage(actions, -edges, edges)
    behaviours = _behaviours(dataset)
    return DatasetSummary(
        env_id=dataset.metadata.get("env_id"),
        sha256=dataset.sha256,
        horizon=dataset.horizon,
        transitions=len(actions),
        episodes=dataset.episodes,
        lengths=_floats(np.quantile(dataset.episode_lengths, QUANTILES)),
        returns=_floats(np.quantile(dataset.episode_returns, QUANTILES)),
        accident_episodes=accidents,
        accident_interval=clopper_pearson(accidents, dataset.episodes, 0.95),
        accident_steps=int(batch.accidents.sum()),
        terminated_episodes=dataset.episodes - truncated,
        truncated_episodes=truncated,
        action_low=_floats(actions.min(axis=0)),
        action_high=_floats(actions.max(axis=0)),
        action_coverage=action_coverage,
        observation_coverage=_principal_coverage(observations),
        behaviours=behaviours,
        warnings=tuple(_warnings(dataset, accidents, action_coverage, behaviours)),
    )


def format_summary(summary: DatasetSummary) -> str:
    """The summary as a readable text of a few lines."""
    s = summary
    low, high = s.accident_interval
    lines = [
        f"dataset       {s.env_id or 'unknown environment'}, sha256 {s.sha256[:12]}",
        f"transitions   {s.transitions:,} in {s.episodes:,} episodes, horizon {s.horizon}",
        f"length        {_quantile_text(s.lengths, '.0f')} steps",
        f"return        {_quantile_text(s.returns, '.4g')}",
        f"accidents     {s.accident_episodes:,} episodes = {s.accident_episodes / s.episodes:.1%} "
        f"(95 % interval {low:.1%} to {high:.1%}), {s.accident_steps:,} steps",
        f"episode ends  {s.terminated_episodes:,} terminated, {s.truncated_episodes:,} truncated",
        "actions       "
        + ", ".join(
            f"[{a:+.2f}, {b:+.2f}]" for a, b in zip(s.action_low, s.action_high, strict=True)
        ),
        f"coverage      actions {s.action_coverage:.0%}, observations {s.observation_coverage:.0%} "
        "of the bins of two dimensions",
    ]
    if s.behaviours:
        lines.append("behaviours    episodes  accident episodes")
        lines += [
            f"  {b['name']:<18} {b['episodes']:>5}  {b['accident_episodes']:>6} = "
            f"{b['accident_episodes'] / max(b['episodes'], 1):.1%}"
            for b in s.behaviours
        ]
    lines += [f"warning: {warning}" for warning in s.warnings]
    return "\n".join(lines)


def _quantile_text(values: tuple[float, ...], form: str) -> str:
    low, lower, median, upper, high = (format(v, form) for v in values)
    return f"median {median}, half of them {lower} to {upper}, all {low} to {high}"


def _behaviours(dataset: Dataset) -> tuple[dict[str, Any], ...]:
    """The behaviours as the loader counted them; () for a file, or a subset, without the counts."""
    keys = ("name", "episodes", "accident_episodes")
    listed = dataset.metadata.get("behaviours")
    if not isinstance(listed, list) or not all(
        isinstance(b, dict) and all(isinstance(b.get(key), int) for key in keys[1:]) for b in listed
    ):
        return ()
    counted = sum(b["episodes"] for b in listed) == dataset.episodes
    return tuple({key: b.get(key) for key in keys} for b in listed) if counted else ()


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


def _principal_coverage(observations: NDArray[Any]) -> float:
    """Coverage in the first two principal components of the standardised observations [N, O]."""
    values = observations.astype(np.float64)
    deviation = values.std(axis=0)
    values = (values - values.mean(axis=0))[:, deviation > 0] / deviation[deviation > 0]
    if values.shape[1] == 0:
        return 0.0  # every observation is the same
    variances, vectors = np.linalg.eigh(values.T @ values)  # in ascending order
    components = vectors[:, variances > 1e-9 * variances[-1]]  # the others are rounding errors
    points = values @ components[:, -2:]
    return _coverage(points, points.min(axis=0), points.max(axis=0))


def _warnings(
    dataset: Dataset,
    accidents: int,
    action_coverage: float,
    behaviours: tuple[dict[str, Any], ...],
) -> list[str]:
    """What cannot be learnt from this dataset, one sentence each."""
    batch, episodes = dataset.transitions, dataset.episodes
    found = []
    if "warning" in dataset.metadata:
        found.append(str(dataset.metadata["warning"]))
    if accidents == 0:
        found.append(
            "no accident at all: what leads to one cannot be learnt, and no estimate of the "
            "accident probability can be checked."
        )
    elif accidents < MIN_CALIBRATION_EPISODES:
        found.append(
            f"only {accidents} accident episodes, too few to calibrate the safety critic "
            f"(at least {MIN_CALIBRATION_EPISODES})."
        )
    if accidents == episodes:
        found.append("every episode has an accident: what avoids one cannot be learnt.")
    elif episodes - accidents < MIN_CALIBRATION_EPISODES:
        found.append(
            f"only {episodes - accidents} episodes without an accident, too few to calibrate the "
            f"safety critic (at least {MIN_CALIBRATION_EPISODES})."
        )
    if len(dataset.rows) < MIN_TRANSITIONS:
        found.append(
            f"only {len(dataset.rows)} transitions: enough to try the commands, too few to learn."
        )
    actions = batch.actions.numpy()
    low, high = actions.min(axis=0), actions.max(axis=0)
    found += [
        f"action {k} stays within [{low[k]:+.2f}, {high[k]:+.2f}]: nothing is known outside."
        for k in np.flatnonzero(high - low < MIN_ACTION_RANGE)
    ]
    if action_coverage < MIN_ACTION_COVERAGE:
        found.append(
            f"the actions cover {action_coverage:.0%} of their space: elsewhere estimates "
            "extrapolate."
        )
    if sum(b["episodes"] > 0 for b in behaviours) == 1:
        found.append(
            "a single behaviour logged everything: there is nothing to tell better from worse "
            "except its own noise."
        )
    if bool((batch.rewards == batch.rewards[0]).all()):
        found.append("every reward is the same: no policy is better than another.")
    inner = np.setdiff1d(np.arange(len(dataset.rows) - 1), dataset.episode_starts[1:] - 1)
    following, logged = (
        batch.observations.numpy()[inner + 1],
        batch.next_observations.numpy()[inner],
    )
    if broken := int((~np.isclose(following, logged, rtol=1e-4, atol=1e-5)).any(axis=1).sum()):
        found.append(
            f"{broken} steps within episodes do not start where the step before ended: times and "
            "returns to go are unreliable if the steps are not in order."
        )
    return found


def _floats(values: NDArray[Any]) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
