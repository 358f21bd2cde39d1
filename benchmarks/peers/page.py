"""The page of a comparison with d3rlpy, made of its records."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from scipy import special

from benchmarks.peers.settings import ALGORITHMS, TASKS
from safe_offrl.stats.fixed import mean_and_error

Record = dict[str, Any]
CONFIDENCE = 0.95
COLUMNS = ("ours", "deployed", "d3rlpy", "ours - d3rlpy", "ours /s", "d3rlpy /s", "ratio", "in all")
ROW = "{:<14}{:>6}{:>10}{:>10}{:>10}  {:<32}{:>9}{:>11}  {:<20}{:>7}  {}"


class Difference(NamedTuple):
    """Of two means, with its interval; NaN where there are too few values."""

    value: float
    low: float
    high: float


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean of ours less mean of theirs, by Welch's t: their spreads may differ."""
    a, b = mean_and_error(ours), mean_and_error(theirs)
    value, error = a.value - b.value, math.hypot(a.error, b.error)
    if math.isnan(error) or error == 0.0:
        return Difference(value, value - error, value + error)
    freedom = error**4 / (a.error**4 / (len(ours) - 1) + b.error**4 / (len(theirs) - 1))
    reach = error * float(special.stdtrit(freedom, (1.0 + CONFIDENCE) / 2.0))
    return Difference(value, value - reach, value + reach)


def paces(record: Record, library: str) -> list[float]:
    """Updates a CPU second in each round but the first."""
    seconds = record[library]["cpu_seconds"]
    return [n / s for n, s in zip(record["updates"][1:], seconds[1:], strict=True)]


def row(algorithm: str, records: Sequence[Record]) -> tuple[str, bool, bool]:
    """One line of all seeds; whether ours returns less beyond the interval, and is slower."""
    ours, theirs = ([r[name]["return"] for r in records] for name in ("ours", "theirs"))
    deployed = statistics.mean(r["ours"]["deployed_return"] for r in records)
    gap = difference(ours, theirs)
    our_pace, their_pace = (
        [pace for r in records for pace in paces(r, name)] for name in ("ours", "theirs")
    )
    ratios = [a / b for a, b in zip(our_pace, their_pace, strict=True)]
    our_time, their_time = (
        sum(sum(r[name]["seconds"]) for r in records) for name in ("ours", "theirs")
    )
    below, slower = gap.high < 0.0, statistics.median(ratios) < 1.0
    text = ROW.format(
        algorithm,
        len(records),
        f"{statistics.mean(ours):.3f}",
        f"{deployed:.3f}",
        f"{statistics.mean(theirs):.3f}",
        f"{gap.value:.3f} [{gap.low:.3f}, {gap.high:.3f}]".replace("nan", "?"),
        f"{statistics.median(our_pace):.0f}",
        f"{statistics.median(their_pace):.0f}",
        f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
        f"{their_time / our_time:.2f}",
        ", ".join(["below"] * below + ["slower"] * slower),
    )
    return text.rstrip(), below, slower


def page(records: Sequence[Record], wanted: int, steps: int, episodes: int) -> str:
    """The whole text, of records of the same settings but for algorithm, task and seed."""
    lines = [
        f"Our learners beside d3rlpy's: {steps:,} steps on the same log, with the settings of",
        f"benchmarks/peers/settings.py; {len(records)} of {wanted} pairs are finished.",
        f"Returns: of {episodes} episodes, the same for all, undiscounted, mean over seeds. ours",
        "and d3rlpy act by the mean (or most probable) action, deployed is ours as it is. ours -",
        f"d3rlpy with its {CONFIDENCE:.0%} interval over seeds (Welch's t); below: all of it is",
        "below 0, as chance alone makes it in one row of forty. /s: updates a CPU second, one",
        "thread, in turns on one core, without the first tenth, in which ours may compile; ratio:",
        "median [lowest, highest] of the turns; slower: its median is below 1. in all: their",
        "seconds over ours, with compiling.",
    ]
    order = list(ALGORITHMS)
    flagged: dict[str, list[str]] = {"below": [], "slower": []}
    for task in TASKS:
        of_task = sorted(
            (r for r in records if r["task"] == task), key=lambda r: order.index(r["algorithm"])
        )
        if not of_task:
            continue
        logged = of_task[0]["log_return"]
        lines += ["", f"{task}, mean return of the log {logged:.3f}"]
        lines.append(ROW.format("", "seeds", *COLUMNS, "").rstrip())
        for algorithm, group in groupby(of_task, key=lambda r: r["algorithm"]):
            text, below, slower = row(algorithm, list(group))
            lines.append(text)
            for word, applies in (("below", below), ("slower", slower)):
                flagged[word] += [f"{algorithm} on {task}"] * applies
    lines.append("")
    lines += [f"{word}: {', '.join(found) or 'none'}" for word, found in flagged.items()]
    return "\n".join(lines) + "\n"
