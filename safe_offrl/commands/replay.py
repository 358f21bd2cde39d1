"""Play every version that acted in a run again: what it is in truth, afterwards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from safe_offrl.commands.common import say_plain
from safe_offrl.commands.environment import changed_line, since_run
from safe_offrl.deploy.evaluate import evaluate
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.identity import KEY
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.files import json_bytes, plain, write_atomic
from safe_offrl.limits import QUANTITIES
from safe_offrl.record.final_policy import FinalPolicy, final_policy
from safe_offrl.record.find_run import find_run
from safe_offrl.record.kept_versions import REPLAY, kept_versions, load_version
from safe_offrl.record.progress import Heartbeat, Say
from safe_offrl.record.run import RunDir
from safe_offrl.report.realised import one_sided_bounds, realised
from safe_offrl.report.replay_chart import replay_png

PICTURE = "replay.png"


def replay_run(
    run_name: str | Path,
    *,
    episodes: int = 20,
    seed: int = 0,
    runs: str | Path = "runs",
    say: Say = say_plain,
) -> dict[str, Any]:
    """Play ``episodes`` with each version that a run kept, and hold its estimate against them.

    Writes replay.json and replay.png into the run; returns what the former holds. Every version
    meets the same seeds. What is played is no part of learning, of the budget or of the ledger. The
    same command goes on where it was broken off. A version is above its limit in truth if a
    one-sided bound at the run's confidence says so, one look at a fixed number for each.

    ConfigError for a real environment, where nothing is played again. RunError for a run that kept
    no versions.
    """
    if episodes < 2:
        raise ConfigError(f"{episodes} episodes show nothing of a version. Ask for at least 2.")
    run = find_run(run_name, Path(runs), "finetune")
    files = kept_versions(run.path)
    if not files:
        raise RunError(
            f'The run "{run.name}" kept no versions of its policy. Make a new one with '
            "`safe-offrl finetune --keep-versions`."
        )
    run.require_writable("Copy it to where it can be written.")
    final = final_policy(run)
    with contextlib.closing(final.env):
        if final.environment.kind == "real":
            raise ConfigError(
                f'The environment of "{run.name}" is real, where nothing is played again. What its '
                "versions did there is in `safe-offrl ledger`."
            )
        identity = final.env.identity()
        for line in changed_line(f"that of {run.name}", since_run(run, identity)):
            say(line)
        settings = {"episodes": episodes, "seed": seed, KEY: plain(identity)}
        rows = _known_rows(run, settings)
        history = _history(run)
        progress = f"{len(files):,} versions of {episodes:,} episodes each"
        say(f"replay      {run.name}: {progress}, in {final.env.env_id}")
        with contextlib.closing(
            Heartbeat(say, lambda _: f"{len(rows):,}/{len(files):,} versions")
        ) as heartbeat:
            for path in files:
                policy = load_version(path)
                if _shape(policy) != _shape(final.policy):
                    raise RunError(
                        f'"{path}" is not of this run: its policy has other observations or '
                        "actions. Restore it, or remove it."
                    )
                if rows.get(policy.version, {}).get("sha256") != _sha256(policy):
                    facts = history.get(policy.version, {})
                    rows[policy.version] = facts | _play_version(final, policy, episodes, seed)
                    _keep_result(run, settings, final, rows)
                heartbeat.beat()
    result = _keep_result(run, settings, final, rows)
    write_atomic(run.path / PICTURE, replay_png(result))
    say(_summary(result))
    say(f"file        {run.path / PICTURE}")
    return result


def _known_rows(run: RunDir, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Rows of an earlier call that was to do the same, by version."""
    try:
        found = json.loads((run.path / REPLAY).read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or any(found.get(k) != v for k, v in settings.items()):
        return {}
    return {row["version"]: row for row in found["versions"]}


def _history(run: RunDir) -> dict[int, dict[str, Any]]:
    """Of each version that acted: since which step, in how many episodes, under which estimate."""
    found: dict[int, dict[str, Any]] = {}
    for episode in run.episodes():
        facts = found.setdefault(
            episode.version,
            {"step": episode.total_steps - episode.steps, "acted": 0},
        )
        facts["acted"] += 1
    # A version is estimated before it acts, but for the first, which is measured as it acts.
    iterations = run.iterations()
    estimates = {
        line["version"]: line["v_candidate"]
        for line in iterations
        if line["accepted"] or line["rolled_back"]
    }
    if iterations:
        estimates[0] = iterations[0]["v_previous"]
    return {
        version: {**facts, "estimate": estimates.get(version)} for version, facts in found.items()
    }


def _shape(policy: DeployedPolicy) -> tuple[int, int, bool]:
    actor = policy.actor
    return actor.observation_size, actor.action_size, actor.kind.one_hot


def _sha256(policy: DeployedPolicy) -> str:
    return f"{policy.sha256} {policy.shield.sha256}"


def _play_version(
    final: FinalPolicy, policy: DeployedPolicy, episodes: int, seed: int
) -> dict[str, Any]:
    played = list(evaluate(final.env, policy, episodes, seed, worst_cost=final.worst_cost))
    constraint, limit = final.limit.constraint, final.limit.value
    lower, upper = one_sided_bounds(played, constraint, final.safety.confidence)
    truth = realised(played, constraint)
    returns = [e.episode_return for e in played if e.outcome == "complete"]
    return {
        "version": policy.version,
        "sha256": _sha256(policy),
        "truth": truth.value,
        "low": truth.low,
        "high": truth.high,
        "verdict": "above" if lower > limit else "below" if upper < limit else "undecided",
        "return": float(np.mean(returns)) if returns else None,
        "worst_cost": max(episode.cost for episode in played),
        "interventions": sum(episode.shield_interventions for episode in played),
    }


def _keep_result(
    run: RunDir, settings: Mapping[str, Any], final: FinalPolicy, rows: Mapping[int, dict[str, Any]]
) -> dict[str, Any]:
    versions = [rows[version] for version in sorted(rows)]
    result: dict[str, Any] = {
        **settings,
        "run": run.name,
        "constraint": final.limit.constraint,
        "limit": final.limit.value,
        "confidence": final.safety.confidence,
        "above": sum(row["verdict"] == "above" for row in versions),
        "below": sum(row["verdict"] == "below" for row in versions),
        "over": sum(row["truth"] > final.limit.value for row in versions),
        "correlation": _correlation(versions),
        "versions": versions,
    }
    write_atomic(run.path / REPLAY, json_bytes(plain(result)))
    return result


def _correlation(versions: list[dict[str, Any]]) -> float | None:
    """Of estimates with truths; None where either does not vary or fewer than three are known."""
    known = [(row["estimate"], row["truth"]) for row in versions if row.get("estimate") is not None]
    if len(known) < 3:
        return None
    estimates, truths = np.array(known).T
    if min(np.ptp(estimates), np.ptp(truths)) == 0.0:
        return None
    return float(np.corrcoef(estimates, truths)[0, 1])


def _summary(result: Mapping[str, Any]) -> str:
    quantity = QUANTITIES[result["constraint"]]
    n, last = len(result["versions"]), result["versions"][-1]
    limit, sure = quantity.limit_text(result["limit"]), f"{result['confidence']:.0%}"
    told = result["correlation"]
    lines = [
        f"above       {result['above']:,} of {n:,} versions are shown to exceed {limit} (one-sided "
        f"{sure}), {result['below']:,} to keep it; of {result['over']:,} the mean lies above",
        f"last        version {last['version']:,}: {quantity.text(last['truth'])} "
        f"[{quantity.text(last['low'])}, {quantity.text(last['high'])}] {quantity.per_episode}",
    ]
    if told is not None:
        lines.append(f"estimates   correlate with the truth by {told:.2f} over versions")
    return "\n".join(lines)
