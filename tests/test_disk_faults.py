"""A disk that is full, not ours or broken: the run stops there, and what was written stays good."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safe_offrl import cli, commands
from safe_offrl.errors import RunError
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_names import require_runs_folder
from tests.failing_disk import FAULTS, fail
from tests.record.test_run import TENSORS, episode, make
from tests.test_real import real_plan
from tests.test_resume import (
    BUDGET,
    ONLINE,
    online_plan,
    pretrain_plan,
    pretrained,
    root,
    silent,
)

__all__ = ["pretrain_plan", "pretrained", "root"]  # fixtures

# Every write that a run depends on: which call fails, and where.
LEDGER = ("write ledger.jsonl", "fsync ledger.jsonl")
CHECKPOINT = (
    "write state.safetensors",
    "fsync state.safetensors",
    "write info.json",
    "write manifest.json",
    "fsync checkpoints",  # the folder
    "replace step-000000020",
)


@pytest.mark.promise("R6")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", [*LEDGER, *CHECKPOINT])
def test_what_was_there_before_a_failed_write_is_there_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, fault: str
) -> None:
    call, name = place.split()
    with make(tmp_path, name="run") as run:
        run.append_episode(episode(0))
        run.save_checkpoint(10, TENSORS, {"step": 10})

        def write() -> None:
            if place in LEDGER:
                run.append_episode(episode(1))
            else:
                run.save_checkpoint(20, TENSORS, {"step": 20})

        with monkeypatch.context() as patch:
            failed = fail(patch, call, fault, lambda path, _: path.name == name)
            with pytest.raises(OSError, match=os.strerror(FAULTS[fault])) as caught:
                write()
        assert len(failed) == 1
        assert call == "replace" or Path(caught.value.filename) == failed[0]
        if place in LEDGER:
            with pytest.raises(RuntimeError, match="a write to this ledger failed"):
                write()  # not even with the disk repaired
        assert not list((run.path / "checkpoints").glob(".*.tmp"))
    again = RunDir(tmp_path / "run")
    # Only the folder's own fsync comes when the new checkpoint is whole already.
    kept = again.load_checkpoint()
    assert kept.step == (20 if name == "checkpoints" else 10)
    with again:
        again.lock()
        again.rewind(kept)
        # A line whose fsync failed may be whole; half a line is cut off.
        assert again.recorded == [episode(0), episode(1)][: 1 + (place == LEDGER[1])]
        for index in (1, 2):
            again.append_episode(episode(index))
        assert again.episodes() == [episode(k) for k in range(3)]


def stopped_at(patch: pytest.MonkeyPatch, plan: Any) -> list[int]:
    """Counts steps in the plan's environment, one entry each."""
    taken: list[int] = []
    step = plan.env.step

    def counted(action: np.ndarray) -> Any:
        taken.append(1)
        return step(action)

    patch.setattr(plan.env, "step", counted)
    return taken


@pytest.mark.promise("R6")
@pytest.mark.parametrize(
    ("call", "outcome", "fault"),
    [
        ("write", "reserved", "full"),
        ("write", "complete", "denied"),
        ("fsync", "reserved", "broken"),
        ("fsync", "complete", "full"),
        ("replace", "checkpoint", "broken"),
    ],
)
def test_no_step_is_taken_after_a_failed_write(
    root: Path,
    pretrained: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    outcome: str,
    fault: str,
) -> None:
    plan = real_plan(pretrained)
    taken, at_failure = stopped_at(monkeypatch, plan), []
    name = f"{call}-{outcome}"

    def chosen(path: Path, data: bytes) -> bool:
        found = f'"outcome":"{outcome}"'.encode() in data
        if call == "replace":
            found = path.parent.name == "checkpoints" and not path.name.endswith("-000000000")
        if found:
            at_failure.append(len(taken))
        return found

    with monkeypatch.context() as patch:
        failed = fail(patch, call, fault, chosen)
        with pytest.raises(OSError, match=os.strerror(FAULTS[fault])):
            commands.finetune_run(plan, name=name, runs=root, say=silent)
    assert len(failed) == 1
    assert set(at_failure) == {len(taken)}
    assert (taken == []) == (outcome == "reserved")
    assert RunDir(root / name).load_checkpoint().step == 0


