"""Whether an environment is still the one that a log, a run or a certificate speaks of."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from safe_offrl.certify.recheck import Recheck
from safe_offrl.data.dataset import Dataset
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.identity import KEY
from safe_offrl.env.make import make_env
from safe_offrl.errors import EnvError, RunError
from safe_offrl.record.environment_changes import differences, log_differences
from safe_offrl.record.progress import Say
from safe_offrl.record.run import RESUMED, RunDir
from safe_offrl.record.run_config import RunInputs, parse_run_yaml
from safe_offrl.record.subject import rule_source
from safe_offrl.record.trust import require_trusted
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.pretrain_config import PretrainConfig

# They stand in versions.json beside KEY, where they are others than it.
LOGGED, PRETRAINED = f"logged_{KEY}", f"pretrained_{KEY}"


def since_log(dataset: Dataset, identity: Mapping[str, Any]) -> list[str]:
    """What differs from the environment that a log says it was made in; empty if it does not."""
    return log_differences(dataset.metadata, identity)


def since_run(run: RunDir, identity: Mapping[str, Any]) -> list[str]:
    """What differs from the environment that a run last went on in; empty if it does not say."""
    return differences(run.environments[-1] if run.environments else None, identity)


def changed_line(what: str, changes: Sequence[str]) -> list[str]:
    """Header line that says so, if anything differs from ``what``."""
    if not changes:
        return []
    return [f"environment NOT {what}: {'; '.join(changes)}. Unless that is meant, restore it"]


def learnt_lines(logged: Sequence[str], pretrained: Sequence[str] = ()) -> list[str]:
    """Header lines of a phase that learns from a log, and online from a pretrained policy."""
    if logged == pretrained:
        return changed_line("as logged and pretrained in", logged)
    return changed_line("as logged", logged) + changed_line("as pretrained in", pretrained)


def identities(
    identity: Mapping[str, Any], dataset: Dataset, pretrained: RunDir | None = None
) -> dict[str, Any]:
    """For versions.json: of the environment, and of those that were learnt in, if others."""
    found: dict[str, Any] = {KEY: identity}
    if since_log(dataset, identity):
        found[LOGGED] = dataset.metadata[KEY]
    if pretrained is not None and since_run(pretrained, identity):
        found[PRETRAINED] = pretrained.environments[-1]
    return found


def require_same_environment(run: RunDir, env: AccidentEnv, accept_risk: bool, say: Say) -> None:
    """Raise RunError if a run is to go on in another environment, unless that is accepted.

    Accepted, it is said and becomes part of the run's record.
    """
    identity = env.identity()
    changes = since_run(run, identity)
    if not changes:
        return
    if not accept_risk:
        raise RunError(
            f'The environment has changed since "{run.name}" went on in it: {"; ".join(changes)}. '
            "Restore it, start a new run, or go on all the same with --accept-risk: the run's "
            "record then says so."
        )
    say(changed_line(f"that of {run.name} so far", changes)[0])
    resumed = [*run.environments[1:], identity]
    run.write_json("versions.json", {**run.versions, RESUMED: resumed})


def environment_check(certificate: Mapping[str, Any], run: RunDir) -> Recheck:
    """Whether the environment of a certificate's run still is the one that was certified."""
    stated = certificate.get("environment", {})
    settings: tuple[RunInputs, PretrainConfig | FinetuneConfig] = (
        parse_run_yaml(run.config_text, "pretrain", PretrainConfig, run.path)
        if run.kind == "pretrain"
        else parse_run_yaml(run.config_text, "finetune", FinetuneConfig, run.path)
    )
    inputs, config = settings
    require_trusted(run, inputs, config.safety)
    timeout = config.env.timeout if isinstance(config, FinetuneConfig) else None
    try:
        env = make_env(inputs.env_id, config.safety, timeout=timeout)
    except EnvError as error:
        return Recheck("environment", False, f"it cannot be made any more: {error}")
    with contextlib.closing(env):
        if KEY in stated:
            changes = differences(stated[KEY], env.identity())
        else:  # An earlier version says no more than these.
            source = rule_source(config.safety.accident)
            now = {"horizon": env.horizon, **source, **env.versions()}
            before = {**stated, **certificate.get("versions", {}).get("environment", {})}
            keys = ("horizon", "accident_source", "environment_source")
            changes = [key for key in keys if before.get(key, now.get(key)) != now.get(key)]
    detail = f"changed since then: {'; '.join(changes)}" if changes else "as it was certified in"
    return Recheck("environment", not changes, detail)
