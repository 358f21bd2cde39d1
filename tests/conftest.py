"""What several test files need: a small log of the default environment, and runs by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import settings

from safe_offrl.collect.behaviours import random_behaviour, scripted_behaviours
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.env.make import make_env
from safe_offrl.record.ledger import chain_start, ledger_line
from safe_offrl.record.run import RunDir
from safe_offrl.spec import SafetySpec
from safe_offrl.types import Episode
from tests import promises

torch.set_num_threads(1)  # results depend on the number, and CI has two cores
settings.register_profile("untimed", deadline=None)  # a busy machine is no bug
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _compiled_code_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the tests compile they compile, and leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PointHazard-v0, 3000 transitions of scripted and random behaviour, both outcomes."""
    env = make_env("PointHazard-v0", SafetySpec())
    behaviours = [*scripted_behaviours(env), random_behaviour(env.action_size)]
    shares = [1.0 / len(behaviours)] * len(behaviours)
    arrays = log_episodes(env, behaviours=behaviours, shares=shares, transitions=3000, seed=0)
    path = tmp_path_factory.mktemp("data") / "tiny.hdf5"
    metadata = {
        "env_id": "PointHazard-v0",
        "accident": "cost",
        "cost_threshold": 0.0,
        "horizon": env.horizon,
        "behaviours": [{"name": b.name} for b in behaviours],
    }
    write_dataset(path, arrays, metadata)
    env.close()
    assert np.sum(arrays["accidents"]) > 0
    return path


_FIGURES = pytest.StashKey[dict[str, list[str]]]()
_OUTCOMES = pytest.StashKey[dict[bool, dict[str, int]]]()


def pytest_configure(config: pytest.Config) -> None:
    figures: dict[str, list[str]] = {}
    config.stash[_FIGURES] = figures
    outcomes: dict[bool, dict[str, int]] = {True: {}, False: {}}
    config.stash[_OUTCOMES] = outcomes


@pytest.fixture(scope="session")
def figure(request: pytest.FixtureRequest) -> promises.Record:
    """``figure("R1", "100/100 ...")``: what a test of a promise reached."""
    return lambda number, text: request.config.stash[_FIGURES].setdefault(number, []).append(text)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or report.failed:
        counts = item.config.stash[_OUTCOMES][report.passed]
        for mark in item.iter_markers("promise"):
            counts[mark.args[0]] = counts.get(mark.args[0], 0) + 1
    return report


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """After `make test-slow`: every promise, and what was reached."""
    if "promise" in str(config.option.markexpr):
        outcomes = config.stash[_OUTCOMES]
        terminalreporter.section("promises")
        terminalreporter.write_line(
            promises.table(config.stash[_FIGURES], outcomes[True], outcomes[False])
        )


def ledger_lines(episodes: Sequence[Episode], start: str = "") -> list[bytes]:
    """Each episode's line, chained; many at once, without a file."""
    lines, head = [], start
    for episode in episodes:
        line, head = ledger_line(episode, head)
        lines.append(line)
    return lines


def _write_run(
    root: Path,
    name: str,
    accidents: Sequence[Any],
    *,
    returns: Any = None,
    flags: dict[str, bool] | None = None,
    seed: int = 0,
    steps: int = 50,
    iterations: Sequence[dict[str, Any]] = (),
    evaluation: dict[str, Any] | None = None,
    kind: str = "finetune",
    status: str = "finished",
    origin: str = "pi0",
    env: str = "PointHazard-v0",
    signals: Sequence[dict[str, float]] | None = None,
    **settings: Any,
) -> Path:
    """A run folder with given accidents [episodes], ``steps`` each.

    ``iterations``: what differs from an accepted one with both constraints satisfied.
    """
    settings = {
        "seed": seed,
        "budget": 50_000,
        "safety": {"epsilon": 0.1, "confidence": 0.95},
        **(flags or {"kl": True, "safety_constraint": True, "shield": True, "guard": True}),
        **settings,
    }
    inputs = {"env_id": env, "pretrained_sha256": f"{origin}-{seed}"}
    text = yaml.safe_dump({"inputs": inputs, kind: settings})
    with RunDir.create(root, kind=kind, config_text=text, name=name) as run:
        run.set_status(status)
        returns = np.ones(len(accidents)) if returns is None else returns
        lines = [
            Episode(
                index=i,
                seed=i,
                steps=steps,
                total_steps=(i + 1) * steps,
                episode_return=float(returns[i]),
                cost=float(accident),
                accident=bool(accident),
                accident_steps=int(accident),
                version=0,
                phase="online",
                shield_interventions=0,
                signal_costs=signals[i] if signals else {},
            )
            for i, accident in enumerate(accidents)
        ]
        start = chain_start((run.path / "config.yaml").read_bytes())
        (run.path / "ledger.jsonl").write_bytes(b"".join(ledger_lines(lines, start)))
        for index, changes in enumerate(iterations):
            decision = {
                "index": index,
                "step": 1000 * (index + 1),
                "accepted": True,
                "constraints_satisfied": True,
                "kl_forward_mean": 0.01,
                "kl_reverse_mean": 0.02,
                "delta": 0.05,
                "v_candidate": 0.05,
                "v_previous": 0.06,
                "limit": 0.1,
                "reason": "both constraints hold",
            }
            run.log_iteration(decision | changes)
        if evaluation is not None:
            run.write_json("evaluation.json", evaluation)
    return root / name


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """``write_run(name, accidents, ...)``: see :func:`_write_run`; returns the folder."""
    return functools.partial(_write_run, tmp_path)


@pytest.fixture
def write_group(tmp_path: Path) -> Callable[..., Path]:
    """``write_group(name, accidents of each run, first=0, ...)``: a folder of runs, by seed."""

    def write(name: str, runs: Sequence[Any], first: int = 0, **settings: Any) -> Path:
        for seed, accidents in enumerate(runs, first):
            returns = settings.get("returns", [1.0]) * max(1, len(accidents))
            options = {**settings, "returns": returns, "seed": seed}
            _write_run(tmp_path / name, f"{seed}", accidents, **options)
        return tmp_path / name

    return write


@pytest.fixture
def paired_runs(write_run: Callable[..., Path]) -> Callable[..., list[Path]]:
    """``paired_runs(seeds, episodes)``: for each seed a constrained run and one of plain RLPD."""
    rlpd = {"kl": False, "safety_constraint": False, "shield": False, "guard": False}

    def write(seeds: int = 5, episodes: int = 400) -> list[Path]:
        rng = np.random.default_rng(0)
        paths = []
        progress = 1 - np.exp(-np.arange(episodes) / 120)
        for seed in range(seeds):
            for flags, name, p, level in ((None, "safe", 0.03, 9.5), (rlpd, "free", 0.15, 10.0)):
                paths.append(
                    write_run(
                        f"{name}-{seed}",
                        rng.random(episodes) < p * (1.5 - 0.5 * progress),
                        returns=level * progress + rng.normal(0, 1.5, episodes) + 0.2 * seed,
                        flags=flags,
                        seed=seed,
                        iterations=[
                            {"v_previous": p * (1 + 0.5 * np.exp(-i / 4)) + 0.01}
                            for i in range(episodes * 50 // 1000)
                        ],
                    )
                )
        return paths

    return write
