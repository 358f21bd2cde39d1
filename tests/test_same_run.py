"""The same seed, threads and versions are the same run, in whichever process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from safe_offrl import cli
from safe_offrl.record.run import RunDir
from tests import faults
from tests.promises import Record
from tests.test_faults import ONLINE, folder, pretraining, record

__all__ = ["folder"]  # a fixture


@pytest.mark.promise("R8")
def test_two_processes_with_one_seed_write_the_same_run(folder: Path, figure: Record) -> None:
    online = ["offline", "--accept-risk", *ONLINE]
    for command, name, arguments in (
        ("pretrain", "offline-again", pretraining(folder)),
        ("finetune", "one", online),
        ("finetune", "two", online),
    ):
        faults.finish(faults.start(folder, command, "--name", name, *arguments), folder)
    names = ("offline", "offline-again", "one", "two")
    runs = {name: record(RunDir(folder / "runs" / name)) for name in names}
    assert runs["offline"] == runs["offline-again"]
    assert runs["one"] == runs["two"]
    figure("R8", "pretrain and finetune bitwise equal in 2 of 2 processes")


@pytest.mark.promise("R8")
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_run_goes_on_with_the_threads_that_it_began_with(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    run = folder / "runs" / f"{command}-two-threads"
    given = ["offline", "--accept-risk", *ONLINE] if command == "finetune" else pretraining(folder)
    arguments = ["--name", run.name, "--threads", "2", *given]
    process = faults.start(folder, command, *arguments, "--checkpoint-seconds", "0")
    growing = run / ("ledger.jsonl" if command == "finetune" else "metrics.jsonl")
    assert faults.kill_when(process, lambda: faults.lines_of(growing) > 0, 0.0)
    assert RunDir(run).read_json("versions.json")["threads"] == 2
    monkeypatch.setattr(
        sys, "argv", ["safe-offrl", command, "--resume", str(run), "--threads", "1"]
    )
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == (
        f'error: The run "{run.name}" computes with --threads 2, and with 1 it would come out '
        "differently. Leave --threads out, or start a new run.\n"
    )
