"""A corrupted log gives the true counts or a sentence that names the fault; a clean one is clean."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.clean_logs import CLEAN
from tests.corruption_table import CORRUPTIONS
from tests.log_corruptions import TARGETS, WRONG, Outcome, outcomes, seen_clean
from tests.log_forms import FORMS
from tests.promises import Record


@pytest.mark.promise("R10")
@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_log_is_loaded_as_it_is_and_without_a_remark(name: str, tmp_path: Path) -> None:
    assert seen_clean(name, tmp_path) == {}


def wrong(found: list[tuple[str, Outcome]]) -> list[tuple[str, Outcome]]:
    return [(where, outcome) for where, outcome in found if outcome.what in WRONG]


@pytest.mark.promise("R10")
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_told_or_does_no_harm(name: str, tmp_path: Path) -> None:
    """In one format of each of two logs; in all of them with `make test-slow`."""
    found = [
        each
        for target in ("ledge", "buttons")
        for each in outcomes((name,), target, tmp_path, forms=("hdf5",))
    ]
    assert wrong(found) == []


@pytest.mark.slow
@pytest.mark.promise("R10")
def test_every_corruption_of_every_log_in_every_format(tmp_path: Path, figure: Record) -> None:
    found = [
        (f"{name}, {target}, {form}", outcome)
        for name in CORRUPTIONS
        for target in TARGETS
        for form, outcome in outcomes((name,), target, tmp_path)
    ]
    counts = Counter(outcome.what for _, outcome in found)
    figure(
        "R10",
        f"{len(CORRUPTIONS)} corruptions x {len(TARGETS)} logs x {len(FORMS)} formats: {dict(counts)}",
    )
    assert wrong(found) == []
