"""What the record costs: the share of a fine-tuning run that ledger and checkpoints take.

One run of 50k steps in PointHazard-v0, with everything that is on by default. The calls that write
are timed within it, here and not in the product: so the share is of one and the same run, however
busy the machine is. Writes a table to the standard output.

    python benchmarks/record_keeping.py [--budget 50000] [--pretrained RUN] [--kind sim real]
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from safe_offrl import commands
from safe_offrl.record.find_run import find_run
from safe_offrl.record.run import RunDir
from safe_offrl.train.finetune import Finetuning

# What is timed, by the row of the table that it belongs to.
TIMED: dict[str, tuple[tuple[type, str], ...]] = {
    "ledger": ((RunDir, "append_episode"), (RunDir, "reserve_episode")),
    "checkpoints": (
        (RunDir, "save_checkpoint"),
        (Finetuning, "state_dict"),  # copies for the checkpoint
        (Finetuning, "info"),
    ),
    "curves": ((RunDir, "log"), (RunDir, "log_iteration")),
}


class Clock:
    """Seconds and calls by row; a timed call within another counts once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.busy = False

    def timed(self, row: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, timed."""

        @functools.wraps(call)
        def wrapper(*arguments: Any, **named: Any) -> Any:
            if self.busy:
                return call(*arguments, **named)
            self.busy, begin = True, time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.busy = False
                self.seconds[row] += time.perf_counter() - begin
                self.calls[row] += call.__name__ not in ("state_dict", "info")

        return wrapper


@contextmanager
def timing() -> Iterator[Clock]:
    """Every call of :data:`TIMED` is timed inside."""
    clock = Clock()
    originals = [
        (owner, name, getattr(owner, name)) for row in TIMED.values() for owner, name in row
    ]
    for row, methods in TIMED.items():
        for owner, name in methods:
            setattr(owner, name, clock.timed(row, getattr(owner, name)))
    try:
        yield clock
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def measure(pretrained: RunDir, kind: str, budget: int, runs: Path) -> str:
    """One run; its rows of the table."""
    config = commands.finetune_config(pretrained, budget=budget, overrides=[f"env.kind={kind}"])
    plan = commands.plan_finetune(pretrained, config, accept_risk=True)
    begin = time.perf_counter()
    with timing() as clock:
        commands.finetune_run(plan, runs=runs, name=kind, say=lambda text: None)
    total = time.perf_counter() - begin
    episodes = len(RunDir(runs / kind).episodes())
    rows = [f"{kind:<5} {budget:,} steps, {episodes:,} episodes, {total:.0f} s"]
    for row, seconds in clock.seconds.items():
        each = 1000 * seconds / max(1, clock.calls[row])
        rows.append(
            f"      {row:<12} {clock.calls[row]:>6,} writes {each:>8.2f} ms each "
            f"{seconds:>7.2f} s {seconds / total:>8.2%}"
        )
    record = clock.seconds["ledger"] + clock.seconds["checkpoints"]
    rows.append(f"      ledger and checkpoints: {record / total:.2%} of the wall time")
    return "\n".join(rows)


def main() -> None:
    """Pretrain if no run is given, then one run of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, default=50_000)
    parser.add_argument("--pretrained", help="a finished pretrain run of PointHazard-v0")
    parser.add_argument("--kind", nargs="+", default=["sim", "real"], choices=["sim", "real"])
    parser.add_argument("--folder", help="where runs go: on the disk that is to be measured")
    given = parser.parse_args()
    print(
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python "
        f"{platform.python_version()}, torch {torch.__version__}, 1 thread; the machine was shared "
        "with other work",
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        if given.pretrained is None:
            plan = commands.plan_pretrain(commands.pretrain_config(), say=lambda text: None)
            pretrained = commands.pretrain_run(
                plan, runs=folder, name="pretrained", say=lambda text: None
            )
        else:
            pretrained = find_run(given.pretrained, Path("runs"), "pretrain")
        for kind in given.kind:
            print(measure(pretrained, kind, given.budget, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
