"""Certify a run's final policy."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
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
    judge,
    make_certificate,
    play,
    reserve,
    sealed,
)
from safe_offrl.certify.page import page, quantity, seen, summary
from safe_offrl.check.situations import Situations, find_situations, require_situations
from safe_offrl.commands.common import say_plain
from safe_offrl.commands.environment import changed_line, since_run
from safe_offrl.commands.given_limits import Limits
from safe_offrl.deploy.episodes import distinct, faults_in_a_row
from safe_offrl.env.identity import KEY
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.files import json_bytes, write_atomic
from safe_offrl.limits import COST, QUANTITIES
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
    """Play a run's final policy behind its shield until the claim is settled; the certificate.

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
            claim = _claim(final, limits, confidence, episodes, seed)
            subject = subject_of(final)
            situations = None  # On a real machine every episode is on record.
            if final.environment.kind != "real":
                with _stopped_before_it_began():
                    situations = find_situations(final.env)
                require_situations(final.env.env_id, situations)
            # Attempt and its episodes.
            claim, folder = _attempt(run, claim, _attempt_facts(subject), say)
            say(_header(final, claim, situations))
            for line in changed_line(
                f"that of {run.name}", since_run(run, subject["environment"][KEY])
            ):
                say(line)
            played = _play(final, claim, folder / RECORD, say)
        # Certificate and page.
        _require_distinct(claim, played, situations, str(folder / RECORD))
        record = (folder / RECORD).read_bytes()
        content = make_certificate(claim, played, record, subject, situations)
        shown = page(content).encode()
        certificate = sealed({**content, "page_sha256": hashlib.sha256(shown).hexdigest()})
        write_atomic(folder / PAGE, shown)
        write_atomic(folder / CERTIFICATE, json_bytes(certificate))  # Its file ends the attempt.
    say(f"{summary(certificate)}\n{folder / CERTIFICATE}\n{folder / PAGE}")
    return certificate


def _claim(
    final: FinalPolicy, limits: Limits, confidence: float | None, episodes: int | None, seed: int
) -> Claim:
    """What was asked for; the run's own constraint if nothing was."""
    safety = final.safety
    given = {"epsilon": limits.get("epsilon"), "cost_limit": limits.get("cost_limit")}
    asked = {key: value for key, value in given.items() if value is not None}
    if len(asked) > 1:
        raise ConfigError("Give --epsilon or --cost-limit: a certificate is about one of them.")
    quantity = next((q for q in QUANTITIES.values() if q.limit in asked), safety.quantity)
    own = next((limit for limit in final.limits if limit.quantity is quantity), None)
    if own is None and quantity is COST:
        raise ConfigError(
            "The run constrains accidents, and how much an episode can cost is not known. "
            "Give --epsilon."
        )
    return Claim(
        quantity=quantity.constraint,
        limit=asked.get(quantity.limit, safety.limit_value),
        scale=own.scale if own is not None else 1.0,
        confidence=safety.confidence if confidence is None else confidence,
        method="anytime" if episodes is None else "one look",
        episodes=MOST_EPISODES if episodes is None else episodes,
        seed=seed,
    )


