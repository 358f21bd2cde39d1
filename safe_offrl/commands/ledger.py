"""Print a run's ledger, and say whether it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safe_offrl.commands.common import say_plain
from safe_offrl.errors import RunError
from safe_offrl.record.find_run import find_run
from safe_offrl.record.ledger import Ledger
from safe_offrl.record.progress import Say
from safe_offrl.record.run import RunDir
from safe_offrl.types import Episode

SHOWN_VERSIONS = 10  # the last ones; --json has all
SHOWN_EPISODES = 5
COLUMNS = ("episodes", "steps", "accidents", "unknown", "cost")


def show_ledger(
    run_name: str | Path, *, runs: str | Path = "runs", say: Say = say_plain
) -> dict[str, Any]:
    """Verify a run's ledger and print what it counts; returns it as plain values.

    Checksums, numbering and hash chain are checked, the chain's start against config.yaml, the
    number of episodes against run.json and the newest checkpoint, and the totals of steps.
    ``result["intact"]`` says whether all of it holds, ``result["problem"]`` what does not.
    """
    # Checks.
    run = find_run(run_name, Path(runs))
    try:
        ledger = run.ledger()
        _check_against_run(run, ledger)
    except RunError as error:
        say(f"BROKEN      {error}")
        return {"run": str(run.path), "intact": False, "problem": str(error)}
    # Counts.
    counted = ledger.counted
    result = {
        "run": str(run.path),
        "intact": True,
        "problem": None,
        "lines": ledger.lines,
        "chained": ledger.chained,
        "head": ledger.head,
        "open": ledger.reserved is not None,
        "total": _totals(counted),
        "phases": _totals_by(counted, "phase"),
        "versions": _totals_by(counted, "version"),
        "last": [episode._asdict() for episode in counted[-SHOWN_EPISODES:]],
    }
    say("\n".join(_lines(run, ledger, result)))
    return result


def _check_against_run(run: RunDir, ledger: Ledger) -> None:
    """Raise RunError if the ledger lacks episodes of the checkpoint, or its totals do not add up.

    A run that is damaged elsewhere still has its ledger read.
    """
    try:
        kept = run.load_checkpoint().counts["ledger"]
    except RunError:
        kept = 0
    if len(ledger.episodes) < kept:
        raise RunError(
            f"The ledger has {len(ledger.episodes)} episodes, the newest checkpoint counted "
            f"{kept}. Restore it from a backup."
        )
    steps = 0
    for episode in ledger.counted:
        steps += episode.steps
        if episode.total_steps != steps:
            raise RunError(
                f"Episode {episode.index} states {episode.total_steps} steps in all, but the "
                f"episodes sum to {steps}. Restore the ledger from a backup."
            )


def _totals(episodes: Sequence[Episode]) -> dict[str, float]:
    """Sums over episodes; ``unknown`` are accidents of episodes that were lost or faulty."""
    return {
        "episodes": len(episodes),
        "steps": sum(episode.steps for episode in episodes),
        "accidents": sum(episode.accident for episode in episodes),
        "unknown": sum(episode.outcome != "complete" for episode in episodes),
        "cost": sum(episode.cost for episode in episodes),
    }


def _totals_by(episodes: Sequence[Episode], key: str) -> list[dict[str, Any]]:
    """:func:`_totals` by phase or by version, in order of appearance."""
    groups: dict[Any, list[Episode]] = {}
    for episode in episodes:
        groups.setdefault(getattr(episode, key), []).append(episode)
    return [{key: value, **_totals(group)} for value, group in groups.items()]


def _lines(run: RunDir, ledger: Ledger, result: dict[str, Any]) -> list[str]:
    """The report for people."""
    # Integrity.
    total, unchained = result["total"], ledger.lines - ledger.chained
    intact = f"{ledger.lines:,} lines, checksums and hash chain intact, head {ledger.head[:16]}"
    if unchained == ledger.lines:
        intact = f"{ledger.lines:,} lines, checksums intact; not chained"
    elif unchained:
        intact += f" (the first {unchained:,} lines were written by a version without a chain)"
    # Totals.
    lines = [
        f"ledger      {run.path / 'ledger.jsonl'}",
        f"verified    {intact}",
        f"counted     {total['episodes']:,} episodes, {total['steps']:,} steps, "
        f"{total['accidents']:,} with an accident"
        + (f" ({total['unknown']:,} of unknown outcome)" if total["unknown"] else ""),
    ]
    if result["open"]:
        lines.append("open        the last episode has no end on record: in progress, or lost")
    # Counts by phase, and by version of the policy.
    versions = result["versions"]
    for key, groups in (("phase", result["phases"]), ("version", versions[-SHOWN_VERSIONS:])):
        lines.append(f"\n{key:<10}" + "".join(f"{name:>11}" for name in COLUMNS))
        lines += [
            f"{group[key]!s:<10}"
            + "".join(f"{group[name]:>11,}" for name in COLUMNS[:-1])
            + f"{group['cost']:>11,.6g}"
            for group in groups
        ]
    if len(versions) > SHOWN_VERSIONS:
        lines.append(f"(the last {SHOWN_VERSIONS} of {len(versions)} versions; --json has all)")
    # Last episodes.
    lines.append("\nlast episodes")
    for episode in result["last"]:
        lines.append(
            "  {index:>7,}  {outcome:<8}  {steps:>6,} steps  cost {cost:<8.4g}  "
            "return {episode_return:<10.4g}".format(**episode)
            + ("accident" if episode["accident"] else "")
        )
    return lines
