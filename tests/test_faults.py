"""Kill -9 at counted moments: in simulation nothing is different after, in reality nothing is lost.

Ten kills here; a hundred with `make test-slow`.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.env.make import make_env
from safe_offrl.record.run import RunDir
from safe_offrl.spec import SafetySpec
from tests import faults
from tests.fault_environments import HORIZON
from tests.promises import Record

ENV = "tests.fault_environments:Logged-v0"
TINY = ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16]"]
OFFLINE = ["alignment_steps=20", "log_every=5", "batch_size=32", *TINY, "steps=60"]
BUDGET = 1000
ONLINE = ["warmup_steps=200", "iteration_steps=100", "batch_size=32", "update_every=5"]
ONLINE += ["--budget", str(BUDGET)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a dataset and the finished pretrain run "offline"."""
    path = tmp_path_factory.mktemp("faults")
    dataset_of(path)
    faults.finish(faults.start(path, "pretrain", "--name", "offline", *pretraining(path)), path)
    return path


def dataset_of(folder: Path, accident_cost: float = 1.0) -> Path:
    """A log of random behaviour in the environment of these tests."""
    with make_env(ENV, SafetySpec()) as env:
        arrays = log_episodes(
            env, behaviours=[random_behaviour(1)], shares=[1.0], transitions=1500, seed=0
        )
    arrays["costs"] = accident_cost * arrays["costs"]
    metadata = {
        "env_id": ENV,
        "accident": "cost",
        "cost_threshold": 0.0,
        "horizon": HORIZON,
        "behaviours": [{"name": "random"}],
    }
    write_dataset(folder / "line.hdf5", arrays, metadata)
    return folder / "line.hdf5"


def pretraining(folder: Path) -> list[str]:
    return ["--env", ENV, "--dataset", str(folder / "line.hdf5"), *OFFLINE]


def record(run: RunDir) -> dict[str, object]:
    """Everything that must not depend on interruptions."""
    names = ("metrics.jsonl", "iterations.jsonl", "ledger.jsonl", "calibration.json")
    files = {n: (run.path / n).read_bytes() for n in names if (run.path / n).is_file()}
    checkpoint = run.load_checkpoint()
    assert run.state["status"] == "finished"
    return {**files, "step": checkpoint.step, "sha256": checkpoint.sha256}


def places(fell: list[str]) -> str:
    """Where kills fell, in words."""
    return ", ".join(f"{n} {place}" for place, n in sorted(Counter(fell).items()))


# --- simulation: bitwise ---


def killed_in_simulation(
    folder: Path, command: str, arguments: list[str], kills: int, each: int
) -> list[str]:
    """Runs with up to ``each`` kills, until there were ``kills``; all are the run without one."""
    reference = f"{command}-whole"
    if not (folder / "runs" / reference).is_dir():
        faults.finish(faults.start(folder, command, "--name", reference, *arguments), folder)
    whole = record(RunDir(folder / "runs" / reference))
    fell: list[str] = []
    number = 0
    while len(fell) < kills:
        number += 1
        name, log = f"{command}-{each}-{number}", folder / f"{command}-{each}-{number}.log"
        fell += faults.run_and_kill(
            folder,
            command,
            name,
            arguments,
            kills=min(each, kills - len(fell)),
            rng=random.Random(number),
            log=log if command == "finetune" else None,
        )
        assert record(RunDir(folder / "runs" / name)) == whole
    return fell


@pytest.mark.promise("R1")
def test_killed_runs_in_simulation_are_bitwise_the_run_without_a_kill(folder: Path) -> None:
    assert len(killed_in_simulation(folder, "pretrain", pretraining(folder), 2, 2)) == 2
    assert (
        len(killed_in_simulation(folder, "finetune", ["offline", "--accept-risk", *ONLINE], 4, 4))
        == 4
    )


@pytest.mark.slow
@pytest.mark.promise("R1")
def test_a_hundred_kills_in_simulation(folder: Path, figure: Record) -> None:
    fell = killed_in_simulation(folder, "pretrain", pretraining(folder), 30, 6)
    online = killed_in_simulation(folder, "finetune", ["offline", "--accept-risk", *ONLINE], 70, 8)
    figure("R1", f"{len(fell)}/30 pretrain and {len(online)}/70 finetune bitwise equal")
    figure("R1", f"fell: {places([*fell, *online])}")
    assert online.count("episode") >= 0.2 * len(online)
    assert [*fell, *online].count("checkpoint") >= 5


# --- reality: nothing lost, nothing counted twice ---


def killed_in_reality(folder: Path, kills: int, each: int) -> tuple[list[str], int, int]:
    """(where kills fell, episodes lost, runs), every run checked against its environment."""
    fell: list[str] = []
    lost = number = 0
    while len(fell) < kills:
        number += 1
        name, log = f"real-{each}-{number}", folder / f"real-{each}-{number}.log"
        fell += faults.run_and_kill(
            folder,
            "finetune",
            name,
            ["offline", "--accept-risk", "env.kind=real", *ONLINE],
            kills=min(each, kills - len(fell)),
            rng=random.Random(number),
            log=log,
        )
        lost += check_against_environment(RunDir(folder / "runs" / name), log)
    return fell, lost, number


def check_against_environment(run: RunDir, log: Path) -> int:
    """The ledger holds each episode that the environment played exactly once; the number lost."""
    assert run.state["status"] == "finished"
    episodes, played = run.episodes(), faults.played(log)
    charged = episodes[-1].total_steps
    assert sum(e.steps for e in played) <= charged <= BUDGET
    assert charged == sum(e.steps for e in episodes)
    # A kill between the reservation and the reset leaves an episode that never began.
    by_seed = {e.seed: e for e in played}
    assert len(by_seed) == len(played)
    assert set(by_seed) <= {e.seed for e in episodes}
    for episode in episodes:
        own = by_seed.get(episode.seed)
        if episode.outcome == "lost":
            assert episode.accident
            assert episode.steps == HORIZON
            continue
        assert own is not None
        assert (own.steps, own.accident, own.ended) == (episode.steps, episode.accident, True)
    # Exactly the environment's own accidents, and one for each episode whose end nobody saw.
    lost = {e.seed for e in episodes if e.outcome == "lost"}
    seen = sum(e.accident for e in played if e.seed not in lost)
    assert sum(e.accident for e in episodes) == seen + len(lost)
    return len(lost)


@pytest.mark.promise("R2")
@pytest.mark.promise("R3")
def test_killed_runs_in_reality_charge_and_count_everything_once(folder: Path) -> None:
    fell, lost, _ = killed_in_reality(folder, 4, 4)
    assert len(fell) == 4
    assert lost <= len(fell)


@pytest.mark.slow
@pytest.mark.promise("R2")
@pytest.mark.promise("R3")
def test_a_hundred_kills_in_reality(folder: Path, figure: Record) -> None:
    fell, lost, runs = killed_in_reality(folder, 100, 8)
    figure("R2", f"charged <= budget in {runs}/{runs} runs with {len(fell)} kills")
    figure("R3", f"ledger == environment's log in {runs}/{runs} runs; {lost} episodes lost")
    figure("R3", f"fell: {places(fell)}")
    assert fell.count("episode") >= 20
    assert fell.count("checkpoint") >= 5
