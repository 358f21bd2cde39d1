"""Benchmarks: what a suite runs, in which order, what is kept, and what is refused before."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from safe_offrl.benchmark import METHODS, Suite, jobs_of, load_suite, narrowed, parse_suite
from safe_offrl.commands import benchmark_run, benchmark_text
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.run import RunDir

SMALL = """
environments: [HazardLine-v0]
methods: [ours, rlpd]
seeds: 1
budget: 300
evaluation_episodes: 5
pretrain:
  steps: 20
  alignment_steps: 5
  batch_size: 32
  networks: {actor_hidden: [16], critic_hidden: [16], critics: 3}
  critic: {hidden: [16], members: 3, reference: 1}
finetune: {warmup_steps: 100, batch_size: 32}
"""


def suite_of(text: str = SMALL, **changes: str) -> Suite:
    for old, new in changes.items():
        text = text.replace(old, new)
    return parse_suite(text, "small")


def test_every_suite_fits_the_settings() -> None:
    for name in ("smoke", "point", "safety"):
        suite = load_suite(name)
        assert suite.methods[0] == "ours"  # the others are compared with it
        assert f"{len(suite.methods)} methods" in benchmark_text(suite, Path("nowhere"))


def test_point_has_every_method_ten_seeds_and_fifty_thousand_steps() -> None:
    suite = load_suite("point")
    assert set(suite.methods) == set(METHODS)
    assert (suite.seeds, suite.budget) == (tuple(range(10)), 50_000)


def test_methods_with_equal_offline_settings_share_their_pretrained_policies() -> None:
    suite = load_suite("point")
    jobs = jobs_of(suite, Path("root"))
    pretrained = {job.folder.parent.name for job in jobs if job.kind == "pretrain"}
    assert pretrained == {
        "pretrained-ours",
        "pretrained-wsrl",
        "pretrained-iql",
        "pretrained-bc-safe",
    }
    needs = {job.folder: job.needs for job in jobs if job.kind == "finetune"}
    base = Path("root/PointHazard-v0")
    assert needs[base / "rlpd" / "3"] == base / "pretrained-ours" / "3"
    assert needs[base / "calql" / "3"] == base / "pretrained-wsrl" / "3"
    assert len(jobs) == 10 * (4 + 15)


def test_a_run_comes_after_what_it_needs_and_seeds_after_whole_seeds() -> None:
    jobs = jobs_of(load_suite("point"), Path("root"))
    position = {job.folder: i for i, job in enumerate(jobs)}
    assert all(position[job.needs] < position[job.folder] for job in jobs if job.needs)
    seeds = [int(job.folder.name) for job in jobs]
    assert seeds == sorted(seeds)


def test_settings_of_the_suite_the_method_and_what_is_tuned_in_this_order() -> None:
    text = SMALL + "settings: {rlpd: {finetune: {utd: 3, learner: {tau: 0.1}}}}\n"
    ours, rlpd = (job for job in jobs_of(suite_of(text), Path("r")) if job.kind == "finetune")
    assert "warmup_steps=100" in ours.arguments
    assert not [a for a in ours.arguments if a.startswith(("kl", "utd"))]
    assert {"warmup_steps=100", "kl=False", "shield=False", "utd=3", "learner.tau=0.1"} <= set(
        rlpd.arguments
    )


def test_a_key_that_is_no_text_is_refused_as_unknown() -> None:
    suite = suite_of(**{"batch_size: 32}": "1: 32}"})
    with pytest.raises(ConfigError, match='Unknown key "1"'):
        benchmark_text(suite, Path("root"))


def test_only_some_methods_and_other_seeds() -> None:
    suite = narrowed(load_suite("point"), "rlpd,marvel", "100,101")
    assert (suite.methods, suite.seeds) == (("rlpd", "marvel"), (100, 101))
    with pytest.raises(ConfigError, match=r'has no method "marvle".*"marvel"'):
        narrowed(load_suite("point"), "marvle", None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("budget", "buget", 'Unknown key "buget".*"budget"'),
        ("[ours, rlpd]", "[ours, rlpt]", 'no method "rlpt".*"rlpd"'),
        ("seeds: 1", "seeds: 0", "at least 1 environment, 1 seed"),
        ("seeds: 1", "seeds: 1e9", "more than 1,000 seeds"),
        ("budget", "2.5", 'Unknown key "2.5"'),
        ("environments: [HazardLine-v0]", "environments: ['m:..']", "cannot name a folder"),
        ("budget: 300\n", "", 'does not say "budget"'),
        ("finetune: {warmup_steps: 100, batch_size: 32}", "finetune: 3", "no key: value pairs"),
        ("finetune:", "settings: {ours: {online: {}}}\nfinetune:", '"settings.ours" may hold'),
        ("finetune:", "settings: {ours: {finetune: 1}}\nfinetune:", "no key: value pairs"),
        ("finetune:", "datasets: {HazardLine-v0: 3}\nfinetune:", "text is needed"),
    ],
)
def test_a_wrong_suite_is_one_sentence(old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        suite_of(**{old: new})


def test_an_unknown_suite_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r'no suite "piont".*"point".*point, safety, smoke'):
        load_suite("piont")


def test_a_wrong_setting_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    suite = suite_of(warmup_steps="warmup_stebs")
    with pytest.raises(ConfigError, match=r'Unknown key "warmup_stebs".*"warmup_steps"'):
        benchmark_run(suite, root=tmp_path / "root", workers=1)
    assert not (tmp_path / "root").exists()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Suite]:
    """Suites whose log is a small file of HazardLine instead of the cached default."""
    from safe_offrl.behaviours import random_behaviour
    from safe_offrl.data.hdf5 import write_dataset
    from safe_offrl.env import make_env
    from safe_offrl.mixture import collect
    from safe_offrl.safety import SafetySpec

    env = make_env("HazardLine-v0", SafetySpec())
    arrays = collect(env, behaviours=[random_behaviour(1)], shares=[1.0], transitions=800, seed=0)
    path = tmp_path / "line.hdf5"
    metadata = {"env_id": "HazardLine-v0", "accident": "cost", "cost_threshold": 0.0, "horizon": 20}
    write_dataset(path, arrays, metadata | {"behaviours": [{"name": "random"}]})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda text: suite_of(text + f"datasets: {{HazardLine-v0: {path}}}\n")


def test_a_suite_runs_is_kept_and_goes_on(tmp_path: Path, cached: Callable[[str], Suite]) -> None:
    root = tmp_path / "bench"
    said: list[str] = []
    first = cached(SMALL.replace("[ours, rlpd]", "[ours]"))
    benchmark_run(first, root=root, workers=2, say=said.append)
    ours = root / "HazardLine-v0" / "ours" / "0"
    assert RunDir(ours).state["status"] == "finished"
    written = (ours / "ledger.jsonl").stat().st_mtime_ns
    # A run of another seed, say of a benchmark that goes on beside this one, is none of its own.
    shutil.copytree(ours, ours.with_name("1"))
    result = benchmark_run(cached(SMALL), root=root, workers=2, say=said.append)
    assert (ours / "ledger.jsonl").stat().st_mtime_ns == written  # kept, not run again
    assert any("3 in" in line and "2 of them finished" in line for line in said)
    runs = result["HazardLine-v0"]["runs"]
    assert [(row["method"], row["label"]) for row in runs] == [
        ("ours", "ours/0"),
        ("rlpd", "rlpd/0"),
    ]
    assert "ours" in (root / "HazardLine-v0.html").read_text()
    assert json.loads((root / "HazardLine-v0.json").read_bytes()) == result["HazardLine-v0"]
    assert "HazardLine-v0.png" in (root / "HazardLine-v0.md").read_text()
    assert (root / "HazardLine-v0.png").stat().st_size > 10_000
    # The records that `make records` keeps are enough: nothing is learnt again elsewhere.
    if shutil.which("make") is None or shutil.which("xz") is None:
        pytest.skip("no make or no xz here")
    where = [f"SUITE_RUNS={root}", f"RECORDS={tmp_path / 'records'}", "SUITE=small"]
    subprocess.run(["make", "records", *where], check=True, cwd=Path(__file__).parent.parent)
    elsewhere = tmp_path / "elsewhere"
    with tarfile.open(tmp_path / "records" / "small-seed-0.tar.xz") as archive:
        archive.extractall(elsewhere, filter="data")
    said.clear()
    assert benchmark_run(cached(SMALL), root=elsewhere, workers=2, say=said.append) == result
    assert any("3 in" in line and "3 of them finished" in line for line in said)
    assert not (elsewhere / "HazardLine-v0" / "pretrained-ours").exists()


def test_a_failed_run_is_named_and_the_others_are_compared(
    tmp_path: Path, cached: Callable[[str], Suite]
) -> None:
    root = tmp_path / "bench"
    # 20 steps of an episode are more than a budget of 10 holds: found when the run is planned.
    text = SMALL + "settings: {rlpd: {finetune: {budget: 10}}}\n"
    said: list[str] = []
    with pytest.raises(RunError, match=r"1 of 3 runs failed \(HazardLine-v0/rlpd/0\).*logs"):
        benchmark_run(cached(text), root=root, workers=1, say=said.append)
    why = "A budget of 10 steps is less than one episode"
    assert any("HazardLine-v0/rlpd/0" in line and why in line for line in said)
    assert RunDir(root / "HazardLine-v0" / "ours" / "0").state["status"] == "finished"
    log = (root / "logs" / "HazardLine-v0-rlpd-0.log").read_text()
    assert why in log
