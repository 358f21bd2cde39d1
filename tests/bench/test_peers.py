"""Our learners beside d3rlpy's: the table of settings, records that go on, and the page."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.peers import compare, ours, tasks
from benchmarks.peers.compare import Job, LearnerFailedError, jobs_of, started
from benchmarks.peers.page import difference, page
from benchmarks.peers.settings import ALGORITHMS, COMMON, EXTRACTION, TASKS, tasks_of
from safe_offrl.agents import AGENTS, AgentConfigs
from safe_offrl.agents.extraction import ExtractionConfig
from safe_offrl.data.dataset import Dataset
from safe_offrl.env.adapter import episode_seed
from safe_offrl.env.make import make_env
from safe_offrl.errors import EnvError
from safe_offrl.types import Layout, Normalizer

CLASSES = {  # what d3rlpy has of what we have
    "bc": "BCConfig",
    "bcq": "BCQConfig",
    "bear": "BEARConfig",
    "crr": "CRRConfig",
    "awac": "AWACConfig",
    "td3bc": "TD3PlusBCConfig",
    "rebrac": "ReBRACConfig",
    "iql": "IQLConfig",
    "cql": "CQLConfig",
    "calql": "CalQLConfig",
    "bcq_discrete": "DiscreteBCQConfig",
    "cql_discrete": "DiscreteCQLConfig",
    "qrdqn": "DQNConfig",
}
SAME = [  # algorithm, our name of a setting, and theirs
    ("awac", "temperature", "lam"),
    ("crr", "temperature", "beta"),
    ("crr", "weight_limit", "max_weight"),
    ("crr", "weighting", "weight_type"),
    ("td3bc", "alpha", "alpha"),
    ("rebrac", "actor_weight", "actor_beta"),
    ("rebrac", "critic_weight", "critic_beta"),
    ("bear", "threshold", "alpha_threshold"),
    ("bear", "sigma", "mmd_sigma"),
    ("bear", "samples", "n_mmd_action_samples"),
    ("bear", "multiplier_learning_rate", "alpha_learning_rate"),
    ("bcq", "perturbation", "action_flexibility"),
    ("iql", "expectile", "expectile"),
    ("cql", "alpha", "conservative_weight"),
    ("cql", "actions", "n_action_samples"),
    ("calql", "alpha", "conservative_weight"),
    ("calql", "actions", "n_action_samples"),
    ("bcq_discrete", "threshold", "action_flexibility"),
    ("cql_discrete", "alpha", "alpha"),
]


def test_the_table_has_every_algorithm_that_both_have() -> None:
    assert {name: peer.config for name, peer in ALGORITHMS.items()} == CLASSES
    assert {peer.agent for peer in ALGORITHMS.values()} <= set(AGENTS)
    assert tasks_of("bc") == ["PointHazard-v0", "Pendulum-v1"]
    assert tasks_of("qrdqn") == ["HazardGrid-v0"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_setting_of_ours_is_left_to_a_default(name: str) -> None:
    peer = ALGORITHMS[name]
    config = ours.config_of(peer)
    assert type(config) is type(AgentConfigs().settings_for(AGENTS[peer.agent]))
    assert config.learning_rate == 1e-3
    assert config.discount == (None if name == "bc" else 0.99)
    assert getattr(config, "tau", 5e-3) == 5e-3
    own = {field.name for field in dataclasses.fields(config)}
    assert own - {"learning_rate", "discount", "tau"} == set(peer.ours)
    assert {name: getattr(config, name) for name in peer.ours} == peer.ours


@pytest.mark.parametrize(("name", "our_setting", "their_setting"), SAME)
def test_what_both_have_is_set_alike(name: str, our_setting: str, their_setting: str) -> None:
    peer = ALGORITHMS[name]
    assert peer.ours[our_setting] == peer.theirs[their_setting]


def test_both_weigh_by_the_same_advantages() -> None:
    extraction = ExtractionConfig(**EXTRACTION)
    theirs = ALGORITHMS["iql"].theirs
    assert extraction.inverse_temperature == theirs["weight_temp"]
    assert extraction.weight_limit == theirs["max_weight"]


def small_log(*, discrete: bool) -> tasks.Log:
    """Two episodes of two steps: one that terminates, one that is cut."""
    layout = Layout(3, 2)
    batch = layout.unpack(torch.randn(4, layout.width, generator=torch.Generator().manual_seed(0)))
    batch = batch._replace(
        actions=torch.eye(2)[torch.tensor([0, 1, 1, 0])] if discrete else batch.actions.tanh(),
        terminated=torch.tensor([0.0, 1.0, 0.0, 0.0]),
    )
    cut = np.array([False, False, False, True])
    metadata = {"action_count": 2} if discrete else {}
    rows = layout.pack(batch)
    dataset = Dataset(rows, layout, np.array([0, 2, 4]), cut, 2, "", metadata)
    return tasks.Log(dataset, Normalizer(np.zeros(3), np.ones(3)), 0.5)


@pytest.mark.parametrize("name", ["td3bc", "iql", "qrdqn"])
def test_ours_learns_and_acts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "read_log", lambda _: small_log(discrete=name == "qrdqn"))
    learner = ours.build(name, "a task", 0, 10)
    seen = np.random.default_rng(0).standard_normal((5, 3), dtype=np.float32)
    before = learner.act(seen, mean=True)
    assert before.shape == (5, 2)
    np.testing.assert_array_equal(learner.act(seen, mean=True), before)  # It draws nothing.
    draws = np.stack([learner.act(seen, mean=False) for _ in range(20)])
    assert draws.std(axis=0).max() > 0.0
    assert np.abs(draws).max() <= 1.0
    learner.train(30)
    if name != "qrdqn":
        assert np.abs(learner.act(seen, mean=True) - before).max() > 1e-3


def test_theirs_gets_the_same_transitions(tmp_path: Path) -> None:
    dataset = small_log(discrete=False).dataset
    tasks.write_for_them(dataset, tmp_path / "log.npz")
    with np.load(tmp_path / "log.npz") as arrays:
        assert arrays["terminals"].tolist() == [0.0, 1.0, 0.0, 0.0]
        assert arrays["timeouts"].tolist() == [0.0, 0.0, 0.0, 1.0]
        batch = dataset.transitions
        np.testing.assert_array_equal(arrays["observations"], batch.observations.numpy())
        np.testing.assert_array_equal(arrays["actions"], batch.actions.numpy())
        np.testing.assert_array_equal(arrays["rewards"], batch.rewards.numpy())


def test_episodes_side_by_side_are_those_one_by_one() -> None:
    spec, _ = tasks.how_logged("HazardGrid-v0")
    right = np.eye(4, dtype=np.float32)[1]
    returns, steps = [], 0
    env = make_env("HazardGrid-v0", spec)
    for index in range(6):
        env.reset(seed=episode_seed(0, index, "evaluate"))
        ended, total = False, 0.0
        while not ended:
            _, reward, terminated, truncated, _ = env.step(right)
            total, ended, steps = total + reward, terminated or truncated, steps + 1
        returns.append(total)
    assert len(set(returns)) > 1  # They do not all end together.
    asked: list[np.ndarray] = []

    def act(observations: np.ndarray) -> np.ndarray:
        asked.append(observations)
        return np.tile(right, (len(observations), 1))

    shifted = Normalizer(np.full(14, 1.0, np.float32), np.full(14, 0.5, np.float32))
    mean = tasks.evaluate("HazardGrid-v0", shifted, act, 6)
    assert mean == pytest.approx(np.mean(returns))
    assert sum(len(rows) for rows in asked) == steps  # of nobody who has arrived
    assert set(np.unique(np.concatenate(asked))) == {-2.0, 0.0}  # (0 - 1) / .5 and (1 - 1) / .5


def record(
    algorithm: str = "iql", task: str = "Pendulum-v1", seed: int = 0, **changes: Any
) -> dict[str, Any]:
    """Three rounds of 10 updates: ours at 10 a second, theirs at 5, after a slow first one."""
    return {
        "algorithm": algorithm,
        "task": task,
        "seed": seed,
        "ours": {
            "return": changes.get("ours", 1.0),
            "deployed_return": changes.get("deployed", 0.5),
            "seconds": [8.0, 1.0, 1.0],
            "cpu_seconds": [9.0, 1.0, 1.0],
        },
        "theirs": {
            "return": changes.get("theirs", 2.0),
            "seconds": [3.0, 3.0, 3.0],
            "cpu_seconds": [7.0, *changes.get("their_seconds", [2.0, 2.0])],
        },
        "updates": [10, 10, 10],
        "log_return": -7.0,
        "settings": compare.settings_of(Job(algorithm, task, seed), 30, 5),
    }


ARGUMENTS = [
    *("--d3rlpy", "python", "--algorithms", "iql", "bc", "--tasks", "Pendulum-v1"),
    *("--seeds", "0", "1", "--steps", "30", "--episodes", "5", "--workers", "1"),
]


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Job] = []
    jobs = [Job(name, "Pendulum-v1", seed) for seed in (0, 1) for name in ("iql", "bc")]
    failing = {jobs[1]: LearnerFailedError("no memory"), jobs[2]: EnvError("not finite")}

    def run_pair(job: Job, *others: Any) -> dict[str, Any]:
        ran.append(job)
        if job in failing:
            raise failing[job]
        return record(*job)

    monkeypatch.setattr(compare, "read_log", lambda _: small_log(discrete=False))
    monkeypatch.setattr(compare, "run_pair", run_pair)
    arguments = [*ARGUMENTS, "--out", str(tmp_path)]
    lines, text = tmp_path / "peers.jsonl", tmp_path / "peers.txt"
    # Two fail; the others go on.
    assert compare.main(arguments) == 1
    assert ran == jobs
    assert "2 of 46 pairs are finished" in text.read_text()
    # They are left, and the one whose line a kill has torn.
    last = json.loads(lines.read_text().splitlines()[-1])
    lines.write_bytes(lines.read_bytes()[:-20])
    ran.clear()
    failing.clear()
    assert compare.main(arguments) == 0
    torn = Job(last["algorithm"], last["task"], last["seed"])
    assert ran == [job for job in jobs if job in (*jobs[1:3], torn)]
    assert "4 of 46 pairs are finished" in text.read_text()
    # Nothing is left, and whoever asks for less has all of it on the page still.
    ran.clear()
    assert compare.main([*arguments, "--algorithms", "iql", "--seeds", "1"]) == 0
    assert ran == []
    assert "4 of 46 pairs are finished" in text.read_text()
    # Of other settings everything is left.
    monkeypatch.setattr(compare, "COMMON", dataclasses.replace(COMMON, learning_rate=3e-4))
    assert compare.main(arguments) == 0
    assert ran == jobs


def test_what_nobody_expects_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Job] = []

    def run_pair(job: Job, *others: Any) -> dict[str, Any]:
        ran.append(job)
        time.sleep(0.2)
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(compare, "read_log", lambda _: small_log(discrete=False))
    monkeypatch.setattr(compare, "run_pair", run_pair)
    with pytest.raises(ValueError, match="a mistake of ours"):
        compare.main([*ARGUMENTS, "--out", str(tmp_path)])
    assert len(ran) < 4  # It does not first run the rest.


def test_a_seed_is_finished_before_the_next() -> None:
    jobs = jobs_of(["qrdqn", "bc"], TASKS, [3, 4])
    assert jobs == [
        Job(name, task, seed)
        for seed in (3, 4)
        for name, task in (
            ("bc", "PointHazard-v0"),
            ("bc", "Pendulum-v1"),
            ("qrdqn", "HazardGrid-v0"),
        )
    ]


def test_a_learner_that_stops_says_why(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'out of memory' >&2\nexit 3\n")
    python.chmod(0o755)
    job = Job("iql", "Pendulum-v1", 0)
    with (
        pytest.raises(LearnerFailedError, match=r"iql of theirs on Pendulum-v1.*\nout of memory"),
        started(str(python), "theirs", job, "log.npz", 10, 0),
    ):
        pass


def test_a_difference_has_the_interval_of_welch() -> None:
    # Means 2 and 6, squared errors 1/3 and 4/3: error sqrt(5/3), freedom (5/3)^2 / (17/18).
    # The .975 quantile of Student's t at 2.941 is 3.2189.
    value, low, high = difference([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    assert value == -4.0
    assert (low, high) == pytest.approx((-4.0 - 4.1556, -4.0 + 4.1556), abs=2e-3)
    assert difference([1.0, 1.0], [3.0, 3.0]) == (-2.0, -2.0, -2.0)
    assert np.isnan(difference([1.0], [3.0])[1:]).all()


def test_the_page_is_what_the_records_say() -> None:
    records = [
        record(ours=ours, theirs=ours + 3.0, deployed=0.25, seed=seed)
        for seed, ours in enumerate((1.0, 1.1, 1.2))
    ]
    records += [
        record("bc", seed=seed, ours=value, theirs=3.5 - value, their_seconds=[0.5, 0.8])
        for seed, value in enumerate((1.0, 2.0))
    ]
    text = page(records, 9, 30, 5)
    bc, iql = (line.split() for line in text.splitlines() if line.startswith(("bc ", "iql ")))
    assert "5 of 9 pairs are finished" in text
    assert "Pendulum-v1, mean return of the log -7.000" in text
    assert "PointHazard" not in text
    # Means 1.1 and 4.1: three seeds, each spread .1, so error .0816 and 4 degrees of freedom.
    assert iql[:5] == ["iql", "3", "1.100", "0.250", "4.100"]
    assert iql[5:8] == ["-3.000", "[-3.227,", "-2.773]"]
    assert iql[8:] == ["10", "5", "2.00", "[2.00,", "2.00]", "0.90", "below"]
    # From two seeds of bc, .5 below, nothing follows; its turns take 1 s to .5 and .8 of theirs.
    assert bc[:6] == ["bc", "2", "1.500", "0.500", "2.000", "-0.500"]
    assert bc[8:] == ["10", "16", "0.65", "[0.50,", "0.80]", "0.90", "slower"]
    assert "[?, ?]" in page(records[:1], 9, 30, 5)
    assert text.splitlines()[-2:] == ["below: iql on Pendulum-v1", "slower: bc on Pendulum-v1"]
