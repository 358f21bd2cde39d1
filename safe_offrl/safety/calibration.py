"""Is the safety critic to be trusted? Judged on held-out episodes, before anything acts.

The critic speaks of the new policy, the log of the old ones, so outcomes are compared over a short
window: "accident within the next W logged steps" (or the cost of these steps), continued by the
critic's own value where the window ends (a W-step return). Over so few steps the logged action
decides, not who acts afterwards.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from safe_offrl.data.dataset import Dataset
from safe_offrl.limits import Limit, quantity_named
from safe_offrl.policies.networks import Actor
from safe_offrl.safety.critic import RiskEstimate, SafetyCritic
from safe_offrl.safety.outlook import Floats, accident_within
from safe_offrl.stats.fixed import clopper_pearson, fewest
from safe_offrl.stats.reliability import Bin, reliability_bins

STEPS_AT_ONCE = 10_000  # steps at a time: a policy may have many actions to be averaged over
CONTRASTS = 201  # that a report keeps: a long log has thousands
WINDOW_SHARE = 0.05  # of the horizon: how long a logged action is held responsible
# So many are needed among those held out: fewer leave a calibration to chance.
MIN_HELD_OUT_EPISODES = 10
NO_FALLBACK = "nothing was learnt to fall back to"
# What the shield needs before it may act, beside MIN_HELD_OUT_EPISODES with an accident, each with
# the reason it is refused for.
MIN_AUROC = 0.8
MIN_RANKING = 0.5  # of the lower 95 % limit: shown to be better than chance


@dataclass(frozen=True)
class CalibrationReport:
    """What held-out episodes say of the safety critic.

    ``reliability``: (mean prediction, mean outcome, transitions) per bin; ``ece`` its weighted mean
    gap. ``auroc`` and ``ranking`` are shares of correctly ordered pairs: of any two transitions,
    and of two actions at (nearly) one state, the comparison a shield makes; ``contrasts`` are what
    the critic's plain members make of these ``ranking_pairs``, the risk of the dangerous action
    less that of the other, by size; of many pairs the CONTRASTS quantiles. The estimates are of
    what ``constraint`` names: V_accident(s0), or the expected cost per episode. ``bins`` are the
    curve of the figure.
    """

    episodes: int
    accident_episodes: int
    auroc: float
    ranking: float
    ranking_low: float
    ranking_pairs: int
    contrasts: tuple[float, ...]
    reliability: tuple[tuple[float, float, int], ...]
    ece: float
    constraint: str
    limit: float
    estimate: float
    estimate_upper: float
    estimate_plain_td: float
    behaviour_accident_rate: float
    behaviour_cost: float
    shield_refusals: tuple[str, ...]
    bins: tuple[Bin, ...]
    guard_refusals: tuple[str, ...] = (NO_FALLBACK,)

    @property
    def shield_acts(self) -> bool:
        """Whether the shield may act; if not it must abstain."""
        return not self.shield_refusals

    def __str__(self) -> str:
        """The report as a person reads it."""
        shield, guard = (
            "abstains: " + "; ".join(refusals) if refusals else "allowed"
            for refusals in (self.shield_refusals, self.guard_refusals)
        )
        quantity = quantity_named(self.constraint)
        form = quantity.estimate_form
        return "\n".join(
            [
                f"calibration {self.episodes} held-out episodes, {self.accident_episodes} with an "
                f"accident ({self.behaviour_accident_rate:.1%}), "
                f"{quantity.cost} {self.behaviour_cost:.3g} "
                "each",
                f"{quantity.short_name:<12}"
                f"{self.estimate:{form}} per episode for the new policy (upper estimate "
                f"{self.estimate_upper:{form}}, plain TD {self.estimate_plain_td:{form}})",
                f"{'':<12}the safety critic's own view, which learning steers by; what to expect, "
                "and how sure that is, says `safe-offrl assess`",
                f"critic      AUROC {self.auroc:.2f}, expected calibration error {self.ece:.3f}, "
                f"ranking among actions {self.ranking:.2f} (at least {self.ranking_low:.2f})",
                f"shield      {shield}",
                f"guard       {guard}",
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able content of the report file."""
        return asdict(self)


