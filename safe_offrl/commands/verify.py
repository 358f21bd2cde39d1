"""Check a certificate again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safe_offrl.certify.certificate import CERTIFICATE, CERTIFICATES, PAGE, RECORD
from safe_offrl.certify.page import summary
from safe_offrl.certify.recheck import Recheck, recheck
from safe_offrl.commands.common import say_plain
from safe_offrl.commands.environment import environment_check
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.record.final_policy import final_policy
from safe_offrl.record.progress import Say
from safe_offrl.record.run import RunDir


def verify_certificate(path: str | Path, *, say: Say = say_plain) -> list[Recheck]:
    """Check a certificate's hash, arithmetic and page; beside its run also episodes and policy.

    Beside its run it must also be about the environment as it is now: in another one nothing is
    proved. Raises RunError if any check fails, after saying all of them.
    """
    # Certificate.
    path = Path(path)
    try:
        certificate = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f'"{path}" cannot be read as a certificate ({error}). '
            f"Give runs/RUN/{CERTIFICATES}/N/{CERTIFICATE}."
        ) from error
    if not isinstance(certificate, dict):
        raise ConfigError(f'"{path}" holds no JSON object, so it is no certificate.')
    # What it says of itself.
    record, shown = path.with_name(RECORD), path.with_name(PAGE)
    checks = recheck(
        certificate,
        record.read_bytes() if record.is_file() else None,
        f'"{path}"',
        shown.read_bytes() if shown.is_file() else None,
    )
    # What its run says of it.
    run = path.resolve().parent.parent.parent
    if record.is_file() and (run / "run.json").is_file():
        checks.append(environment_check(certificate, RunDir(run)))
        if checks[-1].passed:  # In another one the policy may not even fit.
            checks.append(_policy_check(certificate, RunDir(run)))
    # Findings.
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


def _policy_check(certificate: dict[str, Any], run: RunDir) -> Recheck:
    final = final_policy(run)
    final.env.close()
    stated = (certificate.get(part, {}).get("sha256") for part in ("policy", "shield", "guard"))
    guard = final.policy.guard
    found = final.policy.sha256, final.policy.shield.sha256, guard and guard.sha256
    return Recheck(
        "policy", found == tuple(stated), f'of the run "{run.path.name}", with shield and guard'
    )
