"""Certify a run's final policy, and check a certificate again."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import inspect
import json
import math
import signal
from pathlib import Path
from typing import Any

from safe_offrl.acting import NumpyActor
from safe_offrl.certificate import (
    CERTIFICATE,
    METHODS,
    RECORD,
    Check,
    Claim,
    episodes_without_accident,
    finished,
    judge,
    make_certificate,
    outcome,
    play,
    policy_sha256,
    reserve,
    sealed,
    shield_sha256,
    verify,
)
from safe_offrl.certificate_page import page, quantity, seen, summary
from safe_offrl.commands.common import say_plain
from safe_offrl.commands.tools import final_policy
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.files import json_bytes, write_atomic
from safe_offrl.finetune import Finetuning
from safe_offrl.ledger import LedgerWriter
from safe_offrl.progress import (
    STOP_SECONDS,
    Interrupted,
    ProgressLine,
    Say,
    StopNow,
    StopSignal,
)
from safe_offrl.rollout import faults_in_a_row
from safe_offrl.run import RunDir, find_run
from safe_offrl.types import Episode
from safe_offrl.user_code import import_user_module
from safe_offrl.versions import versions

MOST_EPISODES = 10_000  # of a claim that is looked at after every episode
FOLDER = "certificates"
CLAIM, PAGE = "claim.json", "certificate.html"


def certify_run(
    reference: str | Path,
    *,
    epsilon: float | None = None,
    cost_limit: float | None = None,
    confidence: float | None = None,
    episodes: int | None = None,
    seed: int = 0,
    runs: str | Path = "runs",
    say: Say = say_plain,
) -> dict[str, Any]:
    """Play a run's final policy behind its shield until the claim is settled; the certificate.

    Writes ``certificates/<attempt>/`` into the run folder: the claim before the first episode, each
    episode as it ends, certificate.json and a page. An attempt that was interrupted is continued by
    the same call for the same policy, shield and environment; any other call is a further attempt,
    and pays for it.
    """
    run = find_run(reference, Path(runs))
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
        loop = final_policy(run)
        with contextlib.closing(loop.env):
            claim = _claim(loop, epsilon, cost_limit, confidence, episodes, seed)
            subject = subject_of(run, loop)
            claim, folder = _attempt(run, claim, _identity(subject), say)
            say(_header(run, loop, claim))
            played = _play(loop, claim, folder / RECORD, run, say)
        record = (folder / RECORD).read_bytes()
        content = make_certificate(claim, played, record, subject)
        shown = page(content).encode()
        certificate = sealed({**content, "page_sha256": hashlib.sha256(shown).hexdigest()})
        write_atomic(folder / PAGE, shown)
        write_atomic(folder / CERTIFICATE, json_bytes(certificate))  # last: it ends the attempt
    say(f"{summary(certificate)}\n{folder / CERTIFICATE}\n{folder / PAGE}")
    return certificate


def verify_certificate(path: str | Path, *, say: Say = say_plain) -> list[Check]:
    """Check a certificate's hash, arithmetic and page; beside its run also episodes and policy.

    Raises RunError if any check fails, after saying all of them.
    """
    path = Path(path)
    try:
        certificate = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f'"{path}" cannot be read as a certificate ({error}). '
            f"Give runs/RUN/{FOLDER}/N/{CERTIFICATE}."
        ) from error
    if not isinstance(certificate, dict):
        raise ConfigError(f'"{path}" holds no JSON object, so it is no certificate.')
    record, shown = path.with_name(RECORD), path.with_name(PAGE)
    checks = verify(
        certificate,
        record.read_bytes() if record.is_file() else None,
        f'"{path}"',
        shown.read_bytes() if shown.is_file() else None,
    )
    run = path.resolve().parent.parent.parent
    if record.is_file() and (run / "run.json").is_file():
        loop = final_policy(RunDir(run))
        with contextlib.closing(loop.env):
            stated = certificate.get("policy", {}), certificate.get("shield", {})
            same = (
                policy_sha256(loop.deployment.actor, loop.normalizer),
                shield_sha256(loop.deployment.shield),
            ) == tuple(part.get("sha256") for part in stated)
        checks.append(Check("policy", same, f'of the run "{run.name}", with its shield'))
    for check in checks:
        say(f"{'ok    ' if check.passed else 'FAILED'} {check.name:<12}{check.detail}")
    if shown.is_file() and "page_sha256" not in certificate:
        say(f"       {'page':<12}it holds no hash of its page, which was not checked")
    if not record.is_file():
        say(f"       {'record':<12}not beside it: neither episodes nor policy were checked")
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise RunError(f'"{path}" does not hold: {", ".join(failed)}. Do not rely on it.')
    say(summary(certificate))
    return checks


def _claim(
    loop: Finetuning,
    epsilon: float | None,
    cost_limit: float | None,
    confidence: float | None,
    episodes: int | None,
    seed: int,
) -> Claim:
    """What was asked for; the run's own constraint if nothing was."""
    safety = loop.config.safety
    if epsilon is not None and cost_limit is not None:
        raise ConfigError("Give --epsilon or --cost-limit: a certificate is about one of them.")
    by_cost = cost_limit is not None or (epsilon is None and safety.constraint == "cost")
    if by_cost and loop.limit.constraint != "cost":
        raise ConfigError(
            "The run constrains accidents, and how much an episode can cost is not known. "
            "Give --epsilon."
        )
    asked, stored = (cost_limit, safety.cost_limit) if by_cost else (epsilon, safety.epsilon)
    return Claim(
        quantity="cost" if by_cost else "accident",
        limit=stored if asked is None else asked,
        scale=loop.limit.scale if by_cost else 1.0,
        confidence=safety.confidence if confidence is None else confidence,
        method="anytime" if episodes is None else "one look",
        episodes=MOST_EPISODES if episodes is None else episodes,
        seed=seed,
    )


