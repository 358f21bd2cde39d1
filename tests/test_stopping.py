"""A signal ends every command within seconds, whatever it is doing, and leaves nobody behind.

And a run that dies of something else is not "running" for ever, nor is its name taken by nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from safe_offrl import commands
from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.commands.phase import writing
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, DataError, EnvError
from safe_offrl.record.progress import Interrupted, StopNow, StopSignal
from safe_offrl.record.run import RunDir
from safe_offrl.spec import SafetySpec
from safe_offrl.train.finetune import Finetuning
from safe_offrl.train.pretrain import Pretraining
from tests.compute.test_compiler import REAL, script
from tests.compute.test_descent import compiles
from tests.promises import Record
from tests.test_resume import (
    online,
    online_plan,
    pretrain_plan,
    pretrained,
    record,
    root,
    silent,
)

__all__ = ["online", "pretrain_plan", "pretrained", "root"]  # fixtures

SCRIPT = Path(sys.executable).parent / "safe-offrl"
LIMIT = 5.0  # seconds, of a machine that has nothing else to do
BUSY = 3.0  # times slower may be one that has
PATIENCE = 120.0

ENV = '''
import os, pathlib, time
import gymnasium, numpy as np

class Slow(gymnasium.Env):
    """A walk whose steps take as long as the file "pause" says, and that says when it walks."""

    observation_space = gymnasium.spaces.Box(-100.0, 100.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0.0
        return self._observe(), {}

    def step(self, action):
        pause = pathlib.Path(__file__).with_name("pause")
        if pause.exists():
            (pause.parent / f"walking-{os.getpid()}").touch()
            time.sleep(float(pause.read_text()))
        self.place += 0.1 * float(action[0]) + 0.2 * float(self.np_random.standard_normal())
        over = self.place > 1.0
        return self._observe(), self.place, over, False, {"cost": float(over)}

    def _observe(self):
        return np.array([self.place, 0.0], np.float32)

gymnasium.register("Dawdling-v0", entry_point=Slow, max_episode_steps=20)
'''
SMALL = ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16]"]
SETTINGS = ["batch_size=32", "steps=5", "alignment_steps=2", *SMALL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment, a log of it and a pretrain run."""
    here = tmp_path_factory.mktemp("stopping")
    (here / "slow_env.py").write_text(ENV)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(sys, "path", [str(here), *sys.path])
        patch.setenv("SAFE_OFFRL_CACHE", str(here / "cache"))
        with contextlib.closing(make_env("slow_env:Dawdling-v0", SafetySpec())) as env:
            behaviours = [random_behaviour(env.action_size)]
            arrays = log_episodes(
                env, behaviours=behaviours, shares=[1.0], transitions=2000, seed=0
            )
        metadata = {"env_id": "Dawdling-v0", "horizon": 20, "behaviours": [{"name": "random"}]}
        write_dataset(here / "log.hdf5", arrays, metadata)
        config = commands.pretrain_config(
            env="slow_env:Dawdling-v0", dataset="log.hdf5", overrides=SETTINGS
        )
        plan = commands.plan_pretrain(config, say=silent)
        commands.pretrain_run(plan, name="offline", say=silent)
        yield here


