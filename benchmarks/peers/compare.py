"""Is what we learn as good as d3rlpy's, and as fast? The same log, sizes, steps and settings.

    python -m benchmarks.peers.compare --d3rlpy PYTHON [--algorithms bc iql ...] [--tasks ...]
                                       [--seeds 0 1 2] [--steps 10000] [--episodes 50]
                                       [--workers 2] [--out docs/results]

PYTHON is that of an environment with d3rlpy. Every learner is a process of its own with one thread.
The two of a pair take turns on one core, so that whatever else the machine does meets both alike;
then both act in the same episodes. A finished pair is a line of OUT/peers.jsonl, and the same
command goes on after the last. A line of other settings does not count, but one of other code does:
remove the file then. The page OUT/peers.txt is made of all lines of these steps and episodes. Exit
status 1 where a learner failed: the others go on without it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from benchmarks.peers.learner import Actions, Observations
from benchmarks.peers.page import page
from benchmarks.peers.settings import ALGORITHMS, COMMON, EXTRACTION, TASKS, tasks_of
from benchmarks.peers.tasks import Log, evaluate, read_log, write_for_them
from safe_offrl.errors import EnvError
from safe_offrl.files import write_atomic
from safe_offrl.record.json_lines import JsonLines

ROOT = Path(__file__).parents[2]
ROUNDS = 10  # in which a pair takes turns; the first is apart: it compiles
Record = dict[str, Any]


class Job(NamedTuple):
    """A pair: one algorithm of both libraries, on one task."""

    algorithm: str
    task: str
    seed: int


def settings_of(job: Job, steps: int, episodes: int) -> Record:
    """All that a pair's result depends on besides versions and machine; as JSON gives it back."""
    peer = ALGORITHMS[job.algorithm]
    extraction = EXTRACTION if peer.extracted else {}
    settings = {
        "steps": steps,
        "episodes": episodes,
        "common": asdict(COMMON),
        "peer": asdict(peer),
        "extraction": extraction,
    }
    read: Record = json.loads(json.dumps(settings))
    return read


def jobs_of(algorithms: Iterable[str], tasks: Iterable[str], seeds: Iterable[int]) -> list[Job]:
    """All pairs, a whole seed before the next: what is finished early is of everything."""
    return [
        Job(algorithm, task, seed)
        for seed in seeds
        for task in tasks
        for algorithm in algorithms
        if task in tasks_of(algorithm)
    ]


def finished(records: Iterable[Record], steps: int, episodes: int) -> dict[Job, Record]:
    """The latest record of each pair that has one of exactly these settings."""
    of_job = {Job(r["algorithm"], r["task"], r["seed"]): r for r in records}
    return {
        job: record
        for job, record in of_job.items()
        if job.algorithm in ALGORITHMS and record["settings"] == settings_of(job, steps, episodes)
    }


class LearnerFailedError(Exception):
    """A learner's process has ended where it should have answered."""


@dataclass(frozen=True)
class Process:
    """A learner in a process of its own (learner.py)."""

    name: str
    process: subprocess.Popen[str]
    errors: IO[bytes]  # a file: a pipe that nobody reads would fill up

    def train(self, updates: int) -> tuple[float, float]:
        """So many updates: seconds, and seconds of CPU."""
        answer = self._ask({"train": updates})
        return answer["seconds"], answer["cpu_seconds"]

    def act(self, observations: Observations, *, mean: bool) -> Actions:
        """Actions at these observations."""
        answer = self._ask({"act": observations.tolist(), "mean": mean})
        return np.array(answer["actions"], dtype=np.float32)

    def answer(self) -> Record:
        """What it says next; LearnerFailedError if it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            said = self.errors.read().decode(errors="replace")[-2000:]
            raise LearnerFailedError(f"{self.name} stopped:\n{said}")
        answer: Record = json.loads(line)
        return answer

    def _ask(self, request: Mapping[str, Any]) -> Record:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It has ended, and says below why.
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self.answer()


@contextlib.contextmanager
def started(
    python: str, library: str, job: Job, log: str, steps: int, core: int
) -> Iterator[Process]:
    """The process of one library's learner, built; it ends with the block."""
    words = map(str, (library, job.algorithm, log, job.seed, steps, core))
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [python, "-m", "benchmarks.peers.learner", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
        ) as process,
    ):
        name = f"{job.algorithm} of {library} on {job.task}, seed {job.seed}"
        running = Process(name, process, errors)
        try:
            running.answer()
            yield running
        finally:
            process.kill()


