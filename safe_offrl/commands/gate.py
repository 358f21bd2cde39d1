"""The gate of finetune: whether a run may begin, and what ends one that begins on probation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from safe_offrl.assess.estimates import Estimates
from safe_offrl.commands.assess import (
    Subject,
    assessed,
    each_subject,
    limit_of,
    numbers,
    stored_estimates,
)
from safe_offrl.errors import RunError
from safe_offrl.files import unwritable
from safe_offrl.limits import Limit, quantity_named
from safe_offrl.record.final_policy import stored_policy
from safe_offrl.record.progress import Say
from safe_offrl.safety.monitor import allowance
from safe_offrl.stats.fixed import shared_confidence
from safe_offrl.train.finetune_config import FinetuneConfig


class Admission(NamedTuple):
    """What is known of the risk before the first step, and whether the run is on probation."""

    risk: str
    probation: bool


def gate(subject: Subject, *, accepted: str | None, allowed: bool, say: Say) -> Admission:
    """Whether a run may begin, and how; RunError if it must not.

    It must not where the log shows that some limit is exceeded, and where it does not show that all
    are kept, or cannot, unless a probation is ``allowed``. ``accepted`` says why the risk is taken
    as it is, None if it is not: nothing is refused then, and nothing assessed that has not been
    before.
    """
    subjects = each_subject(subject, subject.safety)
    if accepted is not None:
        known = [
            numbers(stored, limit_of(each), each.safety.confidence)
            for each in subjects
            if (stored := stored_estimates(each)) is not None
        ]
        return Admission("; ".join([accepted, *(known or ["not assessed"])]), False)
    kind = stored_policy(subject.run, subject.checkpoint).actor.kind
    if kind.density is None:
        if not allowed:
            raise RunError(
                f'The log cannot say what the policy of "{subject.run.name}" would do: one of the '
                f'kind "{kind.name}" has no density. Give an --accident-budget, or start all the '
                "same with --accept-risk."
            )
        return Admission(f'not assessed: a policy of the kind "{kind.name}" has no density', True)
    words, probation = [], False
    for each in subjects:
        limit, confidence = limit_of(each), each.safety.confidence
        # In a pretrain run that is shared, say, and not ours, all of it counts but is not stored.
        estimates = assessed(each, say, store=unwritable(each.run.path) is None)
        words.append(numbers(estimates, limit, confidence))
        if estimates.shows_below(limit, confidence):
            continue
        probation = True
        if not allowed or estimates.shows_above(limit, confidence):
            raise _refusal(each, estimates, limit, confidence)
    return Admission("; ".join(words), probation)


def _refusal(subject: Subject, estimates: Estimates, limit: float, confidence: float) -> RunError:
    quantity = quantity_named(estimates.constraint)
    option = f"limit {quantity.signal}" if quantity.signal else quantity.limit.replace("_", "-")
    allow = "" if estimates.shows_above(limit, confidence) else ", give an --accident-budget"
    return RunError(
        f'Before the first step of "{subject.run.name}": '
        f"{numbers(estimates, limit, confidence)}. "
        f"{estimates.sentence(limit, confidence)} Pretrain on better data, raise "
        f"--{option}{allow}, or start all the same with --accept-risk."
    )


def probation_lines(config: FinetuneConfig, limits: Sequence[Limit], horizon: int) -> list[str]:
    """On probation, of each limit: what of the warm-up would end the run."""
    if not config.probation:
        return []
    # The first decision comes behind the episode in which its step falls.
    steps = min(config.warmup_steps + config.iteration_steps, config.budget)
    episodes = max(1, -(-steps // horizon))
    confidence = shared_confidence(config.safety.confidence, len(limits))
    lines = []
    for limit in limits:
        allowed = allowance(limit, confidence, episodes)
        bad = limit.quantity.alarming(limit.value)
        so_many = (
            f"more than {allowed} of {episodes:,} full-length episodes {bad}, evenly spread, say"
            if allowed is not None
            else f"{episodes:,} full-length episodes are too few for that"
        )
        lines.append(
            "probation   the log does not show that every limit is kept: the run stops if the "
            f"episodes before its first decision show, at {100 * confidence:g} %, that it is above "
            f"{limit.quantity.limit_text(limit.value)} ({so_many})"
        )
    return lines