@pytest.fixture(autouse=True, scope="module")
def hears_sigint() -> Iterator[None]:
    """A shell lets what runs in its background ignore SIGINT, and so would all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(SCRIPT), *arguments],
        cwd=folder,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "SAFE_OFFRL_CACHE": str(folder / "cache")}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what it leaves behind can be found
    )


def members(session: int) -> list[str]:
    """Commands of the processes of a session that live."""
    found = subprocess.run(
        ["ps", "-o", "stat=,args=", "-s", str(session)], capture_output=True, text=True
    ).stdout
    return [line for line in found.splitlines() if not line.startswith("Z")]


def stop(
    process: subprocess.Popen[str], number: signal.Signals, due: Callable[[], bool]
) -> tuple[float, str, str]:
    """Send the signal when it is due; how long it took to end, and what it has printed."""
    deadline = time.monotonic() + PATIENCE
    while not due():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never began"
        time.sleep(0.02)
    begun = time.monotonic()
    process.send_signal(number)
    out, errors = process.communicate(timeout=PATIENCE)
    took = time.monotonic() - begun
    while members(process.pid) and time.monotonic() < begun + LIMIT * BUSY:
        time.sleep(0.05)
    assert members(process.pid) == []
    assert "Traceback" not in errors
    return took, out, errors


WALKING = "walking-*"
# What it does: the command, and the file that is there when it does it.
COLLECT = "collect --env slow_env:Dawdling-v0 --out {name}.hdf5 learners.ppo.steps=4000"
LONG = {
    "alignment": (
        "pretrain alignment_steps=1000000 compile=off",
        "runs/{name}/checkpoints/step-*1*",
    ),
    "large steps": (
        "pretrain --agent cql steps=1000 log_every=1000 compile=off batch_size=4096 "
        "networks.critic_hidden=[512,512]",
        "runs/{name}/checkpoints/step-000000000",
    ),
    "collect": (f"{COLLECT} --workers 1", WALKING),
    "collect in processes": (f"{COLLECT} --workers 2 learners.sac.steps=4000", WALKING),
    "evaluate": ("evaluate offline --episodes 1000", WALKING),
    "certify": ("certify offline --epsilon 0.9", WALKING),
    "finetune": (
        "finetune offline --budget 5000 --accept-risk --name {name} warmup_steps=100 "
        "iteration_steps=100 batch_size=32",
        WALKING,
    ),
}


@pytest.mark.promise("R7")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("doing", LONG)
def test_a_signal_ends_it_within_seconds(
    folder: Path, figure: Record, doing: str, number: signal.Signals
) -> None:
    name = f"{doing.replace(' ', '-')}-{number.name}"
    arguments, begun = LONG[doing]
    given = arguments.format(name=name).split()
    if given[0] == "pretrain":
        given += ["--env", "slow_env:Dawdling-v0", "--dataset", "log.hdf5", "--name", name]
        given += [text for text in SETTINGS if text.split("=")[0] not in arguments]
        given += ["--checkpoint-seconds", "0.2"]
    walks = begun is WALKING
    for path in folder.glob(WALKING):
        path.unlink()
    if walks:
        # An episode of 20 steps takes twenty seconds, a rollout of PPO far longer.
        (folder / "pause").write_text("1.0")
    try:
        pattern = begun.format(name=name)
        process = start(folder, *given)
        needed = 2 if doing == "collect in processes" else 1
        took, _, errors = stop(process, number, lambda: len(list(folder.glob(pattern))) >= needed)
    finally:
        (folder / "pause").unlink(missing_ok=True)
    figure("R7", f"{doing}, {number.name}: {took:.1f} s")
    assert took < LIMIT * BUSY
    if given[0] in ("pretrain", "finetune"):
        run = RunDir(folder / "runs" / name)
        assert run.state["status"] == "interrupted"
        assert f"safe-offrl {given[0]} --resume {Path('runs') / name}" in errors
        assert process.returncode == 128 + number
    elif given[0] == "certify":
        assert "The same command goes on from there." in errors
        assert process.returncode == 128 + number
    else:
        assert process.returncode != 0


@pytest.mark.promise("R7")
def test_a_signal_ends_an_assessment(folder: Path, figure: Record) -> None:
    process = start(folder, "assess", "offline")
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")  # warnings of the log come first
    assert any(line.startswith("assess      ") for line in lines)
    took, _, _ = stop(process, signal.SIGTERM, lambda: True)
    figure("R7", f"assess, SIGTERM: {took:.1f} s")
    assert took < LIMIT * BUSY
    assert process.returncode == -signal.SIGTERM
    assert not (folder / "runs" / "offline" / "assessment.json").exists()


@pytest.mark.promise("R7")
def test_a_signal_ends_a_benchmark_and_its_runs(folder: Path, figure: Record) -> None:
    (folder / "suite.yaml").write_text(
        "environments: ['slow_env:Dawdling-v0']\nmethods: [ours]\nseeds: 1\nbudget: 2k\n"
        "evaluation_episodes: 5\ndatasets: {'slow_env:Dawdling-v0': log.hdf5}\n"
        "pretrain: {steps: 5, alignment_steps: 1000000, compile: 'off', batch_size: 32}\n"
    )
    process = start(folder, "benchmark", "--suite", "suite.yaml")
    runs = folder / "runs"
    took, _, errors = stop(
        process,
        signal.SIGTERM,
        lambda: any(runs.glob("benchmark-*/*/*/*/checkpoints/step-*")),
    )
    figure("R7", f"benchmark, SIGTERM: {took:.1f} s")
    assert took < LIMIT * BUSY
    assert process.returncode == 128 + signal.SIGTERM
    assert "The same command goes on from there." in errors
    (state,) = runs.glob("benchmark-*/*/*/*/run.json")
    assert json.loads(state.read_bytes())["status"] == "interrupted"


@compiles
@pytest.mark.promise("R7")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_compiles(
    folder: Path, tmp_path: Path, figure: Record, number: signal.Signals
) -> None:
    """The compiler works when it is tried, and takes ten minutes for everything that counts."""
    begun = tmp_path / "begun"
    text = f'case "$*" in *--version*|*trial.cpp*) exec {REAL} "$@";; esac\n'
    compiler = script(tmp_path, f"{text}touch {begun}; exec sleep 600")
    name = f"compiling-{number.name}"
    given = ["--env", "slow_env:Dawdling-v0", "--dataset", "log.hdf5", "--name", name, *SETTINGS]
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    process = start(folder, "pretrain", *given, "compile=on", CXX=compiler, **cache)
    took, _, errors = stop(process, number, begun.exists)
    figure("R7", f"compiling, {number.name}: {took:.1f} s")
    assert took < LIMIT * BUSY
    assert process.returncode == 128 + number
    assert f"pretrain --resume {Path('runs') / name}" in errors
    assert RunDir(folder / "runs" / name).state["status"] == "interrupted"


# --- where it is in Python, and comes out the same ---


def later(seconds: float, number: int = signal.SIGTERM) -> None:
    """Send this process a signal after so many seconds."""
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("place", ["_update", "_calibrate"])
def test_a_step_that_takes_for_ever_is_left_and_a_resume_comes_out_the_same(
    root: Path,
    pretrain_plan: commands.PretrainPlan,
    pretrained: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    name = f"long{place}"
    original, calls = getattr(Pretraining, place), [0]

    def endless(self: Pretraining, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == (33 if place == "_update" else 1):
            later(0.1)
            time.sleep(60.0)
        return original(self, **named)

    begun = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, place, endless)
        with pytest.raises(Interrupted, match="done again") as caught:
            commands.pretrain_run(
                pretrain_plan, name=name, runs=root, checkpoint_seconds=0.0, say=silent
            )
    assert time.monotonic() - begun < 30.0
    assert caught.value.exit_code == 128 + signal.SIGTERM
    run = RunDir(root / name)
    assert run.state["status"] == "interrupted"
    assert run.load_checkpoint().step == (32 if place == "_update" else 139)
    assert record(commands.resume_pretrain(name, runs=root, say=silent)) == record(pretrained)


def test_a_signal_between_two_records_saves_at_the_step(
    root: Path,
    pretrain_plan: commands.PretrainPlan,
    pretrained: RunDir,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of a record, and of the one in which alignment begins."""
    for at in (33, 60, 61, 67):
        name, original = f"between-{at}", Pretraining._update

        def signalling(self: Pretraining, **named: Any) -> Any:
            if self.step + 1 == at:  # noqa: B023
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, **named)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(Pretraining, "_update", signalling)
            with pytest.raises(Interrupted, match=f"stopped at step {at};"):
                commands.pretrain_run(
                    pretrain_plan, name=name, runs=root, checkpoint_seconds=1e9, say=silent
                )
        assert RunDir(root / name).load_checkpoint().step == at
        assert record(commands.resume_pretrain(name, runs=root, say=silent)) == record(pretrained)


