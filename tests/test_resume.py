"""An interrupted and resumed run is, byte for byte, the run that was never interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from safe_offrl import commands
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.record import checkpoints
from safe_offrl.record.progress import StopSignal
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import parse_run_yaml
from safe_offrl.train.finetune_config import FinetuneConfig
from tests.compute.test_descent import compiles
from tests.failing_disk import cut_power, watch

SCRIPT = Path(sys.executable).parent / "safe-offrl"
TINY = ["alignment_steps=20", "log_every=10", "batch_size=32"]
TINY += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]
BUDGET = 1500
ONLINE = ["warmup_steps=400", "iteration_steps=200", "batch_size=32"]


class Killed(Exception):
    """Stands for a kill at a chosen moment: nothing after it is executed."""


def silent(text: str) -> None:
    pass


def record(run: RunDir) -> dict[str, object]:
    """Everything that must not depend on interruptions."""
    names = ("metrics.jsonl", "iterations.jsonl", "ledger.jsonl", "calibration.json")
    files = {n: (run.path / n).read_bytes() for n in names if (run.path / n).is_file()}
    checkpoint = run.load_checkpoint()
    assert run.state["status"] == "finished"
    return {**files, "step": checkpoint.step, "sha256": checkpoint.sha256}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pretrain_plan(tiny_dataset: Path) -> commands.PretrainPlan:
    config = commands.pretrain_config(dataset=str(tiny_dataset), steps=60, overrides=TINY)
    return commands.plan_pretrain(config, say=silent)


@pytest.fixture(scope="module")
def pretrained(root: Path, pretrain_plan: commands.PretrainPlan) -> RunDir:
    return commands.pretrain_run(pretrain_plan, name="offline", runs=root, say=silent)


def online_plan(pretrained: RunDir, *overrides: str) -> commands.FinetunePlan:
    config = commands.finetune_config(pretrained, budget=BUDGET, overrides=[*ONLINE, *overrides])
    return commands.plan_finetune(pretrained, config, accept_risk=True)


@pytest.fixture(scope="module")
def online(root: Path, pretrained: RunDir) -> RunDir:
    return commands.finetune_run(online_plan(pretrained), name="online", runs=root, say=silent)


def kill_at(monkeypatch: pytest.MonkeyPatch, method: str, call: int) -> None:
    """Make the ``call``-th call of a RunDir method raise instead of doing its work."""
    original, calls = getattr(RunDir, method), [0]

    def counting(self: RunDir, *arguments: object, **named: object) -> object:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return original(self, *arguments, **named)

    monkeypatch.setattr(RunDir, method, counting)


def killed(
    monkeypatch: pytest.MonkeyPatch, plan: commands.FinetunePlan, path: Path, method: str, call: int
) -> None:
    """Leave behind a run that was killed at the ``call``-th call of a RunDir method."""
    with monkeypatch.context() as patch:
        kill_at(patch, method, call)
        with pytest.raises(Killed):
            commands.finetune_run(
                plan, name=path.name, runs=path.parent, checkpoint_seconds=0.0, say=silent
            )


@pytest.mark.parametrize(
    ("method", "call"),
    [("save_checkpoint", 1), ("log", 4), ("save_checkpoint", 6), ("write_json", 2)],
)
def test_pretrain(
    root: Path,
    pretrain_plan: commands.PretrainPlan,
    pretrained: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    call: int,
) -> None:
    name = f"offline-{method}-{call}"
    with monkeypatch.context() as patch:
        kill_at(patch, method, call)
        with pytest.raises(Killed):
            commands.pretrain_run(
                pretrain_plan, name=name, runs=root, checkpoint_seconds=0.0, say=silent
            )
    again = commands.resume_pretrain(name, runs=root, say=silent)
    assert record(again) == record(pretrained)


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("save_checkpoint", 1),
        ("append_episode", 7),
        ("append_episode", 13),
        ("log_iteration", 2),
        ("save_checkpoint", 4),
    ],
)
def test_finetune(
    root: Path,
    pretrained: RunDir,
    online: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    call: int,
) -> None:
    name = f"online-{method}-{call}"
    killed(monkeypatch, online_plan(pretrained), root / name, method, call)
    assert (call > 1) <= len(RunDir(root / name).episodes()) < len(online.episodes())
    again = commands.resume_finetune(name, runs=root, say=silent)
    assert record(again) == record(online)


def test_an_evaluation_does_not_outlive_the_policy_that_it_was_of(
    root: Path, pretrained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, "append_episode", 13)
        with pytest.raises(Killed):
            commands.finetune_run(
                online_plan(pretrained),
                name="evaluated",
                runs=root,
                checkpoint_seconds=0.0,
                say=silent,
            )
    evaluation = root / "evaluated" / "evaluation.json"
    commands.evaluate_run("evaluated", episodes=1, runs=root, say=silent)
    with pytest.raises(ConfigError, match="--threads"):
        commands.resume_finetune("evaluated", runs=root, threads=7, say=silent)
    assert evaluation.is_file()  # nothing has moved
    commands.resume_finetune("evaluated", runs=root, say=silent)
    assert not evaluation.exists()
    commands.evaluate_run("evaluated", episodes=1, runs=root, say=silent)
    with pytest.raises(RunError, match="finished already"):
        commands.resume_finetune("evaluated", runs=root, say=silent)
    assert evaluation.is_file()


def test_a_run_that_lost_its_checkpoints_is_not_begun_again(root: Path, online: RunDir) -> None:
    lost = root / "lost"
    shutil.copytree(online.path, lost, ignore=shutil.ignore_patterns("step-*", "writer.pid"))
    RunDir(lost).write_json("run.json", {**online.state, "status": "running"})
    with pytest.raises(RunError, match="has no checkpoint"):
        commands.resume_finetune(lost, say=silent)
    assert RunDir(lost).episodes() == online.episodes()


def test_runs_and_data_that_moved_together_go_on(
    tmp_path: Path, pretrained: RunDir, tiny_dataset: Path
) -> None:
    project = tmp_path / "here"
    (project / "data").mkdir(parents=True)
    log = shutil.copy(tiny_dataset, project / "data" / "log.hdf5")
    config = commands.pretrain_config(dataset=str(log), steps=60, overrides=TINY)
    plan = commands.plan_pretrain(config, say=silent)
    offline = commands.pretrain_run(plan, name="offline", runs=project / "runs", say=silent)
    plan_online = online_plan(offline)
    online = commands.finetune_run(plan_online, name="a", runs=project / "runs", say=silent)
    for text in (offline.config_text, online.config_text):
        assert "  dataset: ../../data/log.hdf5\n" in text
    assert "  pretrained: ../offline\n" in online.config_text
    assert str(tmp_path) not in online.config_text

    moved = project.rename(tmp_path / "there") / "runs"
    again = commands.finetune_run(online_plan(RunDir(moved / "offline")), runs=moved, say=silent)
    assert record(again)["sha256"] == record(RunDir(moved / "a"))["sha256"]


@pytest.mark.promise("R1")
@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
def test_a_power_cut_goes_back_to_the_checkpoint_and_comes_out_the_same(
    root: Path,
    pretrained: RunDir,
    online: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_seconds: float,
) -> None:
    """Episodes after it were written and not fsynced; what it counts was."""
    path = root / f"power-{checkpoint_seconds:.0f}"
    ledger = path / "ledger.jsonl"
    with monkeypatch.context() as patch:
        durable = watch(patch)
        save, counted = checkpoints.save_checkpoint, [0]

        def saving(*arguments: Any) -> Any:
            if arguments[-1]["ledger"]:
                assert durable[ledger] == ledger.stat().st_size
                counted.append(arguments[-1]["ledger"])
            return save(*arguments)

        patch.setattr(checkpoints, "save_checkpoint", saving)
        kill_at(patch, "append_episode", 14)
        with pytest.raises(Killed):
            commands.finetune_run(
                online_plan(pretrained),
                name=path.name,
                runs=root,
                checkpoint_seconds=checkpoint_seconds,
                say=silent,
            )
    assert len(RunDir(path).episodes()) == 13
    cut_power(path, durable)
    assert (len(counted) > 1) == (checkpoint_seconds == 0.0)
    assert len(RunDir(path).episodes()) == counted[-1] < 13
    again = commands.resume_finetune(path, runs=root, say=silent)
    assert record(again) == record(online)


def test_the_ledger_counts_every_step_once(online: RunDir) -> None:
    episodes = online.episodes()
    total = 0
    for index, episode in enumerate(episodes):
        total += episode.steps
        assert (episode.index, episode.total_steps) == (index, total)
    assert total <= BUDGET
    assert episodes[0].version == 0  # the first online action is the pretrained policy's


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(SCRIPT), *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lines(process: subprocess.Popen[str], path: Path, lines: int) -> None:
    deadline = time.monotonic() + 60
    while not path.is_file() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def resume(folder: Path, command: str, name: str) -> None:
    process = start(folder, command, "--resume", name)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_kill_9_in_mid_run_through_the_command_line(
    root: Path, pretrained: RunDir, online: RunDir
) -> None:
    arguments = ["--runs", str(root), "--budget", str(BUDGET), "--checkpoint-seconds", "0"]
    arguments += ["--accept-risk", "--name", "killed", *ONLINE]
    process = start(root.parent, "finetune", "offline", *arguments)
    wait_for_lines(process, root / "killed" / "ledger.jsonl", 9)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(RunDir(root / "killed").episodes()) < len(online.episodes())
    resume(root.parent, "finetune", str(root / "killed"))
    assert record(RunDir(root / "killed")) == record(online)


@pytest.mark.promise("R7")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_names_the_resume_command(
    root: Path, pretrained: RunDir, online: RunDir, number: signal.Signals
) -> None:
    name = f"stopped-{number.name}"
    arguments = ["--runs", str(root), "--budget", str(BUDGET), "--accept-risk"]
    arguments += ["--name", name, *ONLINE]
    process = start(root.parent, "finetune", "offline", *arguments)
    wait_for_lines(process, root / name / "ledger.jsonl", 8)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert f"finetune --resume {root / name}" in errors
    assert "Traceback" not in errors
    assert RunDir(root / name).state["status"] == "interrupted"
    resume(root.parent, "finetune", str(root / name))
    assert record(RunDir(root / name)) == record(online)


def test_a_changed_pretrain_run_is_refused(root: Path, pretrained: RunDir, online: RunDir) -> None:
    # The checkpoint's identity is in the stored settings.
    inputs, _ = parse_run_yaml(online.config_text, "finetune", FinetuneConfig, online.path)
    assert inputs.pretrained_sha256 == pretrained.load_checkpoint().sha256
    assert inputs.dataset_sha256
    assert json.loads((online.path / "versions.json").read_bytes())["threads"] == inputs.threads


def test_stop_signal_is_only_a_flag() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.number is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


@compiles
def test_a_compiled_run_is_resumed_bitwise_too(
    root: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = commands.pretrain_config(
        dataset=str(tiny_dataset), steps=60, overrides=[*TINY, "compile=on"]
    )
    plan = commands.plan_pretrain(config, say=silent)
    assert "compiled (up to a minute the first time)" in plan.header
    offline = commands.pretrain_run(plan, name="compiled", runs=root, say=silent)
    with monkeypatch.context() as patch:
        kill_at(patch, "save_checkpoint", 4)
        with pytest.raises(Killed):
            commands.pretrain_run(
                plan, name="compiled-cut", runs=root, checkpoint_seconds=0.0, say=silent
            )
    assert record(commands.resume_pretrain("compiled-cut", runs=root, say=silent)) == record(
        offline
    )

    # A short run that was compiled stays so, though "auto" would not compile it.
    settings = commands.finetune_config(offline, budget=BUDGET, overrides=[*ONLINE, "compile=on"])
    online = commands.finetune_run(
        commands.plan_finetune(offline, settings, accept_risk=True),
        name="compiled-online",
        runs=root,
        say=silent,
    )
    with monkeypatch.context() as patch:
        kill_at(patch, "append_episode", 13)
        with pytest.raises(Killed):
            commands.finetune_run(
                commands.plan_finetune(offline, settings, accept_risk=True),
                name="compiled-online-cut",
                runs=root,
                checkpoint_seconds=0.0,
                say=silent,
            )
    again = commands.resume_finetune("compiled-online-cut", runs=root, say=silent)
    assert record(again) == record(online)
