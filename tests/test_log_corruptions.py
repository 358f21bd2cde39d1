"""A corrupted log gives the true counts or a sentence that names the fault; a clean one neither."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable

import pytest

from tests.clean_logs import CLEAN
from tests.corruption_table import CORRUPTIONS
from tests.log_corruptions import TARGETS, WRONG, outcome, pairs, seen_clean, singles
from tests.log_forms import FORMS
from tests.promises import Record

Case = tuple[tuple[str, ...], str, str]
SHARE = 100  # of the pairs one in as many is tried each time


@pytest.mark.promise("R10")
@pytest.mark.parametrize("target", CLEAN)
def test_a_clean_log_is_loaded_as_it_is_and_without_a_doubt(target: str) -> None:
    doubts = {form: seen_clean(target, form) for form in FORMS}
    assert {form: doubt for form, doubt in doubts.items() if doubt} == {}


def tried(cases: Iterable[Case]) -> tuple[Counter[str], list[str]]:
    """How many came to what, and those that went wrong."""
    counts: Counter[str] = Counter()
    wrong = []
    for names, target, form in cases:
        if found := outcome(names, target, form):
            counts[found.what] += 1
            if found.what in WRONG:
                where = f"{' + '.join(names)} ({target}, {form})"
                wrong.append(f"{where}: {found.what}: {found.text}")
    return counts, wrong


def share(case: Case) -> bool:
    """The same cases in every process: a hash of their names chooses."""
    return zlib.crc32(repr(case).encode()) % SHARE == 0


@pytest.mark.promise("R10")
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_told_or_does_no_harm(name: str) -> None:
    """In one format of each log; in all of them with `make test-slow`."""
    turn = zlib.crc32(name.encode())
    forms = list(FORMS)
    cases = [((name,), target, forms[(turn + k) % len(forms)]) for k, target in enumerate(TARGETS)]
    assert tried(cases)[1] == []


@pytest.mark.promise("R10")
def test_a_share_of_the_pairs_is_told_or_does_no_harm() -> None:
    assert tried(filter(share, pairs()))[1] == []


@pytest.mark.slow
@pytest.mark.promise("R10")
@pytest.mark.parametrize("number", ["singles", "pairs"])
def test_every_corruption_in_every_format(number: str, figure: Record) -> None:
    counts, wrong = tried(singles() if number == "singles" else pairs())
    figure(
        "R10",
        f"corrupted logs, {number}: {counts['true']} true, {counts['refused']} refused, "
        f"{counts['remarked']} remarked, {counts['untellable']} that nobody can tell, "
        f"{len(wrong)} silent or misleading",
    )
    assert wrong == []
