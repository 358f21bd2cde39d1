"""The promises of reliability and what the tests of them reached, as a table at the end.

A test that shows one is marked ``@pytest.mark.promise("R1")``; one that has a figure for it tells
the fixture ``figure``. `make test-slow` prints the table.
"""

from __future__ import annotations

from collections.abc import Callable

Record = Callable[[str, str], None]  # promise, figure

PROMISES = {
    "R1": "kill -9 and resume, simulation: bitwise",
    "R2": "budget in reality: charged <= budget",
    "R3": "no accident lost or counted twice",
    "R4": "torn ledger cut, damage an error",
    "R5": "corrupt checkpoints found, fall back",
    "R6": "disk full, unwritable, I/O error",
    "R7": "SIGTERM, SIGINT: saved, exit",
    "R8": "same seed, same run",
    "R9": "non-finite: stop, keep what is good",
    "R10": "dataset validated before training",
    "R11": "environment faults: charged, counted",
    "R12": "one writer per run folder",
    "R13": "loaders and settings fuzzed",
    "R14": "--help without torch",
}


def table(figures: dict[str, list[str]], passed: dict[str, int], failed: dict[str, int]) -> str:
    """One row a promise: its figures, and how many tests of it passed or failed."""
    rows = []
    for number, text in PROMISES.items():
        ran = passed.get(number, 0) + failed.get(number, 0)
        tests = f"{passed.get(number, 0)}/{ran} tests passed" if ran else "not tested"
        rows.append(f"{number:<4} {text:<42} {'; '.join([tests, *figures.get(number, [])])}")
    return "\n".join(rows)
