"""Independent pieces of work in several processes, with their progress."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from safe_offrl.record.progress import Say

Work = TypeVar("Work")
Result = TypeVar("Result")

POLL_SECONDS = 0.2  # how late a line of progress may be

_messages: Any = None  # in a worker: the queue of its lines of progress


def own_command(module: str) -> list[str]:
    """The start of a command line that runs a module of this package.

    As it is installed: without -P a folder of sources in the working directory would come first.
    """
    return [sys.executable, "-P", "-m", f"safe_offrl.{module}"]


def run_jobs(
    work: Callable[[Work, Say], Result],
    jobs: Sequence[Work],
    *,
    workers: int,
    progress: Say | None = None,
) -> list[Result]:
    """``work(job, progress)`` for every job, in up to ``workers`` processes; results in order.

    ``work`` is a module's function, and jobs and results can be pickled. With one worker, or one
    job, everything runs in this process. An exception of a job is raised here; the other jobs end
    at once then, and with this process.
    """
    # Jobs in this process.
    tell = progress or (lambda _message: None)
    if min(workers, len(jobs)) <= 1:
        return [work(job, tell) for job in jobs]
    # Worker processes.
    context = multiprocessing.get_context("spawn")  # Torch does not survive a fork.
    messages = context.Queue()
    theirs, ours = context.Pipe(duplex=False)  # The pipe ends with this process, whatever ends it.
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_begin, initargs=(messages, theirs)
    )
    # Messages and results.
    try:
        futures = [pool.submit(_work, work, job) for job in jobs]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
            _drain(messages, tell)
            for future in done:
                future.result()  # This raises at once what the job raised.
        results = [future.result() for future in futures]
    except BaseException:  # Nobody waits for what the others do.
        _drain(messages, tell)
        ours.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        theirs.close()
    # Last messages.
    _drain(messages, tell)
    ours.close()
    messages.close()
    return results


def _begin(messages: Any, parent: Connection) -> None:
    global _messages
    _messages = messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent decides.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    """End this process when the pipe from its parent does, in the middle of whatever it does."""
    parent.poll(None)
    os._exit(1)


def _work(work: Callable[[Work, Say], Result], job: Work) -> Result:
    return work(job, _messages.put)


def _drain(messages: Any, tell: Say) -> None:
    while True:
        try:
            tell(messages.get_nowait())
        except queue.Empty:
            return
