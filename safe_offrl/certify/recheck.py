"""Check a certificate again: its hash, its arithmetic, its page and its record."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from safe_offrl.certify.certificate import (
    Claim,
    bounds_in_words,
    content_sha256,
    joint_verdict,
    judge_all,
    totals_of,
)
from safe_offrl.deploy.episodes import distinct
from safe_offrl.env.adapter import episode_seed
from safe_offrl.errors import ConfigError
from safe_offrl.record.ledger import parse_ledger


class Recheck(NamedTuple):
    """One thing that was checked again."""

    name: str
    passed: bool
    detail: str


def recheck(
    certificate: Mapping[str, Any], record: bytes | None, where: str, page: bytes | None = None
) -> list[Recheck]:
    """Check a certificate's own hash, its arithmetic and, if they are there, page and record.

    A certificate of an earlier version holds no hash of its page, which is not checked then. Raises
    ConfigError if it is not a certificate at all, RunError if the record is damaged.
    """
    # What the certificate states.
    try:
        parts = [certificate, *certificate.get("further", [])]
        claims = [Claim(**part["claim"]) for part in parts]
        findings = judge_all(
            claims, [part["total_outcome"] for part in parts], certificate["episodes"]
        )
        verdicts = [certificate["verdict"], *(part["verdict"] for part in parts[1:])]
        bounds = [(part["lower"], part["upper"]) for part in parts]
        sound = content_sha256(certificate) == certificate["sha256"]
        record_sha256 = certificate["record_sha256"]
        counts = certificate["episodes"], certificate["accidents"]
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where} is no certificate of safe-offrl ({error!r}).") from error
    # Content and arithmetic.
    same = all(
        math.isclose(a, b, rel_tol=1e-9)
        for stated, finding in zip(bounds, findings, strict=True)
        for a, b in zip(stated, finding[1:], strict=True)
    )
    verdict = joint_verdict(findings)
    same &= verdicts == [verdict, *(finding.verdict for finding in findings[1:])]
    checks = [
        Recheck("content", sound, "the file is as it was written" if sound else "it was changed"),
        Recheck(
            "arithmetic",
            same,
            f"{verdict}, "
            + " and ".join(bounds_in_words(*both) for both in zip(claims, findings, strict=True)),
        ),
    ]
    if len(claims) > 1 or claims[0].shares > 1:
        checks.append(_belong_together(claims))
    # Page.
    if page is not None and "page_sha256" in certificate:
        shown = hashlib.sha256(page).hexdigest() == certificate["page_sha256"]
        detail = "is as it was written" if shown else "was changed, or belongs to another one"
        checks.append(Recheck("page", shown, f"the page beside it {detail}"))
    # Record.
    if record is None:
        return checks
    intact = hashlib.sha256(record).hexdigest() == record_sha256
    played = parse_ledger(record, where).counted
    totals = totals_of(claims, played)
    seen = len(played), sum(episode.accident for episode in played)
    different = len(distinct(played))
    counted = seen == counts and different == certificate.get("distinct_episodes", different)
    sums_of = {
        name: sum(getattr(episode, name) for episode in played)
        for name in ("steps", "shield_interventions", "guarded_steps")
    }
    counted &= all(certificate.get(name, value) == value for name, value in sums_of.items())
    counted &= all(
        math.isclose(total, part["total_outcome"], rel_tol=1e-12)
        for total, part in zip(totals, parts, strict=True)
    )
    claim, sums = claims[0], " and ".join(f"{total:g}" for total in totals)
    seeds = all(e.seed == episode_seed(claim.seed, e.index, claim.stream) for e in played)
    return [
        *checks,
        Recheck("record", intact, f"{len(played)} episodes"),
        Recheck("counts", counted, f"{seen[1]} with an accident, outcomes sum to {sums}"),
        Recheck("seeds", seeds, f'stream "{claim.stream}" of seed {claim.seed}'),
    ]


def _belong_together(claims: Sequence[Claim]) -> Recheck:
    """Whether several claims share one error, one attempt and its episodes."""
    common = {(c.confidence, c.method, c.episodes, c.seed, c.attempt, c.shares) for c in claims}
    different = len({claim.quantity for claim in claims}) == len(claims)
    fits = len(common) == 1 and different and claims[0].shares == len(claims)
    return Recheck("claims", fits, f"{len(claims)} of one attempt, which share its error")