@pytest.mark.promise("R6")
@pytest.mark.parametrize("fault", FAULTS)
def test_no_checkpoint_counts_episodes_whose_fsync_failed(
    root: Path, pretrained: RunDir, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """In simulation the fsync comes before the checkpoint, and the run stops there just as well."""
    plan, name = online_plan(pretrained), f"unsynced-{fault}"
    taken, at_failure = stopped_at(monkeypatch, plan), []

    def chosen(path: Path, data: bytes) -> bool:
        if path == root / name / "ledger.jsonl":
            at_failure.append(len(taken))
        return bool(at_failure)

    with monkeypatch.context() as patch:
        fail(patch, "fsync", fault, chosen)
        with pytest.raises(OSError, match=os.strerror(FAULTS[fault])) as caught:
            commands.finetune_run(plan, name=name, runs=root, checkpoint_seconds=0, say=silent)
    assert str(caught.value.filename).endswith("ledger.jsonl")
    assert 0 < at_failure[0] == len(taken)
    assert RunDir(root / name).load_checkpoint().step == 0


@pytest.mark.promise("R6")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_user_reads_one_sentence_and_can_go_on(
    root: Path,
    pretrained: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    name = f"told-{fault}"
    ledger = root / name / "ledger.jsonl"
    given = ["offline", "--name", name, "--accept-risk", "--budget", str(BUDGET), *ONLINE]
    monkeypatch.setattr(sys, "argv", ["safe-offrl", "finetune", "--runs", str(root), *given])
    with monkeypatch.context() as patch:
        fail(patch, "write", fault, lambda path, data: path == ledger and b'"index":3,' in data)
        with pytest.raises(SystemExit) as left:
            cli.main()
    assert left.value.code == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: [Errno {FAULTS[fault]}] {os.strerror(FAULTS[fault])}: ")
    assert str(ledger) in said
    assert said.endswith(
        "What was written before is intact: free the cause, then continue with --resume."
    )
    assert len(RunDir(root / name).episodes()) == 3
    if fault == "full":  # as an example
        again = commands.resume_finetune(name, runs=root, say=silent)
        assert again.state["status"] == "finished"


# --- a folder that cannot be written ---


def spoil(folder: Path, kind: str, patch: pytest.MonkeyPatch) -> Path:
    """A runs folder in which no run can be written."""
    if kind == "a file":
        (folder / "runs").write_text("no folder")
        return folder / "runs"
    if kind == "below a file":
        (folder / "file").write_text("no folder")
        return folder / "file" / "runs"
    fail(patch, "write", kind, lambda path, _: path.parent == folder)
    return folder / "not-there-yet" / "runs"


@pytest.mark.promise("R6")
@pytest.mark.parametrize("kind", ["a file", "below a file", *FAULTS])
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_an_unwritable_runs_folder_is_refused_before_any_work(
    tmp_path: Path,
    pretrained: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    command: str,
) -> None:
    def working(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(commands, f"plan_{command}", working)
    runs = spoil(tmp_path, kind, monkeypatch)
    given = [str(pretrained.path)] if command == "finetune" else []
    monkeypatch.setattr(sys, "argv", ["safe-offrl", command, *given, "--runs", str(runs)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f'error: Nothing can be written into the runs folder "{runs}" (')


def test_a_name_that_is_taken_is_refused_before_any_work(tmp_path: Path) -> None:
    make(tmp_path, name="one").close()
    with pytest.raises(RunError, match="already exists"):
        require_runs_folder(tmp_path, "one")
    for runs in (tmp_path, tmp_path / "new" / "folder"):
        require_runs_folder(runs, "two")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]  # nothing is left behind