def _attempt_facts(subject: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for an attempt to go on, besides the claim: all that p depends on."""
    return {
        "policy_sha256": subject["policy"]["sha256"],
        "shield_sha256": subject["shield"]["sha256"],
        "environment": subject["environment"],
        "environment_versions": subject["versions"]["environment"],
    }


def _attempt(run: RunDir, claim: Claim, identity: dict[str, Any], say: Say) -> tuple[Claim, Path]:
    """The attempt that was interrupted, if it is this one; else a new one, its claim on disk.

    A new one has the number after the highest, so that no number before that is used twice.
    """
    # Attempts before this one.
    folders = {int(p.name): p for p in (run.path / CERTIFICATES).glob("*") if p.name.isdecimal()}
    asked = {**dataclasses.asdict(claim), **identity}
    differing: dict[int, list[str]] = {}  # It says what unfinished ones have otherwise.
    # An interrupted one that is this one.
    for number, folder in folders.items():
        if (folder / CLAIM).is_file() and not (folder / CERTIFICATE).is_file():
            stored = json.loads((folder / CLAIM).read_bytes())
            wanted = asked | {"attempt": number}
            differing[number] = [key for key in wanted if wanted[key] != stored.get(key)]
            if not differing[number]:
                return dataclasses.replace(claim, attempt=number), folder
    # A new attempt, whose claim must be within reach.
    last = max(folders, default=0)
    number = last + 1
    folder = run.path / CERTIFICATES / str(number)
    claim = dataclasses.replace(claim, attempt=number)
    needed = episodes_without_accident(claim)
    if claim.episodes < needed:
        raise ConfigError(
            f"{claim.episodes:,} episodes cannot show {quantity(claim)} in attempt {number}, even "
            f"without an accident: it takes {needed:,}. Nothing was played."
        )
    # What an unfinished one had otherwise.
    if last in differing:
        say(
            f"Attempt {last} is not finished, but differs in {', '.join(differing[last])}. "
            f"This is attempt {number}."
        )
    # Claim on disk.
    folder.mkdir(parents=True)
    write_atomic(folder / CLAIM, json_bytes(asked | {"attempt": number}))
    return claim, folder


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


def _play(final: FinalPolicy, claim: Claim, path: Path, say: Say) -> list[Episode]:
    """Episodes until the claim is settled, each on disk before the next begins."""
    record = LedgerWriter(path)
    record.close_lost()
    played, faults, real = record.episodes, 0, final.environment.kind == "real"
    total = math.fsum(contribution(claim, episode) for episode in played)
    show = None if say is say_plain else say
    stopped = "stopped after {:,} episodes; all are recorded. The same command goes on from there."
    # In reality an episode that is cut off counts as an accident.
    with (
        contextlib.closing(ProgressLine(claim.episodes, len(played), show, "episodes")) as progress,
        StopSignal(None if real else STOP_SECONDS) as stop,
    ):
        try:
            while not finished(claim, total, len(played)):
                before = played[-1].total_steps if played else 0
                about = claim, len(played), final.env, final.policy, before, final.worst_cost
                if real:
                    record.reserve(reserve(*about).worst)
                episode, fault = play(*about)
                record.append(episode)
                faults = faults_in_a_row(faults, fault)
                total += contribution(claim, episode)
                progress.update(len(played), _line(claim, total, len(played)))
                if stop.number:
                    raise Interrupted(stop.number, stopped.format(len(played)))
        except StopNow:
            raise Interrupted(stop.number or signal.SIGTERM, stopped.format(len(played))) from None
    return played


def _require_distinct(
    claim: Claim, episodes: Sequence[Episode], situations: Situations | None, where: str
) -> None:
    """RunError if a claim would be certified by repetitions of a few episodes.

    Where noise is fine-grained no two episodes are equal, and where it is coarse equal ones are
    draws like others. But of a few situations that are played again and again the same way, each
    counts once.
    """
    different, needed = len(distinct(episodes)), episodes_without_accident(claim)
    if situations is None or not situations.few or different >= needed:
        return
    total = math.fsum(contribution(claim, episode) for episode in episodes)
    if judge(claim, total, len(episodes)).verdict == "certified":
        raise RunError(
            f"{len(episodes):,} episodes were played and only {different:,} of them differ, as "
            f"{situations}; the claim takes {needed:,} that are independent, so no certificate was "
            f"written. Let more be drawn from self.np_random. The episodes are in {where}."
        )


def _line(claim: Claim, total: float, episodes: int) -> str:
    found = judge(claim, total, episodes)
    bounds = f" | [{found.lower:.4g}, {found.upper:.4g}]" if claim.method == "anytime" else ""
    return seen(claim, total, episodes) + bounds


def _other_limits(final: FinalPolicy, claim: Claim) -> list[str]:
    """What of the run's limits a certificate of this claim does not speak of."""
    return [
        f"limits      of {limit.quantity.limit_text(limit.value)}, another one of this run, this "
        f"certificate says nothing: certify it too with "
        f"--{limit.quantity.limit.replace('_', '-')} {limit.value:g}"
        for limit in final.limits
        if limit.constraint != claim.quantity and len(final.limits) > 1
    ]


def _header(final: FinalPolicy, claim: Claim, situations: Situations | None) -> str:
    """What a person should know before it starts."""
    many = (
        f"{claim.episodes:,} episodes, then one look"
        if claim.method == "one look"
        else f"as many episodes as it takes, at most {claim.episodes:,}"
    )
    attempt = f"attempt {claim.attempt} on this run, at {claim.attempt_confidence:.2%} by itself"
    return "\n".join(
        [
            f"certify     {quantity(claim)} of {final.run.name} (version {final.policy.version}), "
            f"confidence {claim.confidence:g}",
            *_other_limits(final, claim),
            f"method      {CLAIM_METHODS[claim.method]}",
            f"episodes    {many}, in {final.env.env_id}",
            f"error       {attempt}",
            f"provable    after {episodes_without_accident(claim):,} episodes, if none has "
            f"{QUANTITIES[claim.quantity].evidence}",
            *([f"warning     {situations}"] if situations and situations.few else []),
        ]
    )