def auroc(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Probability that a positive scores above a negative, ties counted half; NaN without both.

    The Mann-Whitney statistic: (sum of the positives' mid-ranks - n(n+1)/2) / (n m).
    """
    n, m = int(positive.sum()), int((~positive).sum())
    if n == 0 or m == 0:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mid_ranks = np.cumsum(counts) - 0.5 * (counts - 1)
    return float((mid_ranks[inverse][positive].sum() - 0.5 * n * (n + 1)) / (n * m))


@torch.no_grad()
def calibrate_critic(
    critic: SafetyCritic,
    actor: Actor,
    held_out: Dataset,
    estimate: RiskEstimate,
    limit: Limit,
    logged: int,
) -> CalibrationReport:
    """Judge the critic on held-out episodes, and whether a shield may act on it.

    ``held_out`` is as the limit sees it. ``logged`` is the number of all episodes of the log: of
    what is missing so much more is to be logged as a share of it is held out.
    """
    # What the critic says of the held-out steps, and what followed them.
    t = held_out.transitions
    risk = critic.risk(t.observations, t.time_to_go, t.actions).numpy()
    noise = actor.noise(t.actions.shape[:-1], torch.Generator().manual_seed(0))
    parts = (x.split(STEPS_AT_ONCE) for x in (t.observations, t.time_to_go, noise))
    values = torch.cat([critic.risk_under(actor, *part) for part in zip(*parts, strict=True)])
    window = calibration_window(held_out.horizon)
    danger = accident_within(held_out, window)
    outcomes, seen = critic.outlook.within(held_out, values.numpy(), window)
    reliability, ece = _reliability(risk, outcomes)
    # Ranking of actions at one state, and of all transitions.
    contrasts = _contrasts(critic, held_out, danger)
    concordant, pairs = int((contrasts > 0.0).sum()), len(contrasts)
    ranking_low = clopper_pearson(concordant, pairs, 0.9)[0] if pairs else 0.0
    score = auroc(risk, danger)
    # Demands that the shield needs met; a NaN meets none of them.
    accident_episodes = int(held_out.episode_accidents.sum())
    told_by = int(held_out.dangerous_episodes.sum()) * logged / held_out.episodes
    demands = {
        **critic_demands(held_out, score, logged),
        f"ranking among actions is {ranking_low:.2f} at least, above {MIN_RANKING} needed"
        + _more_to_rank(concordant, pairs, told_by, _danger(held_out)): (ranking_low > MIN_RANKING),
    }
    # The report, in the unit of the limit.
    episode = np.repeat(np.arange(held_out.episodes), held_out.episode_lengths)
    return CalibrationReport(
        episodes=held_out.episodes,
        accident_episodes=accident_episodes,
        auroc=score,
        ranking=concordant / pairs if pairs else float("nan"),
        ranking_low=ranking_low,
        ranking_pairs=pairs,
        contrasts=tuple(_by_size(contrasts).tolist()),
        reliability=reliability,
        ece=ece,
        constraint=limit.constraint,
        limit=limit.value,
        estimate=estimate.value * limit.scale,
        estimate_upper=estimate.upper * limit.scale,
        estimate_plain_td=estimate.reference * limit.scale,
        behaviour_accident_rate=float(held_out.episode_accidents.mean()),
        behaviour_cost=float(held_out.episode_costs.mean()),
        shield_refusals=tuple(text for text, met in demands.items() if not met),
        bins=reliability_bins(risk, outcomes, seen, episode),
    )


def critic_demands(held_out: Dataset, score: float, logged: int) -> dict[str, bool]:
    """What a critic needs before anything acts on it, in words, and whether it is met.

    ``score`` is its AUROC; ``logged`` are the episodes of the log.
    """
    found, danger = int(held_out.dangerous_episodes.sum()), _danger(held_out)
    missing = max(0, MIN_HELD_OUT_EPISODES - found)
    more = -(-missing * logged // held_out.episodes)
    return {
        f"{found} held-out {danger.removeprefix('an ')} episodes, {MIN_HELD_OUT_EPISODES} needed "
        f"(log about {more:,} more episodes with {danger})": not missing,
        f"AUROC {score:.2f}, {MIN_AUROC} needed": score >= MIN_AUROC,
    }


def _danger(dataset: Dataset) -> str:
    """What is dangerous in a log as a limit sees it, in words."""
    signal = dataset.layout.limited
    return f"high {signal} cost" if signal else "an accident"


def calibration_window(horizon: int) -> int:
    """Over how many steps outcomes are compared, W."""
    return max(1, round(WINDOW_SHARE * horizon))


def _more_to_rank(
    right: int, pairs: int, accident_episodes: float, danger: str = "an accident"
) -> str:
    """How many more of the log's ``accident_episodes`` would show a ranking like this, in words.

    "" where none would: right in half of the pairs, or in fewer.
    """
    if 2 * right <= pairs:
        return ""
    enough = fewest(2 * pairs, lambda n: _shows_ranking(right * n // pairs, n))
    more = math.ceil((enough / pairs - 1.0) * accident_episodes)
    return f" (log about {more:,} more episodes with {danger}, if {right / pairs:.2f} holds)"


def _shows_ranking(right: int, pairs: int) -> bool:
    return clopper_pearson(right, pairs, 0.9)[0] > MIN_RANKING


def _reliability(
    predicted: Floats, outcome: Floats
) -> tuple[tuple[tuple[float, float, int], ...], float]:
    bins = np.minimum((predicted * 10).astype(int), 9)
    rows = tuple(
        (float(predicted[b].mean()), float(outcome[b].mean()), int(b.sum()))
        for b in (bins == i for i in range(10))
        if b.any()
    )
    return rows, float(sum(n * abs(p - o) for p, o, n in rows) / len(predicted))


def _by_size(contrasts: Floats) -> Floats:
    """Sorted, and no more than CONTRASTS of them."""
    if len(contrasts) <= CONTRASTS:
        return np.sort(contrasts)
    return np.quantile(contrasts, np.linspace(0.0, 1.0, CONTRASTS)).astype(np.float32)


def _contrasts(critic: SafetyCritic, held_out: Dataset, danger: NDArray[np.bool_]) -> Floats:
    """Risk of dangerous actions less that of others at the SAME observations, [P].

    Each dangerous transition is paired with the safe transition whose observation is nearest
    (standardised distance, the nearer half of the pairs kept) and whose action differs clearly.
    """
    t = held_out.transitions
    spread, centre = torch.std_mean(t.observations, dim=0)
    standardised = (t.observations - centre) / (spread + 1e-6)
    bad, good = torch.from_numpy(np.flatnonzero(danger)), torch.from_numpy(np.flatnonzero(~danger))
    if not len(bad) or not len(good):
        return np.zeros(0, dtype=np.float32)
    chunks, others = standardised[bad].split(256), standardised[good]
    nearest = [torch.cdist(chunk, others).min(dim=1) for chunk in chunks]
    distance = torch.cat([x.values for x in nearest])
    partner = good[torch.cat([x.indices for x in nearest])]
    differs = (t.actions[bad] - t.actions[partner]).norm(dim=-1) > 0.25
    keep = differs & (distance <= distance.median())
    bad, partner = bad[keep], partner[keep]
    mine = critic.plain_risk(t.observations[bad], t.time_to_go[bad], t.actions[bad])
    other = critic.plain_risk(t.observations[bad], t.time_to_go[bad], t.actions[partner])
    return (mine - other).numpy()
