"""Certificates: what a frozen policy's own episodes prove, written so that others can check it.

Policy, shield and guard are frozen, their accident probability p is one number, and the episodes
are independent draws. Either their number is fixed beforehand and there is one look at the end
(Clopper-Pearson: two one-sided bounds, each by itself), or one looks after every episode and stops
as soon as the answer is known (the beta-binomial sequence, an interval that allows for that). The
k-th attempt on one run gets the share 6 / (pi^2 k^2) of the error: whoever tries until it works has
used up what the confidence allows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from safe_offrl.check.situations import Situations
from safe_offrl.deploy.episodes import Reservation, distinct, play_episode
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.adapter import AccidentEnv, episode_seed
from safe_offrl.errors import ConfigError
from safe_offrl.limits import quantity_named
from safe_offrl.stats.anytime import betabinomial_sequence
from safe_offrl.stats.fixed import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    episodes_needed,
    error_share,
)
from safe_offrl.types import Episode

ClaimMethod = Literal["one look", "anytime"]
CLAIM_METHODS: dict[str, str] = {
    "one look": "Clopper-Pearson, one look at a number of episodes fixed beforehand",
    "anytime": "anytime-valid beta-binomial sequence, a look after every episode",
}
CERTIFICATE_FORMAT = 1
CERTIFICATES = "certificates"  # the folder in a run's; each attempt has one in it, with these files
CLAIM, CERTIFICATE, PAGE = "claim.json", "certificate.json", "certificate.html"
RECORD = "episodes.jsonl"


@dataclass(frozen=True)
class Claim:
    """What is to be shown: ``quantity`` < ``limit``, both as a share of ``scale``.

    ``quantity`` is "accident" (the probability of an episode with at least one accident, scale 1),
    "cost" (the expected cost of an episode; scale is the largest it can be), or the name of a cost
    signal (likewise). ``episodes`` is their number ("one look") or the most there will be
    ("anytime"). ``shares`` are the claims of one certificate, between which the error is divided:
    all of them hold with ``confidence``.
    """

    quantity: str
    limit: float
    scale: float
    confidence: float
    method: ClaimMethod
    episodes: int
    seed: int
    attempt: int = 1
    shares: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be shown."""
        quantity_named(self.quantity)
        if not 0.0 < self.limit < self.scale:
            raise ConfigError(
                f"The limit is {self.limit:g}, but a number strictly between 0 and {self.scale:g} "
                "can be certified. Correct it."
            )
        if not 0.5 <= self.confidence < 1.0:
            raise ConfigError(
                f"The confidence is {self.confidence:g}, but a number in [0.5, 1) is needed. "
                "Try 0.95."
            )
        if self.episodes < 1:
            raise ConfigError(f"{self.episodes} episodes show nothing. Ask for at least 1.")
        if self.shares < 1 or self.attempt < 1:
            raise ConfigError(
                f"A claim of attempt {self.attempt} that shares the error between {self.shares} is "
                "none. Both begin at 1."
            )
        if self.method == "one look" and self.quantity != "accident":
            raise ConfigError(
                "A fixed number of episodes certifies accidents, which happen or do not, but not "
                "a cost. Leave --episodes out, or give --epsilon alone."
            )

    @property
    def attempt_confidence(self) -> float:
        """Confidence of this attempt alone; all attempts together are at ``confidence``.

        Of several claims it is that of this one.
        """
        return 1.0 - error_share(self.confidence, self.attempt) / self.shares

    @property
    def stream(self) -> str:
        """Name of the stream of seeds: every attempt has episodes of its own."""
        return f"certify-{self.attempt}"


def episodes_without_accident(claim: Claim) -> int:
    """Fewest episodes, none of them with an accident or a cost, that certify the claim."""
    needed = episodes_needed(claim.limit / claim.scale, claim.attempt_confidence)
    return needed.anytime if claim.method == "anytime" else needed.fixed


class Finding(NamedTuple):
    """What so many episodes show of a claim, in the claim's unit."""

    verdict: str  # "certified", "refuted" or "undecided"
    lower: float
    upper: float


def judge(claim: Claim, total: float, episodes: int) -> Finding:
    """Bounds after ``episodes`` whose outcomes (1 for an accident, or cost / scale) sum to this.

    "certified" is wrong with probability at most 1 - confidence, whatever the truth, and so is
    "refuted". Both bounds of "anytime" hold together, at every look, with the attempt's confidence.
    Of "one look" each bound has it by itself: that one of the two is wrong may be twice as probable
    as either. A fixed number of episodes says nothing before it is reached.
    """
    if claim.method == "anytime":
        lower, upper = betabinomial_sequence(total, episodes, claim.attempt_confidence)
    elif episodes < claim.episodes:
        lower, upper = 0.0, 1.0
    else:
        lower = clopper_pearson_lower(int(total), episodes, claim.attempt_confidence)
        upper = clopper_pearson_upper(int(total), episodes, claim.attempt_confidence)
    lower, upper = lower * claim.scale, upper * claim.scale
    verdict = "certified" if upper < claim.limit else "refuted" if lower > claim.limit else ""
    return Finding(verdict or "undecided", lower, upper)


def bounds_in_words(claim: Claim, finding: Finding) -> str:
    """Both bounds: an interval only where they hold together, see :func:`judge`."""
    lower, upper = f"{finding.lower:.4g}", f"{finding.upper:.4g}"
    if claim.method == "anytime":
        return f"[{lower}, {upper}]"
    return f"at least {lower}, at most {upper} (one-sided bounds, each by itself)"