def test_online_updates_that_take_for_ever_are_left(
    root: Path, pretrained: RunDir, online: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Finetuning._update, [0]

    def endless(self: Finetuning, *arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 600:
            later(0.1)
            time.sleep(60.0)
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuning, "_update", endless)
        with pytest.raises(Interrupted, match="done again"):
            commands.finetune_run(online_plan(pretrained), name="long", runs=root, say=silent)
    assert RunDir(root / "long").state["status"] == "interrupted"
    again = commands.resume_finetune("long", runs=root, say=silent)
    assert record(again) == record(online)


def test_what_is_held_is_not_cut_off() -> None:
    with pytest.raises(StopNow), StopSignal(0.05) as stop:  # noqa: PT012
        stop.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        assert stop.number == signal.SIGTERM
        stop.release()
        time.sleep(5.0)
    with StopSignal(0.05) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)  # nothing comes after it
    with StopSignal() as stop:  # as in reality: for ever
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)


# --- what dies otherwise ---


@pytest.mark.parametrize("refusal", [ConfigError("no."), DataError("no.")])
def test_settings_that_are_refused_before_anything_is_on_record_leave_no_run(
    root: Path,
    pretrain_plan: commands.PretrainPlan,
    pretrained: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Exception,
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise refusal

    said: list[str] = []
    name = f"refused-{type(refusal).__name__}"
    for place in ("__init__", "_update"):
        with monkeypatch.context() as patch:
            patch.setattr(Pretraining, place, refused)
            with pytest.raises(type(refusal)):
                commands.pretrain_run(pretrain_plan, name=name, runs=root, say=said.append)
        assert not (root / name).exists()
        assert said[-1] == f"removed     {root / name}: it had not begun"
    with monkeypatch.context() as patch:
        patch.setattr(Finetuning, "__init__", refused)
        with pytest.raises(type(refusal)):
            commands.finetune_run(online_plan(pretrained), name=name, runs=root, say=silent)
    # The name is free.
    assert commands.pretrain_run(pretrain_plan, name=name, runs=root, say=silent).name == name


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("compiling failed."),
        EnvError("gone."),
        RuntimeError("ours"),
        OSError(28, "full"),
        MemoryError(),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("step", [0, 33])
def test_a_run_that_dies_is_not_running_and_says_how_to_go_on(
    root: Path,
    pretrain_plan: commands.PretrainPlan,
    pretrained: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    step: int,
) -> None:
    original = Pretraining._update

    def dying(self: Pretraining, **named: Any) -> Any:
        if self.step == step:
            raise error
        return original(self, **named)

    name = f"died-{type(error).__name__}-{step}"
    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "_update", dying)
        with pytest.raises(type(error)) as caught:
            commands.pretrain_run(pretrain_plan, name=name, runs=root, say=silent)
    if isinstance(error, ConfigError) and step == 0:
        assert not (root / name).exists()
        return
    assert RunDir(root / name).state["status"] == "interrupted"
    assert caught.value.__notes__[-1] == (
        f"Continue with: safe-offrl pretrain --resume {root / name}"
    )
    again = commands.resume_pretrain(name, runs=root, say=silent)
    assert record(again) == record(pretrained)


