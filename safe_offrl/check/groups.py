"""The episodes of a log in groups, and whether any group shows that the limit can be kept."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from safe_offrl.data.dataset import Dataset
from safe_offrl.limits import Limit
from safe_offrl.stats.fixed import clopper_pearson_upper, episodes_needed, mean_and_error

GROUP_CONFIDENCE = 0.95
MIN_GROUP_EPISODES = 10  # of a group, before a mean cost and its standard error mean anything


class EpisodeGroup(NamedTuple):
    """Episodes of one behaviour, or of one quarter of the returns."""

    name: str
    episodes: int
    mean_return: float
    mean_cost: float
    cost_error: float  # standard error of the mean cost; NaN for a single episode
    accident_episodes: int


class Identification(NamedTuple):
    """Whether the log itself holds a behaviour within the limit, and the sentence that says so."""

    identified: bool
    sentence: str


def group_episodes(dataset: Dataset) -> tuple[EpisodeGroup, ...]:
    """By behaviour where the file says who logged each episode, else by quarters of the return."""
    index = dataset.episode_behaviours
    if index is not None:
        names = [str(b.get("name")) for b in dataset.metadata["behaviours"]]
        members = [index == k for k in range(len(names))]
    else:
        edges = np.quantile(dataset.episode_returns, (0.25, 0.5, 0.75))
        quarter = np.searchsorted(edges, dataset.episode_returns)
        names = ["lowest returns", "second quarter", "third quarter", "highest returns"]
        members = [quarter == k for k in range(4)]
    return tuple(
        _group(name, dataset, mask) for name, mask in zip(names, members, strict=True) if mask.any()
    )


def _group(name: str, dataset: Dataset, members: NDArray[np.bool_]) -> EpisodeGroup:
    costs = dataset.episode_costs[members]
    mean, error = mean_and_error(costs)
    return EpisodeGroup(
        name=name,
        episodes=len(costs),
        mean_return=float(dataset.episode_returns[members].mean()),
        mean_cost=mean,
        cost_error=error,
        accident_episodes=int(dataset.episode_accidents[members].sum()),
    )


def identify(dataset: Dataset, groups: tuple[EpisodeGroup, ...], limit: Limit) -> Identification:
    """Whether some behaviour is within the limit with 95 % confidence (Bonferroni over groups).

    An estimate for a policy that keeps to such a behaviour is interpolation; where nobody in the
    log kept the limit it is extrapolation, however confident the critic. Quarters of the return
    are no behaviours (they are chosen by outcome): without behaviours the log counts as one.
    """
    # The lowest upper bound of the groups.
    if dataset.episode_behaviours is None:
        groups = (_group("the whole log", dataset, np.ones(dataset.episodes, dtype=bool)),)
    confidence = 1.0 - (1.0 - GROUP_CONFIDENCE) / len(groups)
    bounds = {g.name: _upper(g, limit, confidence) for g in groups}
    name = min(bounds, key=lambda k: bounds[k])
    # The sentence that says so.
    quantity = limit.quantity
    below, asked = quantity.text(bounds[name]), quantity.text(limit.value)
    if bounds[name] < limit.value:
        return Identification(
            True,
            f"yes: the {quantity.in_words} of {name!r} is below {below} at "
            f"{GROUP_CONFIDENCE:.0%}, and {asked} is asked for.",
        )
    # Advice where no group is within the limit.
    advice = "Log more episodes of a more careful behaviour"
    if limit.constraint == "accident":
        needed = episodes_needed(limit.value, confidence).fixed
        advice += f", at least {needed:,} without an accident"
    elif more := _more_to_show(next(g for g in groups if g.name == name), limit, confidence):
        advice += f", or about {more:,} more of {name!r} if they cost the same"
    return Identification(
        False,
        f"no: at {GROUP_CONFIDENCE:.0%} nobody in the log is shown to keep {asked} (closest "
        f"is {name!r}, below {below}), so an estimate there extrapolates. {advice}.",
    )


def _more_to_show(group: EpisodeGroup, limit: Limit, confidence: float) -> int:
    """Further episodes after which a mean cost like this would be below the limit; 0: none would.

    Its upper bound m + z s / sqrt(n) falls with the root of n, and MIN_GROUP_EPISODES are needed
    anyway.
    """
    room = limit.value - group.mean_cost
    if not room > 0.0 or math.isnan(group.cost_error):
        return 0
    reach = float(special.ndtri(confidence)) * group.cost_error
    needed = math.floor(group.episodes * (reach / room) ** 2) + 1  # strictly below
    return max(needed, MIN_GROUP_EPISODES) - group.episodes


def _upper(group: EpisodeGroup, limit: Limit, confidence: float) -> float:
    """Upper bound of what is limited: exact for accidents, by the normal law for a mean cost."""
    if limit.constraint == "accident":
        return clopper_pearson_upper(group.accident_episodes, group.episodes, confidence)
    if group.episodes < MIN_GROUP_EPISODES:
        return math.inf
    return group.mean_cost + float(special.ndtri(confidence)) * group.cost_error
