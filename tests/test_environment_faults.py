"""Environments that fail: the episode is closed, charged, and counts as an accident."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safe_offrl import commands
from safe_offrl.env.adapter import AccidentEnv, episode_seed
from safe_offrl.env.make import make_env
from safe_offrl.env.process import ProcessEnv
from safe_offrl.errors import ConfigError, EnvError, EnvFault
from safe_offrl.record.ledger import LedgerWriter
from safe_offrl.record.run import RunDir
from safe_offrl.spec import EnvironmentConfig, SafetySpec
from safe_offrl.types import Episode
from tests.fault_environments import HORIZON
from tests.test_faults import ENV, OFFLINE, ONLINE, dataset_of
from tests.test_resume import Killed, kill_at, silent

MODULE = "tests.fault_environments"
DEAREST = 3.0  # what an accident, which ends the episode, costs in the log
# What fails, how, and after how many steps.
FAULTS = {
    "Failing": ("ConnectionError: the robot does not answer", 3),
    "FailsWithNan": ("an observation with NaN", 3),
    "FailsWithInfiniteReward": ("the reward inf at step 3", 3),
    "FailsWithWrongShape": ("an observation of 1 numbers", 3),
    "FailsWithWrongType": ("an observation without numbers", 3),
    "FailsWithoutInfo": ("ValueError: not enough values to unpack", 3),
    "FailsInReset": ("TimeoutError: not in its start position", 0),
}
IN_A_PROCESS = {
    "FailsByHanging": ("no answer within 1 seconds", 3),
    "FailsByDying": ("process died", 3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with the pretrain run "offline"."""
    path = tmp_path_factory.mktemp("failing")
    dataset = dataset_of(path, DEAREST)
    config = commands.pretrain_config(env=ENV, dataset=str(dataset), overrides=OFFLINE)
    plan = commands.plan_pretrain(config, say=silent)
    commands.pretrain_run(plan, name="offline", runs=path, say=silent)
    return path


def plan_with(
    folder: Path, name: str, *overrides: str, budget: int = 300, timeout: float | None = None
) -> commands.FinetunePlan:
    """A plan of an online phase in the failing environment ``name``."""
    pretrained = RunDir(folder / "offline")
    config = commands.finetune_config(
        pretrained, budget=budget, overrides=[*ONLINE[:-2], "warmup_steps=60", *overrides]
    )
    plan = commands.plan_finetune(pretrained, config, accept_risk=True)
    env = make_env(f"{MODULE}:{name}-v0", SafetySpec(), timeout=timeout)
    plan.env.close()
    return dataclasses.replace(plan, env=env)


def fails(episode: Episode) -> bool:
    return episode.seed % 3 == 0


@pytest.mark.promise("R11")
@pytest.mark.parametrize("name", [*FAULTS, *IN_A_PROCESS])
def test_a_fault_is_charged_ledgered_and_an_accident(folder: Path, name: str) -> None:
    words, steps = (FAULTS | IN_A_PROCESS)[name]
    said: list[str] = []
    timeout = 1.0 if name in IN_A_PROCESS else None
    plan = plan_with(folder, name, budget=200, timeout=timeout)
    run = commands.finetune_run(plan, name=name, runs=folder, say=said.append)
    episodes = run.episodes()
    faulty = [e for e in episodes if e.outcome == "fault"]
    assert faulty == [e for e in episodes if fails(e)]
    assert len(faulty) >= 2
    assert len(episodes) > len(faulty)  # learning goes on with the next one
    for episode in faulty:
        assert (episode.steps, episode.accident, episode.cost) == (steps, True, DEAREST)
    assert run.state["status"] == "finished"
    assert sum(words in text for text in said) == len(faulty)
    checkpoint = run.load_checkpoint()
    assert checkpoint.info["steps"] == sum(e.steps for e in episodes) <= 200
    assert checkpoint.info["monitor"]["accidents"] == sum(e.accident for e in episodes)
    # What it would have returned nobody knows, what it may have done counts.
    returns, outcomes = (
        [part[i] for _, *part in checkpoint.info["selection"]["evidence"]] for i in (0, 1)
    )
    assert sum(n for n, *_ in returns) == len(episodes) - len(faulty)
    assert sum(n for n, *_ in outcomes) == len(episodes)
    # Nothing is learnt from an episode in which the environment failed.
    learnt = sum(e.steps for e in episodes if e.outcome == "complete")
    assert len(checkpoint.tensors["experience/rows"]) == learnt


