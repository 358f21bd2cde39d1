"""What can be said of a policy before its first step online, and whether that is enough.

The estimates are those of :mod:`safe_offrl.assess.fitted_evaluation`; here they become intervals, a
sentence, and a choice among policies. All of it is about the policy without its shield.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from safe_offrl.assess.estimates import Estimates
from safe_offrl.assess.fitted_evaluation import (
    Evaluation,
    bootstrap_weights,
    evaluate_fitted,
    whole_episodes,
)
from safe_offrl.assess.fitted_features import RETURN, RISK, FittedConfig, TellShare
from safe_offrl.assess.importance_sampling import Weighted, weighted
from safe_offrl.data.dataset import Dataset
from safe_offrl.errors import DataError
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import Actor
from safe_offrl.policies.protocol import require_density

MOST_ROWS = 200_000  # transitions, about: more of them say little more and take long
FEWEST_EPISODES = 20


def assess_policy(
    dataset: Dataset,
    actor: Actor,
    limit: Limit,
    config: FittedConfig,
    seed: int = 0,
    progress: TellShare = lambda _: None,
) -> Estimates:
    """Everything that the log says of a policy; minutes at most, ``progress`` is kept informed.

    ``dataset`` as the policy sees it (normalised). DataError if it has too few episodes,
    ConfigError for a policy without a density.
    """
    # What cannot be assessed.
    require_density(actor.kind, "The comparison of logged actions with the policy's")
    if dataset.episodes < FEWEST_EPISODES:
        raise DataError(
            f"The dataset has {dataset.episodes} episodes, too few to assess a policy from. "
            f"Log at least {FEWEST_EPISODES - dataset.episodes} more."
        )
    # Episodes that are assessed.
    logged, return_range = dataset.episodes, dataset.return_range
    dataset = dataset.sample(MOST_ROWS, seed).under(limit)
    # Of an episode that was cut off there is nothing to reweigh.
    known = dataset.behaviour_log_probs is not None and bool(whole_episodes(dataset).all())
    # Fitted Q evaluation.
    evaluation = evaluate_fitted(
        dataset, actor, limit, config, seed, with_q=known, progress=progress
    )
    # Reweighed episodes, where the log says how likely its own actions were.
    found: tuple[Weighted | None, Weighted | None] = (None, None)
    if known:
        found = _reweighed(dataset, actor, limit, evaluation, config.replicates, seed)
    return Estimates(
        constraint=limit.constraint,
        scale=limit.scale,
        episodes=dataset.episodes,
        risk=evaluation.risk,
        returns=evaluation.returns,
        support=support(dataset, actor, seed),
        weighted_risk=found[RISK],
        weighted_return=found[RETURN],
        whole=dataset.episodes == logged,
        return_range=return_range,
    )


@torch.no_grad()
def support(dataset: Dataset, actor: Actor, seed: int, rows: int = 20_000) -> float:
    """Share of logged actions that are such as the policy takes at the same observation.

    Within the ellipsoid that holds 95 % of its Gaussian's actions, of a mixture that of a component
    with a weight of 5 % at least; of discrete ones, with a probability of 5 % at least.
    Extrapolation begins where this ends.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(dataset.rows), (rows,), generator=generator)
    batch = dataset.layout.unpack(dataset.rows[index])
    return float(actor.density(batch.observations).typical(batch.actions).float().mean())


@torch.no_grad()
def _reweighed(
    dataset: Dataset, actor: Actor, limit: Limit, evaluation: Evaluation, replicates: int, seed: int
) -> tuple[Weighted, Weighted]:
    """Weighted importance sampling and doubly robust estimates of risk and return."""
    assert dataset.behaviour_log_probs is not None
    assert evaluation.q_values is not None
    batch = dataset.transitions
    ratios = actor.density(batch.observations).log_prob(batch.actions).double().numpy()
    ratios = ratios - dataset.behaviour_log_probs
    accidents = batch.accidents.double().numpy()
    before = np.zeros(len(accidents), dtype=bool)  # It is true after an accident.
    for first, end in zip(dataset.episode_starts[:-1], dataset.episode_starts[1:], strict=True):
        before[first:end] = np.cumsum(accidents[first:end]) > accidents[first:end]
    weights = bootstrap_weights(replicates, dataset.episodes, np.random.default_rng(seed)).numpy()
    q, v = (x.numpy() for x in evaluation.q_values)
    risk = limit.quantity.select(accidents, batch.costs.double().numpy())
    # Once it has happened, an accident is over and done with: nothing that follows matters to it.
    counts = ~before if limit.quantity.until_accident else np.ones_like(before)
    starts = dataset.episode_starts
    return (
        weighted(
            risk / limit.scale * counts,
            ratios * counts,
            q[RISK] * counts,
            v[RISK] * counts,
            starts,
            weights,
        ),
        weighted(batch.rewards.double().numpy(), ratios, q[RETURN], v[RETURN], starts, weights),
    )


def choose_policy(
    candidates: Mapping[str, Estimates], limits: Mapping[str, tuple[float, float]]
) -> tuple[str, bool]:
    """(name, whether it qualifies) of the policy to go on with; costs no accident.

    Of those that the log shows below their limit (``limits``: limit and confidence) the one with
    the highest lower bound of return; if there is none, the one with the lowest upper limit of
    risk, as a share of its limit, those without doubts first.
    """
    shown = {
        name: found.return_interval(limits[name][1])[0]
        for name, found in candidates.items()
        if found.shows_below(*limits[name])
    }
    if shown:
        return max(shown, key=lambda name: shown[name]), True

    def rank(name: str) -> tuple[bool, float]:
        limit, confidence = limits[name]
        return bool(candidates[name].doubts), candidates[name].risk_upper(confidence) / limit

    return min(candidates, key=rank), False
