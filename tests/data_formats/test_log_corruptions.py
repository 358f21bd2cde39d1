"""A corrupted log gives the true counts or a sentence that names the fault; a clean one neither."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from safe_offrl import commands
from safe_offrl.errors import UserError
from tests.data_formats.clean_logs import CLEAN, Truth, clean, truth_of
from tests.data_formats.corruption_table import CORRUPTIONS
from tests.data_formats.log_corruptions import (
    TARGETS,
    WRONG,
    corrupted,
    in_words,
    load,
    outcome,
    pairs,
    remarks_of,
    seen_clean,
    singles,
)
from tests.data_formats.log_forms import FORMS, write_hdf5
from tests.data_formats.untellable import UNTELLABLE
from tests.promises import Record

Case = tuple[tuple[str, ...], str, str]
SHARE = 250  # of the pairs one in as many is tried each time


def test_the_truth_of_clean_logs_by_another_count() -> None:
    """Episode by episode in plain Python."""
    for name in CLEAN:
        log = clean(name)
        counts = {"accident": 0, "terminated": 0, "truncated": 0}
        accident = False
        for row in range(len(log.rows)):
            found = {key: array[row] for key, array in log.arrays.items()}
            accident |= bool(found["accidents"] if "accidents" in found else found["costs"] > 0)
            if found["terminals"] or found["timeouts"]:
                counts["accident"] += accident
                counts["terminated" if found["terminals"] else "truncated"] += 1
                accident = False
        assert log.arrays["terminals"][-1] or log.arrays["timeouts"][-1]
        assert truth_of(log, log.rows, log.spec) == Truth(
            episodes=counts["terminated"] + counts["truncated"],
            rows=len(log.rows),
            accident_episodes=counts["accident"],
            terminated=counts["terminated"],
            truncated=counts["truncated"],
            horizon=int(log.horizon or 0),
        )


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
    """In one format of every log but the largest; in all of them with `make test-slow`."""
    turn = itertools.cycle(FORMS)
    for _ in range(zlib.crc32(name.encode()) % len(FORMS)):
        next(turn)
    assert tried(((name,), target, next(turn)) for target in TARGETS[1:])[1] == []


@pytest.mark.promise("R10")
def test_a_share_of_the_pairs_is_told_or_does_no_harm() -> None:
    counts, wrong = tried(filter(share, pairs()))
    assert sum(counts.values()) > 30
    assert wrong == []


@pytest.mark.slow
@pytest.mark.promise("R10")
@pytest.mark.parametrize("number", ["alone", "in pairs"])
def test_every_corruption_in_every_format(number: str, figure: Record) -> None:
    counts, wrong = tried(singles() if number == "alone" else pairs())
    right = Counter({what: n for what, n in counts.items() if what not in WRONG})
    figure(
        "R10",
        f"{len(CORRUPTIONS)} corruptions of logs {number}, {len(FORMS)} formats: "
        f"{in_words(right)}, {len(wrong)} without a word",
    )
    assert wrong == []


@pytest.mark.slow
def test_what_is_listed_as_untellable_is_not_told() -> None:
    """Each entry of the list is still needed, and so is each name in it; but for those of pairs."""
    found = {
        (names[0], target, form)
        for names, target, form in singles()
        if (each := outcome(names, target, form)) and each.what == "untellable"
    }
    idle = [
        (name, entry.why)
        for entry in UNTELLABLE
        if not entry.beside
        for name in entry.names
        if not any(
            name == corruption
            and (target in entry.logs or not entry.logs)
            and (form in entry.forms or not entry.forms)
            for corruption, target, form in found
        )
    ]
    assert idle == []


# --- what the commands make of it ---


class Ledge(gymnasium.Env[Any, Any]):
    """Only its spaces are looked at."""

    observation_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)


gymnasium.register("CorruptedLedge-v0", entry_point=f"{__name__}:Ledge", max_episode_steps=40)


def command_output(command: str, path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `inspect` or `pretrain` prints before its first step; its sentence if it stops."""
    try:
        if command == "inspect":
            commands.inspect_dataset(path)
        else:
            config = commands.pretrain_config(env="CorruptedLedge-v0", dataset=str(path))
            print(commands.plan_pretrain(config).header)
    except UserError as error:
        print(error)
    return capsys.readouterr().out


@pytest.mark.promise("R10")
@pytest.mark.parametrize(
    "name",
    [
        "terminals held for five rows",
        "half of the timeouts missing",
        "last rows lost",
        "timeouts missing",
        'timeouts as "truncateds"',
        'costs as "cost"',
    ],
)
def test_every_command_says_what_the_load_says(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = corrupted(clean("ledge"), (name,))
    assert log is not None
    path = write_hdf5(log, tmp_path)
    try:
        sentences = remarks_of(load(path, log))
    except UserError as error:
        sentences = [str(error)]
    assert sentences
    for command in ("inspect", "pretrain"):
        text = command_output(command, path, capsys)
        assert [sentence for sentence in sentences if sentence not in text] == []


def test_a_horizon_other_than_the_environments_stops_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = corrupted(clean("ledge"), ("horizon x 5 in the file",))
    assert log is not None
    text = command_output("pretrain", write_hdf5(log, tmp_path), capsys)
    assert "200 steps" in text
    assert "after 40" in text
