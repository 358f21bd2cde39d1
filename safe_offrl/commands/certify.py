"""Certify a run's final policy."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

from safe_offrl.certify.certificate import (
    CERTIFICATE,
    CERTIFICATES,
    CLAIM,
    CLAIM_METHODS,
    PAGE,
    RECORD,
    Claim,
    contribution,
    episodes_without_accident,
    finished,
    joint_verdict,
    judge,
    judge_all,
    make_certificate,
    play,
    reserve,
    sealed,
    totals_of,
)
from safe_offrl.certify.page import page, quantity, seen, summary
from safe_offrl.check.situations import Situations, find_situations, require_situations
from safe_offrl.commands.common import say_plain
from safe_offrl.commands.environment import changed_line, since_run
from safe_offrl.commands.given_limits import Limits, limits_by_name
from safe_offrl.deploy.episodes import distinct, faults_in_a_row
from safe_offrl.env.identity import KEY
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.files import json_bytes, write_atomic
from safe_offrl.limits import ACCIDENT, quantity_named
from safe_offrl.record.final_policy import FinalPolicy, final_policy
from safe_offrl.record.find_run import find_run
from safe_offrl.record.ledger import LedgerWriter
from safe_offrl.record.progress import (
    STOP_SECONDS,
    Interrupted,
    ProgressLine,
    Say,
    StopNow,
    StopSignal,
)
from safe_offrl.record.run import RunDir
from safe_offrl.record.subject import subject_of
from safe_offrl.types import Episode

MOST_EPISODES = 10_000  # of a claim that is looked at after every episode


def certify_run(
    run_name: str | Path,
    *,
    confidence: float | None = None,
    episodes: int | None = None,
    seed: int = 0,
    runs: str | Path = "runs",
    say: Say = say_plain,
    **limits: Unpack[Limits],
) -> dict[str, Any]:
    """Play a run's final policy, behind shield and guard, until the claim is settled; certificate.

    Writes ``certificates/<attempt>/`` into the run folder: the claim before the first episode, each
    episode as it ends, certificate.json and a page. An attempt that was interrupted is continued by
    the same call for the same policy, shield and environment; any other call is a further attempt,
    and pays for it. ConfigError where every seed of the environment plays the same episode.
    """
    # A finished run that can be written to.
    run = find_run(run_name, Path(runs))
    if run.state["status"] != "finished":
        raise RunError(
            f'The run "{run.name}" is not finished. Finish it with '
            f"`safe-offrl {run.kind} --resume {run.path}`."
        )
    run.require_writable(
        "A certificate lies beside the attempts before it, which count: repair that, or copy the "
        "run to a folder of yours."
    )
    run.lock()
    with run:
        # Claim, subject and situations.
        final = final_policy(run)
        with contextlib.closing(final.env):
            claims = _claims(final, limits, confidence, episodes, seed)
            subject = subject_of(final)
            situations = None  # On a real machine every episode is on record.
            if final.environment.kind != "real":
                with _stopped_before_it_began():
                    situations = find_situations(final.env)
                require_situations(final.env.env_id, situations)
            # Attempt and its episodes.
            claims, folder = _attempt(run, claims, _attempt_facts(subject), say)
            say(_header(final, claims, situations))
            for line in changed_line(
                f"that of {run.name}", since_run(run, subject["environment"][KEY])
            ):
                say(line)
            played = _play(final, claims, folder / RECORD, say)
        # Certificate and page.
        _require_distinct(claims, played, situations, str(folder / RECORD))
        record = (folder / RECORD).read_bytes()
        content = make_certificate(claims, played, record, subject, situations)
        shown = page(content).encode()
        certificate = sealed({**content, "page_sha256": hashlib.sha256(shown).hexdigest()})
        write_atomic(folder / PAGE, shown)
        write_atomic(folder / CERTIFICATE, json_bytes(certificate))  # Its file ends the attempt.
    say(f"{summary(certificate)}\n{folder / CERTIFICATE}\n{folder / PAGE}")
    return certificate


def _claims(
    final: FinalPolicy, limits: Limits, confidence: float | None, episodes: int | None, seed: int
) -> tuple[Claim, ...]:
    """What was asked for; all the run's own limits if nothing was."""
    safety = final.safety
    asked = {quantity_named(name): value for name, value in limits_by_name(limits).items()}
    own = {limit.quantity: limit for limit in final.limits}
    if any(quantity is not ACCIDENT and quantity not in own for quantity in asked):
        kept = "accidents" if set(own) == {ACCIDENT} else " and ".join(final.safety.bounds)
        raise ConfigError(
            f"The run constrains {kept}, and how much an episode can cost is not known. "
            f"Give {'--epsilon' if kept == 'accidents' else 'limits of the same'}."
        )
    wanted = asked or {quantity: limit.value for quantity, limit in own.items()}
    return tuple(
        Claim(
            quantity=quantity.constraint,
            limit=value,
            scale=own[quantity].scale if quantity in own else 1.0,
            confidence=safety.confidence if confidence is None else confidence,
            method="anytime" if episodes is None else "one look",
            episodes=MOST_EPISODES if episodes is None else episodes,
            seed=seed,
            shares=len(wanted),
        )
        for quantity, value in wanted.items()
    )


