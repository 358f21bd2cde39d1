"""Does the log show that the guard's fallback helps? Asked before anything is handed over to it.

Its own critic says what a state costs that the fallback acts from, V(s). Held-out episodes say what
it cost whoever acted there: what was logged over a short window, and V where the window ends. The
difference is the price of having acted otherwise, and it must rise with the distance of the logged
action from the fallback's. A fallback that leads the wrong way has the opposite sign.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from safe_offrl.data.dataset import Dataset
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import Actor
from safe_offrl.safety.calibration import auroc, calibration_window, critic_demands
from safe_offrl.safety.critic import RiskEstimate, SafetyCritic
from safe_offrl.safety.outlook import Floats, accident_within
from safe_offrl.stats.fixed import standard_errors

LEVELS = 10  # of V, within which states are compared with each other


class Price(NamedTuple):
    """What a squared distance of 1 from the fallback's action costs, in the critic's unit.

    With its standard error, for which the steps of an episode are one observation.
    """

    slope: float
    error: float

    def shown(self, confidence: float) -> bool:
        """Whether it is shown to be above 0, one-sided."""
        return self.slope > standard_errors(confidence) * self.error


@torch.no_grad()
def price_of_distance(critic: SafetyCritic, fallback: Actor, held_out: Dataset) -> Price:
    """Regression of what happened, less V(s), on the distance of the logged action [N].

    Both less their means among states of about the same V: a policy that is far from the fallback's
    is also elsewhere. The error is clustered by episode (Liang and Zeger 1986).
    """
    t = held_out.transitions
    nothing = torch.zeros(1, len(t.observations), *fallback.noise_shape)
    actions = fallback(t.observations).act(nothing)[0]
    values = critic.plain_risk(t.observations, t.time_to_go, actions).numpy()
    outcome, _ = critic.outlook.within(held_out, values, calibration_window(held_out.horizon))
    edges = np.quantile(values, np.linspace(0.0, 1.0, LEVELS + 1)[1:-1])
    level = np.digitize(values, edges)
    distance = _centred((t.actions - actions).square().mean(-1).numpy(), level)
    price = _centred(outcome - values, level)
    total = float(distance @ distance)
    if not total > 0.0:
        return Price(math.nan, math.nan)  # nobody acted otherwise
    slope = float(distance @ price) / total
    scores = distance * (price - slope * distance)
    of_episodes = np.add.reduceat(scores, held_out.episode_starts[:-1])
    return Price(slope, math.sqrt(float(of_episodes @ of_episodes)) / total)


@torch.no_grad()
def guard_refusals(
    critic: SafetyCritic,
    fallback: Actor,
    held_out: Dataset,
    estimate: RiskEstimate,
    limit: Limit,
    logged: int,
    confidence: float,
) -> tuple[str, ...]:
    """Why the guard must not watch a limit, which sees ``held_out`` so; () if it may.

    ``estimate`` is of the fallback at start states: where going on with it is not affordable from
    there, as far as its critic sees, nothing in the log is, and handing over helps nobody.
    ``logged`` is the number of the log's episodes.
    """
    t = held_out.transitions
    risk = critic.plain_risk(t.observations, t.time_to_go, t.actions).numpy()
    score = auroc(risk, accident_within(held_out, calibration_window(held_out.horizon)))
    price = price_of_distance(critic, fallback, held_out)
    upper, form = estimate.upper * critic.outlook.ahead_at_one, limit.quantity.estimate_form
    demands = {
        **critic_demands(held_out, score, logged),
        "acting like its fallback is not shown to lower what follows (by "
        f"{price.slope:.2g} +- {price.error:.2g})": price.shown(confidence),
        f"its fallback is estimated at {upper:{form}} from the start, below {limit.value:g} "
        "needed": upper < limit.value,
    }
    return tuple(text for text, met in demands.items() if not met)


def _centred(values: Floats, level: np.ndarray) -> np.ndarray:
    """Less the mean of the level that each belongs to, [N] float64."""
    sums, counts = np.bincount(level, values), np.bincount(level)
    return values - (sums / np.maximum(counts, 1))[level]
