"""Independent pieces of work in several processes, with their progress."""

from __future__ import annotations

import multiprocessing
import queue
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
Progress = Callable[[str], None]

POLL_SECONDS = 0.2  # how late a line of progress may be

_messages: Any = None  # in a worker: the queue of its lines of progress


def own_command(module: str) -> list[str]:
    """The start of a command line that runs a module of this package.

    As it is installed: without -P a folder of sources in the working directory would come first.
    """
    return [sys.executable, "-P", "-m", f"safe_offrl.{module}"]


def run_jobs(
    work: Callable[[Job, Progress], Result],
    jobs: Sequence[Job],
    *,
    workers: int,
    progress: Progress | None = None,
) -> list[Result]:
    """``work(job, progress)`` for every job, in up to ``workers`` processes; results in order.

    ``work`` is a module's function, and jobs and results can be pickled. With one worker, or one
    job, everything runs in this process. An exception of a job is raised here; jobs not yet begun
    are dropped.
    """
    tell = progress or (lambda _message: None)
    if min(workers, len(jobs)) <= 1:
        return [work(job, tell) for job in jobs]
    context = multiprocessing.get_context("spawn")  # torch does not survive a fork
    messages = context.Queue()
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_begin, initargs=(messages,)
    )
    try:
        futures = [pool.submit(_work, work, job) for job in jobs]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
            _drain(messages, tell)
            for future in done:
                future.result()  # raises at once what the job raised
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
        _drain(messages, tell)
        messages.close()


def _begin(messages: Any) -> None:
    global _messages
    _messages = messages


def _work(work: Callable[[Job, Progress], Result], job: Job) -> Result:
    return work(job, _messages.put)


def _drain(messages: Any, tell: Progress) -> None:
    while True:
        try:
            tell(messages.get_nowait())
        except queue.Empty:
            return