def test_a_run_that_diverged_is_not_running_and_is_not_said_to_go_on(
    root: Path, pretrain_plan: commands.PretrainPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(self: Pretraining, **_: Any) -> Any:
        raise FloatingPointError("not finite")

    monkeypatch.setattr(Pretraining, "_update", diverging)
    with pytest.raises(FloatingPointError) as caught:
        commands.pretrain_run(pretrain_plan, name="diverged", runs=root, say=silent)
    assert not hasattr(caught.value, "__notes__")
    assert RunDir(root / "diverged").state["status"] == "interrupted"


def test_a_resumed_run_is_never_removed(
    root: Path, pretrain_plan: commands.PretrainPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one of which nothing is on record: it may be somebody's."""
    run = commands.pretrain_run(pretrain_plan, name="kept", runs=root, say=silent)
    for path in (*run.path.glob("checkpoints/step-*[1-9]*"), *run.path.glob("*.jsonl")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run.lock()
    with run, pytest.raises(ConfigError), writing(run, silent):
        raise ConfigError("no.")
    assert run.path.is_dir()
    assert RunDir(run.path).state["status"] == "interrupted"


def test_what_has_a_record_is_never_removed(root: Path, online: RunDir) -> None:
    run = RunDir(online.path)
    run.lock()
    with run, pytest.raises(RuntimeError, match="never removed"):
        run.discard()
    assert run.episodes()