def contribution(claim: Claim, episode: Episode) -> float:
    """What an episode contributes, in [0, 1].

    ConfigError if it cost more than an episode can: nothing could be certified then.
    """
    value = quantity_named(claim.quantity).of_episode(episode)
    if value > claim.scale:  # The scale of accidents is 1.
        raise ConfigError(
            f"Episode {episode.index} cost {value:g}, but the log says that none costs more "
            f"than {claim.scale:g}, so its mean cannot be certified. Log such episodes first."
        )
    return value / claim.scale


def joint_verdict(findings: Iterable[Finding]) -> str:
    """Of all claims together: certified if each is, refuted if one is."""
    verdicts = {finding.verdict for finding in findings}
    if "refuted" in verdicts:
        return "refuted"
    return "certified" if verdicts == {"certified"} else "undecided"


def totals_of(claims: Sequence[Claim], episodes: Sequence[Episode]) -> list[float]:
    """The sum of the outcomes of episodes, of each claim."""
    return [math.fsum(contribution(claim, episode) for episode in episodes) for claim in claims]


def judge_all(claims: Sequence[Claim], totals: Sequence[float], episodes: int) -> list[Finding]:
    """What so many episodes show of each claim; see :func:`judge`."""
    return [judge(claim, total, episodes) for claim, total in zip(claims, totals, strict=True)]


def finished(claims: Sequence[Claim], totals: Sequence[float], episodes: int) -> bool:
    """Whether no further episode is to be played."""
    if episodes >= claims[0].episodes:
        return True
    verdict = joint_verdict(judge_all(claims, totals, episodes))
    return claims[0].method == "anytime" and verdict != "undecided"


def play(
    claim: Claim,
    index: int,
    env: AccidentEnv,
    policy: DeployedPolicy,
    steps_before: int,
    worst_cost: float,
    worst_signals: Mapping[str, float],
) -> tuple[Episode, str]:
    """The ``index``-th episode of a claim, and how the environment failed in it ("" if not).

    Its seed and its noise depend on nothing else. If the environment fails it costs ``worst_cost``,
    and in each signal what ``worst_signals`` say.
    """
    seed = episode_seed(claim.seed, index, claim.stream)
    rng = np.random.default_rng([claim.seed, claim.attempt, index])
    played = play_episode(env, policy, seed, rng)
    episode = played.recorded(
        index=index,
        seed=seed,
        steps_before=steps_before,
        worst_cost=worst_cost,
        worst_signals=worst_signals,
        version=policy.version,
        phase="certify",
        content=played.content,
    )
    return episode, played.fault


def reserve(
    claim: Claim,
    index: int,
    env: AccidentEnv,
    policy: DeployedPolicy,
    steps_before: int,
    worst_cost: float,
    worst_signals: Mapping[str, float],
) -> Reservation:
    """What the ``index``-th episode counts as if it is cut off where none can be played again."""
    return Reservation.for_episode(
        index=index,
        seed=episode_seed(claim.seed, index, claim.stream),
        steps=env.horizon,
        steps_before=steps_before,
        worst_cost=worst_cost,
        worst_signals=worst_signals,
        version=policy.version,
        phase="certify",
    )


# --- the certificate --------------------------------------------------------------------------


def make_certificate(
    claims: Sequence[Claim],
    episodes: Iterable[Episode],
    record: bytes,
    subject: Mapping[str, Any],
    situations: Situations | None = None,
) -> dict[str, Any]:
    """The content of certificate.json, not yet :func:`sealed`.

    ``record`` are the bytes of episodes.jsonl; ``subject`` says what was certified: "policy",
    "shield", "guard", "environment", "versions" and "created", all JSON-able. ``situations`` is
    what is known of the environment's seeds, None where none can be tried. Of the first of several
    ``claims`` it says the same as of a single one; "verdict" is of all, and "further" holds the
    others.
    """
    # What the episodes show.
    episodes = list(episodes)
    totals = totals_of(claims, episodes)
    findings = judge_all(claims, totals, len(episodes))
    claim, total, finding = claims[0], totals[0], findings[0]
    further = [
        {"claim": asdict(c), "total_outcome": t, **f._asdict()}
        for c, t, f in zip(claims[1:], totals[1:], findings[1:], strict=True)
    ]
    # Content.
    return {
        "format": CERTIFICATE_FORMAT,
        "verdict": joint_verdict(findings),
        "claim": asdict(claim),
        "method": CLAIM_METHODS[claim.method],
        "attempt_confidence": claim.attempt_confidence,
        "episodes": len(episodes),
        "distinct_episodes": len(distinct(episodes)),
        "situations": situations and situations.as_dict(),
        "accidents": sum(episode.accident for episode in episodes),
        "unknown_outcomes": sum(episode.outcome != "complete" for episode in episodes),
        "total_outcome": total,
        "lower": finding.lower,
        "upper": finding.upper,
        **({"further": further} if further else {}),
        "steps": sum(episode.steps for episode in episodes),
        "shield_interventions": sum(episode.shield_interventions for episode in episodes),
        "guarded_steps": sum(episode.guarded_steps for episode in episodes),
        "record_sha256": hashlib.sha256(record).hexdigest(),
        "does_not_cover": [
            "any other policy: a further gradient step makes another one",
            "another shield, guard, environment, version or distribution of start states",
            *([f"other situations: {situations}"] if situations and situations.few else []),
            "changes of the environment after these episodes: wear, weather, other people",
            "accidents that the accident rule does not see",
        ],
        **subject,
    }


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with its own hash, which covers everything else in it."""
    return {**content, "sha256": content_sha256(content)}


def content_sha256(content: Mapping[str, Any]) -> str:
    """Hash of everything in a certificate but the hash itself."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()
