"""What a certificate, or an exported file, is about."""

from __future__ import annotations

import datetime
import hashlib
import inspect
from pathlib import Path
from typing import Any

from safe_offrl.env.identity import KEY
from safe_offrl.env.user_code import import_user_module
from safe_offrl.record.final_policy import FinalPolicy
from safe_offrl.record.versions import versions


def subject_of(final: FinalPolicy) -> dict[str, Any]:
    """What a certificate, or an exported file, is about."""
    policy, safety, env = final.policy, final.safety, final.env
    shield, guard = policy.shield, policy.guard
    signals = {k: x for k, x in safety.signals.items() if k in safety.bounds}  # that are limited
    return {
        "policy": {
            "run": final.run.name,
            "kind": final.run.kind,
            "version": policy.version,
            "checkpoint_sha256": final.checkpoint_sha256,
            "sha256": policy.sha256,
        },
        "shield": {
            "acts": shield.acts,
            "draws": shield.draws,
            "margin": shield.margin,
            "sha256": shield.sha256,
        },
        "guard": {
            "acts": guard is not None,
            **({} if guard is None else {"caution": guard.caution, "sha256": guard.sha256}),
            "limits": {} if guard is None else {w.constraint: w.limit for w in guard.watches},
        },
        "environment": {
            "id": env.env_id,
            "horizon": env.horizon,
            "accident": safety.accident,
            **rule_source(safety.accident),
            "cost_threshold": safety.cost_threshold,
            **({"signals": signals} if signals else {}),
            KEY: env.identity(),
        },
        "versions": versions(env.versions()),
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
    except (OSError, TypeError):  # The module lies in a zip file or is written in C.
        source = "unknown"
    return {"accident_source": source}
