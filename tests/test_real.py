"""`env.kind=real`: steps are reserved before they are taken, and what is lost counts as worst."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safe_offrl import commands
from safe_offrl.data.dataset import Dataset
from safe_offrl.deploy.episodes import Reservation
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.errors import ConfigError, EnvError
from safe_offrl.record.ledger import LedgerWriter
from safe_offrl.record.progress import Interrupted
from safe_offrl.record.run import RunDir
from safe_offrl.spec import EnvironmentConfig
from safe_offrl.train.finetune import Finetuning
from safe_offrl.train.pretrain import Pretraining
from safe_offrl.types import Episode
from tests.failing_disk import watch
from tests.test_resume import (
    Killed,
    kill_at,
    killed,
    online_plan,
    pretrain_plan,
    pretrained,
    record,
    root,
    silent,
)
from tests.train.test_finetune import HORIZON, begin, config_of, dataset, pretraining

__all__ = ["dataset", "pretrain_plan", "pretrained", "pretraining", "root"]  # fixtures
REAL: dict[str, Any] = {"env": EnvironmentConfig("real")}


def loop(dataset: Dataset, pretraining: Pretraining, **settings: Any) -> Finetuning:
    return begin(config_of(**REAL, **settings), dataset, pretraining).tuning


def test_a_reservation_of_the_worst_comes_before_the_first_step(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    tuning = loop(dataset, pretraining)
    taken = 0
    step = tuning.env.step

    def counted(action: np.ndarray) -> Any:
        nonlocal taken
        taken += 1
        return step(action)

    tuning.env.step = counted  # type: ignore[method-assign]
    reserved: Episode | None = None
    for event in tuning.run():
        if isinstance(event, Reservation):
            reserved = event.worst
            assert taken == tuning.steps  # not a step of it yet
            assert reserved.total_steps == tuning.steps + HORIZON <= tuning.config.budget
            assert (reserved.accident, reserved.cost, reserved.outcome) == (True, 1.0, "lost")
        elif isinstance(event, Episode):
            assert reserved is not None
            same = ("index", "seed", "version", "phase")
            assert all(getattr(event, name) == getattr(reserved, name) for name in same)
            assert event.steps <= reserved.steps
            reserved = None
    assert taken == tuning.steps


def test_what_is_lost_costs_the_most_that_the_log_shows(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    """Whatever is constrained. A quarter for each step, and 2 more for an accident, the last."""
    batch = dataset.transitions
    costs = 0.25 + 2.0 * batch.accidents
    dear = replace(dataset, rows=dataset.layout.pack(batch._replace(costs=costs)))
    reservation = next(loop(dear, pretraining).run())
    assert isinstance(reservation, Reservation)
    assert reservation.worst.cost == (HORIZON - 1) * 0.25 + 2.25


def test_what_is_on_record_is_counted_and_not_played_again(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    first = loop(dataset, pretraining)
    events = first.run()
    recorded = [event for event in _take(events, 4) if isinstance(event, Episode)]
    lost = recorded[1]._replace(
        steps=HORIZON, accident=True, cost=1.0, outcome="lost", version=recorded[1].version + 3
    )
    tuning = loop(dataset, pretraining)
    noise = tuning.rng.bit_generator.state
    tuning.env.reset = tuning.env.step = None  # type: ignore[method-assign,assignment]
    events = tuning.run([recorded[0], lost])
    assert [next(events), next(events)] == [recorded[0], lost]
    assert tuning.steps == recorded[0].steps + HORIZON
    assert (tuning.episodes, tuning.monitor.episodes) == (2, 2)
    assert tuning.monitor.accidents == recorded[0].accident + 1
    assert tuning.monitor.recent == [float(recorded[0].accident), 1.0]
    # Nothing of it is learnt, its noise is not drawn again, and its policy's number is not reused.
    assert tuning.experience.buffer.size == 0
    assert tuning.rng.bit_generator.state != noise
    assert tuning.deployment.version == lost.version + 1
    third = next(events)
    assert isinstance(third, Reservation)
    assert third.worst.index == 2


def _take(events: Iterator[Any], episodes: int) -> list[Any]:
    found: list[Any] = []
    while sum(isinstance(event, Episode) for event in found) < episodes:
        found.append(next(events))
    return found


def test_a_lost_accident_spends_the_accident_budget(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    tuning = loop(dataset, pretraining, accident_budget=1)
    worst = next(tuning.run())
    assert isinstance(worst, Reservation)
    tuning = loop(dataset, pretraining, accident_budget=1)
    events = list(tuning.run([worst.worst]))
    assert events == [worst.worst]
    assert tuning.stopped == "the accident budget of 1 is spent"


def test_a_budget_that_faults_have_spent_is_spent_after_a_resume(
    dataset: Dataset, pretraining: Pretraining
) -> None:
    """The third fault in a row ends the process before it can say that the accidents are used."""
    tuning = loop(dataset, pretraining, accident_budget=3)

    def unplugged(action: np.ndarray) -> Any:
        raise ConnectionError("unplugged")

    tuning.env.step = unplugged  # type: ignore[method-assign]
    events = tuning.run()
    recorded = [event for event in _take(events, 3) if isinstance(event, Episode)]
    tensors, info = tuning.state_dict(), tuning.info()
    with pytest.raises(EnvError, match="in a row"):
        next(events)
    again = loop(dataset, pretraining, accident_budget=3)  # the environment is repaired
    again.load(tensors, info)
    assert list(again.run(recorded)) == []
    assert again.stopped == "the accident budget of 3 is spent"
    assert again.monitor.accidents == 3


@pytest.mark.parametrize("stop_at", [1, 3, 7, 9])
def test_the_state_at_an_episodes_end_is_whole(
    dataset: Dataset, pretraining: Pretraining, stop_at: int
) -> None:
    """Its updates and the iteration after it are still to come, and come out the same."""
    whole = loop(dataset, pretraining)
    kept: Any = None
    rest_of_whole = []
    for event in whole.run():
        if kept is not None:
            rest_of_whole.append(repr(event))
        elif isinstance(event, Episode) and whole.episodes == stop_at:
            kept = (whole.state_dict(), whole.info())
    again = loop(dataset, pretraining)
    again.load(*kept)
    assert again.updated < again.steps
    assert [repr(event) for event in again.run()] == rest_of_whole
    assert any("Iteration" in event for event in rest_of_whole)
    assert repr(again.info()) == repr(whole.info())


# --- with its run folder ---


def real_plan(pretrained: RunDir) -> commands.FinetunePlan:
    return online_plan(pretrained, "env.kind=real")


def test_the_header_says_so(pretrained: RunDir) -> None:
    plan = real_plan(pretrained)
    assert "one that is cut off counts as an accident" in plan.header
    plan.env.close()


@pytest.mark.parametrize(
    ("method", "call", "lost", "counted_alone"),
    [
        ("append_episode", 5, 1, 0),  # after the episode's last step, before its line
        ("save_checkpoint", 5, 0, 1),  # after its line: 0 is the checkpoint before all
        ("reserve_episode", 5, 0, 0),  # before its first step
    ],
)
def test_a_killed_run_loses_at_most_the_episode_it_was_in(
    root: Path,
    pretrained: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    call: int,
    lost: int,
    counted_alone: int,
) -> None:
    name = f"real-{method}"
    killed(monkeypatch, real_plan(pretrained), root / name, method, call)
    before = RunDir(root / name).episodes()
    assert len(before) == 4 + lost - (method == "save_checkpoint") + counted_alone
    run = commands.resume_finetune(name, runs=root, say=silent)
    episodes = run.episodes()
    assert episodes[: len(before)] == before
    assert [e.outcome for e in episodes].count("lost") == lost
    total = 0
    for index, episode in enumerate(episodes):
        total += episode.steps
        assert (episode.index, episode.total_steps) == (index, total)
    checkpoint = run.load_checkpoint()
    assert checkpoint.info["steps"] == total <= 1500
    assert checkpoint.info["monitor"]["accidents"] == sum(e.accident for e in episodes)
    # Every transition of every other episode is in the buffer.
    learnt = sum(e.steps for e in episodes if e.outcome == "complete")
    rows = len(checkpoint.tensors["experience/rows"])
    assert rows == learnt - (before[-1].steps if counted_alone else 0)


@pytest.mark.promise("R3")
@pytest.mark.parametrize("kind", ["real", "sim"])
def test_in_reality_every_line_is_durable_before_the_next_step(
    root: Path, pretrained: RunDir, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    plan = online_plan(pretrained, f"env.kind={kind}")
    ledger = root / f"durable-{kind}" / "ledger.jsonl"
    step, found = plan.env.step, set()
    with monkeypatch.context() as patch:
        durable = watch(patch)

        def watched(action: np.ndarray) -> Any:
            found.add(ledger.exists() and durable.get(ledger) == ledger.stat().st_size)
            return step(action)

        patch.setattr(plan.env, "step", watched)
        commands.finetune_run(plan, name=f"durable-{kind}", runs=root, say=silent)
    if kind == "real":
        assert found == {True}
    else:  # its episodes can be played again
        assert False in found


@pytest.mark.promise("R2")
def test_what_no_checkpoint_holds_is_counted_all_the_same(
    root: Path, pretrained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short episodes do not each get a checkpoint: their transitions can be lost, nothing else."""
    with monkeypatch.context() as patch:
        kill_at(patch, "append_episode", 11)
        with pytest.raises(Killed):
            commands.finetune_run(
                real_plan(pretrained), name="few", runs=root, checkpoint_seconds=1e9, say=silent
            )
    before = RunDir(root / "few").episodes()
    assert RunDir(root / "few").load_checkpoint().step == 0
    assert [e.outcome for e in before] == ["complete"] * 10 + ["lost"]
    run = commands.resume_finetune("few", runs=root, say=silent)
    episodes = run.episodes()
    assert episodes[:11] == before
    assert len({e.seed for e in episodes}) == len(episodes)  # none was played again
    checkpoint = run.load_checkpoint()
    assert checkpoint.info["steps"] == sum(e.steps for e in episodes) <= 1500
    assert checkpoint.info["monitor"]["accidents"] == sum(e.accident for e in episodes)
    assert len(checkpoint.tensors["experience/rows"]) == sum(e.steps for e in episodes[11:])


