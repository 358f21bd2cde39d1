"""Where nothing can be written it is said before any work, or written elsewhere; nothing is lost.

A folder that is not ours: the tests may run as root, whom no permission binds, so the operating
system's own calls are made to fail for what lies in it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest

from safe_offrl import cli, commands
from safe_offrl.assess.fitted_features import FittedConfig
from safe_offrl.commands import assess
from safe_offrl.record.run import RunDir
from tests.failing_disk import FAULTS, fail
from tests.test_resume import pretrain_plan, pretrained, root, silent

__all__ = ["pretrain_plan", "pretrained", "root"]  # fixtures

QUICK = FittedConfig(steps=60, networks=1, replicates=20, groups=20)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assess, "CONFIG", QUICK)


def close_folder(folder: Path, fault: str, patch: pytest.MonkeyPatch) -> None:
    """From now on nothing can be written there, nor locked."""
    fail(patch, "write", fault, lambda path, _: folder in path.parents)

    class Lock(filelock.FileLock):
        def acquire(self, *arguments: Any, **named: Any) -> Any:
            if folder in Path(self.lock_file).parents:
                raise OSError(FAULTS[fault], os.strerror(FAULTS[fault]), self.lock_file)
            return super().acquire(*arguments, **named)

    patch.setattr(filelock, "FileLock", Lock)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["safe-offrl", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def no_work(*_: Any, **__: Any) -> Any:
    raise AssertionError("the work has begun")


WORK = {
    "evaluate": (commands.evaluate, "final_policy"),
    "assess": (commands.assess, "assess_policy"),
    "export": (commands.export, "final_policy"),
    "certify": (commands.certify, "final_policy"),
}


@pytest.mark.promise("R6")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", WORK)
def test_a_run_that_cannot_be_written_is_refused_before_any_work(
    pretrained: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    fault: str,
) -> None:
    before = contents(pretrained.path)
    close_folder(pretrained.path, fault, monkeypatch)
    module, name = WORK[command]
    monkeypatch.setattr(module, name, no_work)
    assert call(monkeypatch, command, str(pretrained.path)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(
        f'error: Nothing can be written into the run folder "{pretrained.path}" '
        f"({os.strerror(FAULTS[fault])}). "
    )
    # It advises what the command has.
    assert call(monkeypatch, command, "--help") == 0
    has = capsys.readouterr().out
    for option in ("--out", "--resume"):
        assert option not in said or option in has
    assert ("--out" in said) == (command != "certify")
    assert contents(pretrained.path) == before


@pytest.mark.promise("R6")
@pytest.mark.parametrize("command", ["evaluate", "assess", "export"])
def test_with_out_it_is_written_elsewhere(
    pretrained: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    before = contents(pretrained.path)
    close_folder(pretrained.path, "denied", monkeypatch)
    out = tmp_path / "new" / "folder" / f"{command}.json"
    given = ["--episodes", "3"] if command == "evaluate" else []
    given += ["--format", "torchscript"] if command == "export" else ["--json"]
    assert call(monkeypatch, command, str(pretrained.path), "--out", str(out), *given) == 0
    printed = capsys.readouterr()
    if command == "export":
        assert out.stat().st_size > 1000
        assert json.loads(out.with_name(f"{out.name}.json").read_bytes())["policy"]["sha256"]
    else:
        assert json.loads(out.read_bytes()) == json.loads(printed.out)
        assert f"file        {out}" in printed.err
    assert contents(pretrained.path) == before


@pytest.mark.parametrize("command", ["evaluate", "assess", "export"])
def test_what_is_written_elsewhere_is_what_lies_in_the_run_otherwise(
    root: Path, pretrained: RunDir, tmp_path: Path, command: str
) -> None:
    calls: dict[str, Callable[..., Any]] = {
        "evaluate": lambda **named: commands.evaluate_run(pretrained.path, episodes=3, **named),
        "assess": lambda **named: commands.assess_runs([pretrained.path], **named),
        "export": lambda **named: commands.export_run(
            pretrained.path, file_format="torchscript", **named
        ),
    }
    elsewhere = calls[command](out=tmp_path / "a.pt", say=silent)
    written = tmp_path / "a.pt"
    if command == "evaluate":
        assert not (pretrained.path / "evaluation.json").exists()
        calls[command](say=silent)
        assert written.read_bytes() == (pretrained.path / "evaluation.json").read_bytes()
        (pretrained.path / "evaluation.json").unlink()
    elif command == "assess":
        assert not (pretrained.path / "assessment.json").exists()
        assert calls[command](say=silent) == elsewhere
        stored = pretrained.read_json("assessment.json")["estimates"]
        assert stored == json.loads(written.read_bytes())["runs"][str(pretrained.path)]["estimates"]
        (pretrained.path / "assessment.json").unlink()
    else:
        inside = calls[command](say=silent)
        for key in ("policy", "shield", "observation", "inputs", "outputs"):
            assert inside[key] == elsewhere[key]


@pytest.mark.promise("R6")
@pytest.mark.parametrize("kind", ["a folder", "below a file", *FAULTS])
@pytest.mark.parametrize("command", ["evaluate", "assess", "export", "collect"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    pretrained: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    kind: str,
) -> None:
    out = tmp_path / "out.hdf5"
    if kind == "a folder":
        out.mkdir()
    elif kind == "below a file":
        (tmp_path / "file").write_text("no folder")
        out = tmp_path / "file" / "out.hdf5"
    else:
        close_folder(tmp_path, kind, monkeypatch)
    module, name = WORK.get(command, (commands.collect, "build_dataset"))
    monkeypatch.setattr(module, name, no_work)
    subject = [] if command == "collect" else [str(pretrained.path)]
    assert call(monkeypatch, command, *subject, "--out", str(out)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f'error: "{out}" ')


def test_a_fine_tuning_starts_from_a_run_that_cannot_be_written(
    pretrained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is assessed as any other, and only the file is not kept."""
    close_folder(pretrained.path, "denied", monkeypatch)
    config = commands.finetune_config(pretrained, budget=600, epsilon=0.001)
    said: list[str] = []
    plan = commands.plan_finetune(pretrained, config, say=said.append)
    plan.env.close()
    assert plan.config.probation  # what the gate is for
    assert any("fitted Q evaluation" in line for line in said)
    assert not (pretrained.path / "assessment.json").exists()


@pytest.mark.promise("R6")
@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_disk_that_fails_later_advises_nothing_that_the_command_lacks(
    pretrained: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    results = (".evaluation.json.", ".policy.pt.")  # as they are called before they are whole
    fail(monkeypatch, "fsync", "full", lambda path, _: path.name.startswith(results))
    given = ["--episodes", "3"] if command == "evaluate" else ["--format", "torchscript"]
    assert call(monkeypatch, command, str(pretrained.path), *given) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].endswith("free the cause, then try again.")
    assert "--resume" not in printed.err
    if command == "evaluate":  # what was found is not lost
        assert "accidents in 3 episodes" in printed.out