def _identity(subject: dict[str, Any]) -> dict[str, Any]:
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
    folders = {int(p.name): p for p in (run.path / FOLDER).glob("*") if p.name.isdecimal()}
    asked = {**dataclasses.asdict(claim), **identity}
    differing: dict[int, list[str]] = {}  # of the unfinished attempts: what they have otherwise
    for number, folder in folders.items():
        if (folder / CLAIM).is_file() and not (folder / CERTIFICATE).is_file():
            stored = json.loads((folder / CLAIM).read_bytes())
            wanted = asked | {"attempt": number}
            differing[number] = [key for key in wanted if wanted[key] != stored.get(key)]
            if not differing[number]:
                return dataclasses.replace(claim, attempt=number), folder
    last = max(folders, default=0)
    number = last + 1
    folder = run.path / FOLDER / str(number)
    claim = dataclasses.replace(claim, attempt=number)
    needed = episodes_without_accident(claim)
    if claim.episodes < needed:
        raise ConfigError(
            f"{claim.episodes:,} episodes cannot show {quantity(claim)} in attempt {number}, even "
            f"without an accident: it takes {needed:,}. Nothing was played."
        )
    if last in differing:
        say(
            f"Attempt {last} is not finished, but differs in {', '.join(differing[last])}. "
            f"This is attempt {number}."
        )
    folder.mkdir(parents=True)
    write_atomic(folder / CLAIM, json_bytes(asked | {"attempt": number}))
    return claim, folder


def subject_of(run: RunDir, loop: Finetuning) -> dict[str, Any]:
    """What a certificate, or an exported file, is about."""
    safety, shield = loop.config.safety, loop.deployment.shield
    return {
        "policy": {
            "run": run.name,
            "kind": run.kind,
            "version": loop.deployment.version,
            "checkpoint_sha256": run.load_checkpoint().sha256,
            "sha256": policy_sha256(loop.deployment.actor, loop.normalizer),
        },
        "shield": {
            "acts": shield.acts,
            "draws": shield.draws,
            "margin": shield.margin,
            "sha256": shield_sha256(shield),
        },
        "environment": {
            "id": loop.env.env_id,
            "horizon": loop.env.horizon,
            "accident": safety.accident,
            **rule_source(safety.accident),
            "cost_threshold": safety.cost_threshold,
        },
        "versions": versions(loop.env.versions()),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def rule_source(accident: str) -> dict[str, str]:
    """The sha256 of the file of an accident rule that is a function of the user's; else nothing.

    "unknown" if there is no such file, as of an environment's.
    """
    name, colon, _ = accident.partition(":")
    if not colon:
        return {}
    module = import_user_module(name, f'accident rule "{accident}"')
    try:
        source = hashlib.sha256(Path(inspect.getfile(module)).read_bytes()).hexdigest()
    except (OSError, TypeError):  # in a zip file, or in C
        source = "unknown"
    return {"accident_source": source}


def _play(loop: Finetuning, claim: Claim, path: Path, run: RunDir, say: Say) -> list[Episode]:
    """Episodes until the claim is settled, each on disk before the next begins."""
    record = LedgerWriter(path)
    record.close_lost()
    played, faults, real = record.episodes, 0, loop.config.env.kind == "real"
    total = math.fsum(outcome(claim, episode) for episode in played)
    actor = NumpyActor(loop.deployment.actor)
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
                if real:
                    version = loop.deployment.version
                    record.reserve(reserve(claim, len(played), loop.env, version, before).worst)
                episode, fault = play(
                    claim,
                    len(played),
                    loop.env,
                    actor,
                    loop.deployment.shield,
                    loop.normalizer,
                    loop.deployment.version,
                    before,
                )
                record.append(episode)
                faults = faults_in_a_row(faults, fault)
                total += outcome(claim, episode)
                progress.update(len(played), _line(claim, total, len(played)))
                if stop.number:
                    raise Interrupted(stop.number, stopped.format(len(played)))
        except StopNow:
            raise Interrupted(stop.number or signal.SIGTERM, stopped.format(len(played))) from None
    return played


def _line(claim: Claim, total: float, episodes: int) -> str:
    found = judge(claim, total, episodes)
    bounds = f" | [{found.lower:.4g}, {found.upper:.4g}]" if claim.method == "anytime" else ""
    return seen(claim, total, episodes) + bounds


def _header(run: RunDir, loop: Finetuning, claim: Claim) -> str:
    """What a person should know before it starts."""
    many = (
        f"{claim.episodes:,} episodes, then one look"
        if claim.method == "one look"
        else f"as many episodes as it takes, at most {claim.episodes:,}"
    )
    attempt = f"attempt {claim.attempt} on this run, at {claim.attempt_confidence:.2%} by itself"
    return "\n".join(
        [
            f"certify     {quantity(claim)} of {run.name} (version {loop.deployment.version}), "
            f"confidence {claim.confidence:g}",
            f"method      {METHODS[claim.method]}",
            f"episodes    {many}, in {loop.env.env_id}",
            f"error       {attempt}",
            f"provable    after {episodes_without_accident(claim):,} episodes, if none has an "
            "accident" + (" or a cost" if claim.quantity == "cost" else ""),
        ]
    )