@pytest.mark.promise("R11")
def test_three_in_a_row_stop_the_run_until_the_environment_is_repaired(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_with(folder, "Logged")
    whole = commands.finetune_run(plan, name="unbroken", runs=folder, say=silent).episodes()
    plan = plan_with(folder, "Logged")
    step, broken_from = plan.env.unwrapped.step, 4

    def broken(action: Any) -> Any:
        if RunDir(folder / "broken").ledger().lines >= broken_from:
            raise ConnectionError("unplugged")
        return step(action)

    monkeypatch.setattr(plan.env.unwrapped, "step", broken)
    with pytest.raises(EnvError, match=r"failed in 3 episodes in a row.*unplugged.*Repair"):
        commands.finetune_run(plan, name="broken", runs=folder, say=silent)
    run = RunDir(folder / "broken")
    assert run.state["status"] == "interrupted"
    assert [e.outcome for e in run.episodes()] == ["complete"] * 4 + ["fault"] * 3
    assert run.episodes()[:4] == whole[:4]
    # Repaired: what failed stays on record, and is not played again.
    again = resume(folder, "broken", monkeypatch, "Logged")
    assert again.state["status"] == "finished"
    assert [e.outcome for e in again.episodes()[4:7]] == ["fault"] * 3
    assert {e.outcome for e in again.episodes()[7:]} == {"complete"}


def resume(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, env: str) -> RunDir:
    """Resume a run in the environment ``env``."""
    with monkeypatch.context() as patch:
        make = lambda _id, spec, **_: make_env(f"{MODULE}:{env}-v0", spec)  # noqa: E731
        patch.setattr("safe_offrl.commands.online_plan.make_env", make)
        return commands.resume_finetune(name, runs=folder, say=silent)


@pytest.mark.promise("R11")
@pytest.mark.parametrize("method", ["append_episode", "log_iteration"])
def test_a_run_with_faults_is_resumed_bitwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def record(run: RunDir) -> list[object]:
        names = ("metrics.jsonl", "iterations.jsonl", "ledger.jsonl")
        return [*((run.path / n).read_bytes() for n in names), run.load_checkpoint().sha256]

    name = f"cut-{method}"
    # Without tests at its end the run has a second decision.
    overrides = ["selection.share=0"] if method == "log_iteration" else []
    plan = plan_with(folder, "Failing", *overrides)
    whole = commands.finetune_run(plan, name=f"whole-{method}", runs=folder, say=silent)
    with monkeypatch.context() as patch:
        kill_at(patch, method, 9 if method == "append_episode" else 2)
        with pytest.raises(Killed):
            commands.finetune_run(
                plan_with(folder, "Failing", *overrides),
                name=name,
                runs=folder,
                checkpoint_seconds=1e9,
                say=silent,
            )
    assert any(e.outcome == "fault" for e in RunDir(folder / name).episodes())
    assert record(resume(folder, name, monkeypatch, "Failing")) == record(whole)


def test_settings_that_do_not_fit_are_no_fault(folder: Path) -> None:
    plan = plan_with(folder, "Logged")
    plan.env.unwrapped.step = lambda action: (np.zeros(2), 0.0, False, False, {})  # type: ignore[method-assign]
    with pytest.raises(EnvError, match="no accident signal"):
        commands.finetune_run(plan, name="no-signal", runs=folder, say=silent)
    assert RunDir(folder / "no-signal").episodes() == []


def test_evaluation_and_certificate_count_faults(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_id: str, spec: SafetySpec, **_: Any) -> AccidentEnv:
        return make_env(f"{MODULE}:Failing-v0", spec)

    monkeypatch.setattr("safe_offrl.record.final_policy.make_env", failing)
    seeds = [episode_seed(0, index, "evaluate") for index in range(8)]
    expected = sum(seed % 3 == 0 for seed in seeds)
    assert expected
    result = commands.evaluate_run("offline", episodes=8, runs=folder, say=silent)
    assert result["accidents"] >= expected
    seen = result["accidents"] - expected  # at 1 each
    assert result["mean_cost"] == pytest.approx((DEAREST * expected + seen) / 8)
    certificate = commands.certify_run("offline", epsilon=0.95, episodes=6, runs=folder, say=silent)
    record = LedgerWriter(folder / "offline/certificates/1/episodes.jsonl").episodes
    assert [e.outcome == "fault" for e in record] == [fails(e) for e in record]
    assert {e.cost for e in record if fails(e)} == {DEAREST}
    unknown = certificate["unknown_outcomes"]
    assert 1 <= unknown == sum(map(fails, record)) <= certificate["accidents"]


def test_an_evaluated_return_is_of_complete_episodes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(*outcomes: str) -> dict[str, Any]:
        """The result for episodes of returns 0, 1, 2 ... that ended like this."""
        episodes = [
            Episode(i, i, 10, 10 * i + 10, float(i), 1.0, True, 1, 0, "evaluate", 0, outcome)
            for i, outcome in enumerate(outcomes)
        ]
        monkeypatch.setattr("safe_offrl.commands.evaluate.evaluate", lambda *_, **__: episodes)
        return commands.evaluate_run(
            "offline", episodes=len(episodes), runs=folder, say=said.append
        )

    said: list[str] = []
    result = play("complete", "fault", "complete", "fault")
    # Returns 0 and 2: variance 2, so that the mean of the two has the standard error 1.
    assert (result["mean_return"], result["return_standard_error"]) == (1.0, 1.0)
    assert (result["accidents"], result["mean_cost"], result["mean_length"]) == (4, 1.0, 10.0)
    result = play("fault", "fault")
    assert (result["mean_return"], result["return_standard_error"]) == (None, None)
    assert result == RunDir(folder / "offline").read_json("evaluation.json")
    assert said[-1].endswith("return unknown: no episode came to its end")
    compared = commands.compare_runs([folder / "offline"], say=silent)
    assert compared["runs"][0]["evaluated_return"]["value"] is None
    # Not even a first step.
    at_once = [Episode(0, 0, 0, 0, 0.0, 1.0, True, 1, 0, "evaluate", 0, "fault")]
    monkeypatch.setattr("safe_offrl.commands.evaluate.evaluate", lambda *_, **__: at_once)
    result = commands.evaluate_run("offline", episodes=1, runs=folder, say=silent)
    assert (result["accidents"], result["guarded_share"]) == (1, 0.0)


# --- in a process of its own ---


def test_a_process_gives_the_same_episode_as_no_process() -> None:
    envs = [make_env(f"{MODULE}:Logged-v0", SafetySpec(), timeout=t) for t in (None, 60.0)]
    rng = np.random.default_rng(0)
    try:
        assert envs[0].versions() == envs[1].versions()
        assert envs[0].horizon == envs[1].horizon == HORIZON
        assert isinstance(envs[1].unwrapped, ProcessEnv)
        first, second = (env.reset(seed=4)[0] for env in envs)
        np.testing.assert_array_equal(first, second)
        for _ in range(5):
            action = rng.uniform(-1, 1, 1).astype(np.float32)
            one, other = (env.step(action) for env in envs)
            np.testing.assert_array_equal(one[0], other[0])
            assert one[1:] == other[1:]
    finally:
        for env in envs:
            env.close()


def failing_process(name: str, timeout: float = 1.0) -> AccidentEnv:
    return make_env(f"{MODULE}:{name}-v0", SafetySpec(), timeout=timeout)


def test_a_process_that_hangs_is_ended_and_the_next_reset_starts_another() -> None:
    env = failing_process("FailsByHanging")
    env.reset(seed=3)
    for _ in range(2):
        env.step(np.zeros(1, np.float32))
    begin = time.monotonic()
    with pytest.raises(EnvFault, match="no answer within 1 seconds"):
        env.step(np.zeros(1, np.float32))
    assert time.monotonic() - begin < 5.0
    with pytest.raises(EnvFault, match="process has ended"):
        env.step(np.zeros(1, np.float32))
    env.reset(seed=4)
    env.step(np.zeros(1, np.float32))
    env.close()
    env.close()


HANGS = """
import numpy as np
from tests.test_environment_faults import failing_process

env = failing_process("FailsByHanging", timeout=3600.0)
env.reset(seed=3)
env.step(np.zeros(1))
env.step(np.zeros(1))
print(env.unwrapped._process.pid, flush=True)
env.step(np.zeros(1))
"""


@pytest.mark.promise("R11")
def test_a_process_that_hangs_does_not_outlive_a_killed_run() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGS],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        run.kill()
        # Its output ends when the last process that could write to it has ended.
        ended, _, _ = select.select([run.stdout], [], [], 5.0)
        if not ended:
            os.kill(pid, signal.SIGKILL)
        assert ended, "the environment's process is still there"
        assert run.stdout.read() == b""


def test_an_environment_that_cannot_be_made_there_is_no_fault() -> None:
    with pytest.raises(EnvError, match="no environment") as caught:
        make_env(f"{MODULE}:Nothing-v0", SafetySpec(), timeout=1.0)
    assert not isinstance(caught.value, EnvFault)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_must_be_a_number_of_seconds(timeout: float) -> None:
    with pytest.raises(ConfigError, match=r"env\.timeout"):
        EnvironmentConfig(timeout=timeout)
