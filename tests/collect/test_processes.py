"""Work in processes: in order, with progress, and errors that arrive."""

import os
import time
from collections.abc import Callable

import pytest

from safe_offrl.collect.processes import run_jobs
from safe_offrl.errors import ConfigError


def square(number: int, progress: Callable[[str], None]) -> tuple[int, int]:
    time.sleep(0.2 * (number == 2))  # the first is the last to be done
    progress(f"{number} done")
    if number < 0:
        raise ConfigError("negative. Give a positive one.")
    return number**2, os.getpid()


def test_results_are_in_order_and_come_from_other_processes() -> None:
    messages: list[str] = []
    results = run_jobs(square, [2, 3, 4], workers=2, progress=messages.append)
    assert [r for r, _ in results] == [4, 9, 16]
    assert os.getpid() not in {pid for _, pid in results}
    assert sorted(messages) == ["2 done", "3 done", "4 done"]


def test_one_worker_or_one_job_needs_no_process() -> None:
    here = os.getpid()
    assert run_jobs(square, [2, 3], workers=1) == [(4, here), (9, here)]
    assert run_jobs(square, [5], workers=2) == [(25, here)]
    assert run_jobs(square, [], workers=2) == []


def test_an_error_in_a_process_is_raised_here() -> None:
    with pytest.raises(ConfigError, match="negative"):
        run_jobs(square, [1, -1, 2], workers=2)