def run_pair(
    job: Job, log: Log, for_them: Path, pythons: Mapping[str, str], core: int, args: Any
) -> Record:
    """Train both in turns on this core, evaluate both; what is stored of it."""
    steps, episodes = args.steps, args.episodes
    with (
        started(pythons["ours"], "ours", job, job.task, steps, core) as ours,
        started(pythons["theirs"], "theirs", job, str(for_them), steps, core) as theirs,
    ):
        updates = [len(part) for part in np.array_split(np.arange(steps), ROUNDS)]
        processes = {"ours": ours, "theirs": theirs}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in processes}
        for k, n in enumerate(updates):
            for name in list(processes)[:: -1 if k % 2 else 1]:
                taken[name].append(processes[name].train(n))

        def mean_return(process: Process, *, mean: bool) -> float:
            def act(observations: Observations) -> Actions:
                return process.act(observations, mean=mean)

            return evaluate(job.task, log.normalizer, act, episodes)

        results = {}
        for name, process in processes.items():
            results[name] = {
                "return": mean_return(process, mean=True),
                "seconds": [wall for wall, _ in taken[name]],
                "cpu_seconds": [cpu for _, cpu in taken[name]],
            }
        results["ours"]["deployed_return"] = mean_return(ours, mean=False)
    return {
        **job._asdict(),
        **results,
        "updates": updates,
        "log_return": log.mean_return,
        "settings": settings_of(job, steps, episodes),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run what has no line yet, then write the page; the exit status."""
    args = parsed(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    lines, page_file = JsonLines(args.out / "peers.jsonl"), args.out / "peers.txt"
    lines.cut(len(lines.read()))  # A torn last line would spoil the next.
    have = finished(lines.read(), args.steps, args.episodes)
    todo = [j for j in jobs_of(args.algorithms, args.tasks, args.seeds) if j not in have]
    pythons = {"ours": sys.executable, "theirs": str(args.d3rlpy.absolute())}
    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[: args.workers]:
        cores.put(core)
    failures = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.workers) as pool:
        logs = {task: read_log(task) for task in dict.fromkeys(job.task for job in todo)}
        for task, log in logs.items():
            write_for_them(log.dataset, Path(folder, f"{task}.npz"))

        def on_a_core(job: Job) -> Record:
            core = cores.get()
            try:
                for_them = Path(folder, f"{job.task}.npz")
                return run_pair(job, logs[job.task], for_them, pythons, core, args)
            finally:
                cores.put(core)

        running = {pool.submit(on_a_core, job): job for job in todo}
        try:
            for done in as_completed(running):
                try:
                    record = done.result()
                except (LearnerFailedError, EnvError) as error:  # or it wants no finite action
                    failures.append(running[done])
                    print(*running[done], "failed:", error, flush=True)
                    continue
                lines.append(record)
                lines.sync()
                print(*running[done], "finished", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else all would run first
            raise
    have = finished(lines.read(), args.steps, args.episodes)  # however narrowly it was asked
    wanted = jobs_of(ALGORITHMS, TASKS, {*args.seeds, *(job.seed for job in have)})
    text = page(list(have.values()), len(wanted), args.steps, args.episodes)
    write_atomic(page_file, text.encode())
    print(text)
    return 1 if failures else 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    of_them = "Python of an environment with d3rlpy"
    parser.add_argument("--d3rlpy", type=Path, required=True, help=of_them)
    parser.add_argument(
        "--algorithms", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS)
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2, help="pairs at a time, a core each")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
