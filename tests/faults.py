"""The fault-injection harness: real processes, killed for real, at moments of which it keeps count.

A kill is triggered by what the process writes: after so many further lines of its ledger (or, while
it pretrains, of its metrics), within the next episode, in the next half-written checkpoint, or some
milliseconds later. The environment's own log and the files that are left say where it fell.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

from safe_offrl import cli
from tests.fault_environments import LOG

POLL_SECONDS = 0.0003
DELAY_SECONDS = 0.03  # between what triggers a kill and the kill, at most
PATIENCE_SECONDS = 120.0


class EnvironmentEpisode(NamedTuple):
    """What the environment itself did in one episode."""

    seed: int
    steps: int
    accident: bool
    ended: bool


# Every process is forked from one that has imported everything and done nothing with it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["safe_offrl.commands", "torch.utils.tensorboard"])


def start(folder: Path, *arguments: str, log: Path | None = None) -> ForkServerProcess:
    """Run `safe-offrl ARGUMENTS` of these sources in ``folder``; its environment writes ``log``."""
    process = CONTEXT.Process(target=_command, args=(folder, arguments, log))
    process.start()
    return process


def _command(folder: Path, arguments: tuple[str, ...], log: Path | None) -> None:
    os.chdir(folder)
    os.environ.update({"OMP_NUM_THREADS": "1"} | ({LOG: str(log)} if log else {}))
    sys.argv = ["safe-offrl", *arguments]
    with (
        Path("said.txt").open("w") as said,
        Path("errors.txt").open("w") as errors,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(errors),
    ):
        cli.main()


def finish(process: ForkServerProcess, folder: Path) -> None:
    """Wait for the process to end well."""
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 0, (folder / "errors.txt").read_text()


def lines_of(path: Path) -> int:
    """Whole lines of a file; 0 if there is none."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def kill_when(process: ForkServerProcess, due: Callable[[], bool], delay: float) -> bool:
    """Kill -9 the process ``delay`` seconds after ``due()``; False if it ended by itself."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not due():
        if process.exitcode is not None:
            return False
        assert time.monotonic() < deadline, "the process neither ended nor wrote anything"
        time.sleep(POLL_SECONDS)
    time.sleep(delay)
    process.kill()
    process.join()
    return bool(process.exitcode)  # minus the signal's number


def played(log: Path) -> list[EnvironmentEpisode]:
    """The environment's own side of the story."""
    found: list[EnvironmentEpisode] = []
    for line in log.read_text().splitlines() if log.is_file() else []:
        word, _, number = line.partition(" ")
        if word == "reset":
            found.append(EnvironmentEpisode(int(number), 0, False, False))
        elif word == "step":
            last = found[-1]
            found[-1] = last._replace(steps=last.steps + 1, accident=last.accident or number == "1")
        else:
            found[-1] = found[-1]._replace(ended=True)
    return found


def in_an_episode(log: Path) -> bool:
    """Whether the last thing that the environment did was a step, with more to come."""
    # In reality the reservation is on record before the environment has written anything.
    return log.is_file() and log.read_bytes().endswith((b"step 0\n", b"step 1\n"))


def where_it_fell(run: Path, log: Path | None) -> str:
    """Where a kill found the process: "checkpoint" (half written), "episode" or "between"."""
    if list((run / "checkpoints").glob(".*.tmp")):
        return "checkpoint"
    episodes = played(log) if log else []
    return "episode" if episodes and not episodes[-1].ended else "between"


def run_and_kill(
    folder: Path,
    command: str,
    name: str,
    arguments: list[str],
    *,
    kills: int,
    rng: random.Random,
    log: Path | None = None,
) -> list[str]:
    """Run to the end through up to ``kills`` kills; returns where each of them fell.

    Fewer if the run ends before. A third of the kills wait for a checkpoint that is half written,
    a third for a step within an episode, and the rest fall wherever a random delay ends.
    """
    run = folder / "runs" / name
    growing = run / ("ledger.jsonl" if command == "finetune" else "metrics.jsonl")
    fell: list[str] = []
    while len(fell) < kills:
        known = run.is_dir() and (run / "run.json").is_file()
        given = ["--resume", name] if known else ["--name", name, *arguments]
        wanted = lines_of(growing) + rng.randint(1, 4)
        waits_for = {
            "checkpoint": lambda: any((run / "checkpoints").glob(".*.tmp")),
            "episode": lambda: log is None or in_an_episode(log),
            "anything": lambda: True,
        }
        chosen = rng.choice(list(waits_for))
        delay = rng.uniform(0.0, DELAY_SECONDS) if chosen == "anything" else 0.0

        def due(wanted: int = wanted, there: Callable[[], bool] = waits_for[chosen]) -> bool:
            return lines_of(growing) >= wanted and there()

        process = start(folder, command, *given, "--checkpoint-seconds", "0", log=log)
        if not kill_when(process, due, delay):
            finish(process, folder)
            return fell
        fell.append(where_it_fell(run, log))
    finish(start(folder, command, "--resume", name, "--checkpoint-seconds", "0", log=log), folder)
    return fell