@pytest.mark.promise("R7")
@pytest.mark.parametrize("place", ["step", "update"])
def test_a_signal_loses_nothing_of_a_real_run(
    root: Path, pretrained: RunDir, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Nor does it change anything, whether it comes in an episode or in the updates after it."""
    runs = []
    for name in (f"whole-{place}", f"signalled-{place}"):
        plan, calls = real_plan(pretrained), [0]
        owner: Any = plan.env if place == "step" else Finetuning
        original = getattr(owner, "step" if place == "step" else "_update")

        def signalling(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1  # noqa: B023
            if calls[0] == 550 and name.startswith("signalled"):  # noqa: B023
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **named)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(owner, original.__name__, signalling)
            with contextlib.suppress(Interrupted):
                commands.finetune_run(
                    plan, name=name, runs=root, checkpoint_seconds=1e9, say=silent
                )
        runs.append(RunDir(root / name))
    whole, signalled = runs
    assert signalled.state["status"] == "interrupted"
    assert 0 < signalled.load_checkpoint().step < whole.load_checkpoint().step
    assert record(commands.resume_finetune(signalled.path, runs=root, say=silent)) == record(whole)


def test_a_certificate_counts_an_episode_that_was_cut_off(
    root: Path, pretrained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = commands.finetune_run(real_plan(pretrained), name="to-certify", runs=root, say=silent)
    with monkeypatch.context() as patch:
        append, calls = LedgerWriter.append, [0]

        def dying(self: LedgerWriter, episode: Episode) -> None:
            calls[0] += 1
            if calls[0] == 3:
                raise Killed
            append(self, episode)

        patch.setattr(LedgerWriter, "append", dying)
        with pytest.raises(Killed):
            commands.certify_run(run.path, epsilon=0.9, episodes=6, say=silent)
    certificate = commands.certify_run(run.path, epsilon=0.9, episodes=6, say=silent)
    assert certificate["claim"]["attempt"] == 1
    assert (certificate["episodes"], certificate["unknown_outcomes"]) == (6, 1)
    assert certificate["accidents"] >= 1
    path = run.path / "certificates" / "1" / "certificate.json"
    assert all(check.passed for check in commands.verify_certificate(path, say=silent))


def test_no_second_copy_of_a_real_environment_films(root: Path, pretrained: RunDir) -> None:
    with pytest.raises(ConfigError, match=r"nothing of env\.kind real is played again"):
        commands.finetune_config(pretrained, overrides=["env.kind=real", "videos=3"])


def test_no_episode_of_a_real_environment_is_off_the_record(
    root: Path, pretrained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = commands.finetune_run(real_plan(pretrained), name="unrecorded", runs=root, say=silent)

    def resetting(self: AccidentEnv, **options: Any) -> Any:
        raise AssertionError("an episode began")

    monkeypatch.setattr(AccidentEnv, "reset", resetting)
    with pytest.raises(ConfigError, match="Use `safe-offrl certify unrecorded --episodes 7`"):
        commands.evaluate_run(run.path, episodes=7, say=silent)
    assert not (run.path / "evaluation.json").exists()