def _attempt_facts(subject: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for an attempt to go on, besides the claim: all that p depends on."""
    return {
        "policy_sha256": subject["policy"]["sha256"],
        "shield_sha256": subject["shield"]["sha256"],
        **({"guard_sha256": found} if (found := subject["guard"].get("sha256")) else {}),
        "environment": subject["environment"],
        "environment_versions": subject["versions"]["environment"],
    }


def _attempt(
    run: RunDir, claims: tuple[Claim, ...], identity: dict[str, Any], say: Say
) -> tuple[tuple[Claim, ...], Path]:
    """The attempt that was interrupted, if it is this one; else a new one, its claims on disk.

    A new one has the number after the highest, so that no number before that is used twice.
    """
    # Attempts before this one.
    folders = {int(p.name): p for p in (run.path / CERTIFICATES).glob("*") if p.name.isdecimal()}
    first, *further = (dataclasses.asdict(claim) for claim in claims)
    asked = {**first, **({"further": further} if further else {}), **identity}
    differing: dict[int, list[str]] = {}  # It says what unfinished ones have otherwise.
    # An interrupted one that is this one.
    for number, folder in folders.items():
        if (folder / CLAIM).is_file() and not (folder / CERTIFICATE).is_file():
            stored = {"shares": 1, **json.loads((folder / CLAIM).read_bytes())}
            numbered = (
                {"further": [one | {"attempt": number} for one in further]} if further else {}
            )
            wanted = asked | {"attempt": number} | numbered
            keys = {*wanted, *({"further"} & set(stored))}
            differing[number] = sorted(key for key in keys if wanted.get(key) != stored.get(key))
            if not differing[number]:
                return _as_attempt(claims, number), folder
    # A new attempt, whose claims must be within reach.
    last = max(folders, default=0)
    number = last + 1
    folder = run.path / CERTIFICATES / str(number)
    claims = _as_attempt(claims, number)
    for claim in claims:
        needed = episodes_without_accident(claim)
        if claim.episodes < needed:
            raise ConfigError(
                f"{claim.episodes:,} episodes cannot show {quantity(claim)} in attempt {number}, "
                f"even without an accident: it takes {needed:,}. Nothing was played."
            )
    # What an unfinished one had otherwise.
    if last in differing:
        say(
            f"Attempt {last} is not finished, but differs in {', '.join(differing[last])}. "
            f"This is attempt {number}."
        )
    # Claim on disk.
    folder.mkdir(parents=True)
    numbered = {"further": [one | {"attempt": number} for one in further]} if further else {}
    write_atomic(folder / CLAIM, json_bytes(asked | {"attempt": number} | numbered))
    return claims, folder


def _as_attempt(claims: Sequence[Claim], number: int) -> tuple[Claim, ...]:
    return tuple(dataclasses.replace(claim, attempt=number) for claim in claims)


@contextlib.contextmanager
def _stopped_before_it_began() -> Iterator[None]:
    """Interrupted at once by a signal that comes before anything is on record."""
    stopped = "stopped before the first episode. The same command goes on from there."
    with StopSignal(0.0) as stop:
        try:
            yield
        except StopNow:
            raise Interrupted(stop.number or signal.SIGTERM, stopped) from None
        if stop.number:
            raise Interrupted(stop.number, stopped)


def _play(final: FinalPolicy, claims: Sequence[Claim], path: Path, say: Say) -> list[Episode]:
    """Episodes until the claims are settled, each on disk before the next begins."""
    record = LedgerWriter(path)
    record.close_lost()
    played, faults, real = record.episodes, 0, final.environment.kind == "real"
    claim, totals = claims[0], totals_of(claims, played)
    show = None if say is say_plain else say
    stopped = "stopped after {:,} episodes; all are recorded. The same command goes on from there."
    # In reality an episode that is cut off counts as an accident.
    with (
        contextlib.closing(ProgressLine(claim.episodes, len(played), show, "episodes")) as progress,
        StopSignal(None if real else STOP_SECONDS) as stop,
    ):
        try:
            while not finished(claims, totals, len(played)):
                before = played[-1].total_steps if played else 0
                about = claim, len(played), final.env, final.policy, before
                worst = final.worst_cost, final.worst_signals
                if real:
                    record.reserve(reserve(*about, *worst).worst)
                episode, fault = play(*about, *worst)
                record.append(episode)
                faults = faults_in_a_row(faults, fault)
                totals = [
                    total + contribution(claim, episode)
                    for claim, total in zip(claims, totals, strict=True)
                ]
                progress.update(len(played), _line(claims, totals, len(played)))
                if stop.number:
                    raise Interrupted(stop.number, stopped.format(len(played)))
        except StopNow:
            raise Interrupted(stop.number or signal.SIGTERM, stopped.format(len(played))) from None
    return played


def _require_distinct(
    claims: Sequence[Claim], episodes: Sequence[Episode], situations: Situations | None, where: str
) -> None:
    """RunError if a claim would be certified by repetitions of a few episodes.

    Where noise is fine-grained no two episodes are equal, and where it is coarse equal ones are
    draws like others. But of a few situations that are played again and again the same way, each
    counts once.
    """
    different = len(distinct(episodes))
    needed = max(map(episodes_without_accident, claims))
    if situations is None or not situations.few or different >= needed:
        return
    findings = judge_all(claims, totals_of(claims, episodes), len(episodes))
    if joint_verdict(findings) == "certified":
        raise RunError(
            f"{len(episodes):,} episodes were played and only {different:,} of them differ, as "
            f"{situations}; the claim takes {needed:,} that are independent, so no certificate was "
            f"written. Let more be drawn from self.np_random. The episodes are in {where}."
        )


def _line(claims: Sequence[Claim], totals: Sequence[float], episodes: int) -> str:
    parts = []
    for claim, total in zip(claims, totals, strict=True):
        found = judge(claim, total, episodes)
        bounds = f" | [{found.lower:.4g}, {found.upper:.4g}]" if claim.method == "anytime" else ""
        parts.append(seen(claim, total, episodes) + bounds)
    return " | ".join(parts)


def _other_limits(final: FinalPolicy, claims: Sequence[Claim]) -> list[str]:
    """What of the run's limits a certificate of these claims does not speak of."""
    claimed = {claim.quantity for claim in claims}
    return [
        f"limits      of {limit.quantity.limit_text(limit.value)}, another one of this run, this "
        f"certificate says nothing: leave the option out for all of them"
        for limit in final.limits
        if limit.constraint not in claimed and len(final.limits) > 1
    ]


def _header(final: FinalPolicy, claims: Sequence[Claim], situations: Situations | None) -> str:
    """What a person should know before it starts."""
    claim = claims[0]
    asked = " and ".join(map(quantity, claims))
    evidence = " or ".join(dict.fromkeys(quantity_named(c.quantity).evidence for c in claims))
    many = (
        f"{claim.episodes:,} episodes, then one look"
        if claim.method == "one look"
        else f"as many episodes as it takes, at most {claim.episodes:,}"
    )
    attempt = f"attempt {claim.attempt} on this run, at {claim.attempt_confidence:.2%} by itself"
    return "\n".join(
        [
            f"certify     {asked} of {final.run.name} (version {final.policy.version}), "
            f"confidence {claim.confidence:g}",
            *_other_limits(final, claims),
            f"method      {CLAIM_METHODS[claim.method]}",
            f"episodes    {many}, in {final.env.env_id}",
            f"error       {attempt}",
            f"provable    after {max(map(episodes_without_accident, claims)):,} episodes, if none "
            f"has {evidence}",
            *([f"warning     {situations}"] if situations and situations.few else []),
        ]
    )
