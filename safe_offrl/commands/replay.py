"""Play every version that acted in a run again: what it is in truth, afterwards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from safe_offrl.check.situations import find_situations
from safe_offrl.commands.common import say_plain
from safe_offrl.commands.environment import changed_line, since_run
from safe_offrl.deploy.episodes import distinct
from safe_offrl.deploy.evaluate import evaluate
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.env.identity import KEY
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.files import json_bytes, plain, write_atomic
from safe_offrl.limits import quantity_named
from safe_offrl.record.final_policy import FinalPolicy, final_policy
from safe_offrl.record.find_run import find_run
from safe_offrl.record.kept_versions import REPLAY, kept_versions, load_version
from safe_offrl.record.progress import Heartbeat, Say
from safe_offrl.record.run import RunDir
from safe_offrl.report.realised import realised
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
    one-sided bound at the run's confidence says so, one look at a fixed number for each by itself.
    Where the environment has few situations, bounds count only episodes that differ.

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
        # What an earlier call has played of the same, by what acted.
        settings = {"episodes": episodes, "seed": seed, "kept": len(files), KEY: plain(identity)}
        known, history = _known_rows(run, settings), _history(run)
        # Every version in turn.
        situations = find_situations(final.env)
        rows: list[dict[str, Any]] = []
        progress = f"{len(files):,} versions of {episodes:,} episodes each"
        say(f"replay      {run.name}: {progress}, in {final.env.env_id}")
        with contextlib.closing(
            Heartbeat(say, lambda _: f"{len(rows):,}/{len(files):,} versions")
        ) as heartbeat:
            for path in files:
                policy = load_version(path)
                _require_own(path, policy, final.policy)
                guard = f" {policy.guard.sha256}" if policy.guard else ""
                sha256 = f"{policy.sha256} {policy.shield.sha256}{guard}"
                truth = known.get(sha256) or _truth_of(
                    final, policy, episodes, seed, situations.few
                )
                known[sha256] = truth  # An alarm may have let it act again, as another version.
                facts = {"version": policy.version, "sha256": sha256}
                rows.append(truth | history.get(policy.version, {}) | facts)
                _save_rows(run, settings, final, rows)
                heartbeat.beat()
    result = _save_rows(run, settings, final, rows)
    write_atomic(run.path / PICTURE, replay_png(result))
    say(_summary(result))
    if situations.few:
        say(f"warning: {situations}; bounds count the episodes of a version that differ")
    say(f"file        {run.path / PICTURE}")
    return result


def _known_rows(run: RunDir, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of an earlier call, by the hash of what acted; none if it was to do something else."""
    try:
        found = json.loads((run.path / REPLAY).read_bytes())
        if any(found[key] != settings[key] for key in ("episodes", "seed", KEY)):
            return {}
        return {row["sha256"]: row for row in found["versions"]}
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: it is made again
        return {}


def _require_own(path: Path, policy: DeployedPolicy, final: DeployedPolicy) -> None:
    """RunError for a version that cannot have acted in this run."""
    actors = (policy.actor, final.actor)
    mine, wanted = ((a.observation_size, a.action_size, a.kind.one_hot) for a in actors)
    if mine != wanted:
        raise RunError(
            f'"{path}" is not of this run: its policy has other observations or actions. Restore '
            "it, or remove it."
        )


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


def _truth_of(
    final: FinalPolicy, policy: DeployedPolicy, episodes: int, seed: int, few: bool
) -> dict[str, Any]:
    """What a version is in truth; where there are ``few`` situations, bounds count what differs."""
    worst: dict[str, Any] = {"worst_cost": final.worst_cost, "worst_signals": final.worst_signals}
    played = list(evaluate(final.env, policy, episodes, seed, **worst))
    bounded, confidence = distinct(played) if few else played, final.safety.confidence
    truths = []  # of each limit
    for limit in final.limits:
        value = realised(played, limit.constraint, confidence).value
        truths.append(realised(bounded, limit.constraint, confidence)._replace(value=value))
    truth, *further = truths
    above = [t.at_least > limit.value for t, limit in zip(truths, final.limits, strict=True)]
    returns = [e.episode_return for e in played if e.outcome == "complete"]
    return {
        "truth": truth.value,
        "low": truth.low,
        "high": truth.high,
        "above": any(above),
        "return": float(np.mean(returns)) if returns else None,
        "most_cost": max(episode.cost for episode in played),
        "shield_interventions": sum(episode.shield_interventions for episode in played),
        "guarded_steps": sum(episode.guarded_steps for episode in played),
        **({"further": [found.value for found in further]} if further else {}),
    }


def _save_rows(
    run: RunDir, settings: Mapping[str, Any], final: FinalPolicy, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    limits = [limit.value for limit in final.limits]
    further = {limit.constraint: limit.value for limit in final.limits[1:]}
    result: dict[str, Any] = {
        **settings,
        "run": run.name,
        "constraint": final.limit.constraint,
        "limit": final.limit.value,
        **({"further": further} if further else {}),
        "confidence": final.safety.confidence,
        "above": sum(row["above"] for row in rows),
        "over": sum(any(v > m for v, m in zip(_truths(row), limits, strict=True)) for row in rows),
        "correlation": _correlation(rows),
        "versions": rows,
    }
    write_atomic(run.path / REPLAY, json_bytes(plain(result)))
    return result


def _truths(row: Mapping[str, Any]) -> list[float]:
    """What a version is in truth, of each limit."""
    return [row["truth"], *row.get("further", [])]


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
    quantity = quantity_named(result["constraint"])
    n, last = len(result["versions"]), result["versions"][-1]
    limits = {result["constraint"]: result["limit"], **result.get("further", {})}
    limit = " or ".join(quantity_named(name).limit_text(value) for name, value in limits.items())
    sure = f"{result['confidence']:.0%}"
    told = result["correlation"]
    lines = [
        f"above       {result['above']:,} of {n:,} versions are shown to exceed {limit} (one-sided "
        f"{sure}, each by itself); of {result['over']:,} the mean lies above",
        f"last        version {last['version']:,}: {quantity.text(last['truth'])} "
        f"[{quantity.text(last['low'])}, {quantity.text(last['high'])}] {quantity.per_episode}",
    ]
    if told is not None:
        lines.append(f"estimates   correlate with the truth by {told:.2f} over versions")
    return "\n".join(lines)
