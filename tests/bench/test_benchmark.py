"""Benchmarks: what a suite runs, in which order, what is kept, and what is refused before."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safe_offrl.bench.methods import METHODS
from safe_offrl.bench.suite import Job, Suite, jobs_of, load_suite, narrowed, parse_suite
from safe_offrl.commands import benchmark_run, benchmark_text, finetune_config, pretrain_config
from safe_offrl.commands.benchmark import _next_command, _settings_now
from safe_offrl.config import read_yaml, yaml_text
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import RunInputs, run_yaml

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
ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs" / "results" / "records"
SUITES = sorted(path.stem for path in (ROOT / "configs" / "suites").glob("*.yaml"))
QUESTIONS = ("ablations", "agents", "agents-discrete", "guard", "margin", "precision", "two-limits")


def suite_of(text: str = SMALL, **changes: str) -> Suite:
    for old, new in changes.items():
        text = text.replace(old, new)
    return parse_suite(text, "small")


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_fits_the_settings(name: str) -> None:
    suite = load_suite(name)
    assert suite.methods[0] == (
        "rlpd" if name == "ablations" else "ours"
    )  # what others stand beside
    assert f"{len(suite.methods)} methods" in benchmark_text(suite, Path("nowhere"))


def test_every_method_is_run_by_a_suite() -> None:
    assert set(METHODS) == {method for name in SUITES for method in load_suite(name).methods}


def test_point_is_ten_seeds_of_every_method_but_those_of_a_further_question() -> None:
    suite = load_suite("point")
    asked = {method for name in QUESTIONS for method in load_suite(name).methods}
    assert set(METHODS) - set(suite.methods) == asked - set(suite.methods)
    assert (len(suite.methods), suite.seeds, suite.budget) == (15, tuple(range(10)), 50_000)


@pytest.mark.parametrize(
    ("name", "first", "second", "differing"),
    [
        ("margin", "ours", "ours-margin", {"finetune lagrangian.aim": (1.0, 0.5)}),
        (
            "precision",
            "ours",
            "ours-bf16",
            {f"{kind} precision": ("fp32", "bf16") for kind in ("pretrain", "finetune")},
        ),
        ("precision", "frozen", "frozen-bf16", {"pretrain precision": ("fp32", "bf16")}),
        ("ablations", "rlpd", "rlpd-narrow", {"finetune learner.target_entropy": (-0.5, -1.0)}),
        ("ablations", "frozen", "frozen-cql", {"pretrain agent": ("iql", "cql")}),
        ("ablations", "frozen", "frozen-calql", {"pretrain agent": ("iql", "calql")}),
    ],
)
def test_a_question_varies_one_setting(
    name: str, first: str, second: str, differing: dict[str, tuple[object, object]]
) -> None:
    suite = narrowed(load_suite(name), None, "0")
    for env in suite.environments:
        jobs = {job.folder: job for job in jobs_of(replace(suite, environments=(env,)), Path("r"))}
        offline = {
            path: pretrain_config(**job.options, overrides=job.overrides)
            for path, job in jobs.items()
            if job.needs is None
        }
        both = []
        for method in (first, second):
            online = jobs[Path("r") / env / method / "0"]
            assert online.needs is not None
            pair = (jobs[online.needs], online)
            values = {job.kind: _settings_now(job, offline) for job in pair}
            both.append({f"{kind} {k}": v for kind in values for k, v in values[kind].items()})
        one, other = both
        assert {key: (one[key], other[key]) for key in one if one[key] != other[key]} == differing


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_further_question_is_a_suite_with_pages_of_its_own(name: str) -> None:
    done = subprocess.run(
        ["make", "-n", name, "SEEDS=3"], check=True, cwd=ROOT, capture_output=True, text=True
    )
    said = " ".join(done.stdout.replace("\\\n", " ").split())
    assert f"benchmark --suite {name} --workers 2 --seeds 3" in said
    assert f"docs/results/{name}; done" in said


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
    off = {"kl=False", "safety_constraint=False", "shield=False", "guard=False"}
    assert {"warmup_steps=100", *off, "utd=3", "learner.tau=0.1"} <= set(rlpd.arguments)


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
        ("finetune:", "replay_episodes: 1\nfinetune:", "takes 2 episodes at least"),
        ("finetune:", "replay_episodes: -5\nfinetune:", "takes 2 episodes at least"),
        ("finetune:", "replay_episodes: 2\nfinetune:", "no method of it keeps any"),
    ],
)
def test_a_wrong_suite_is_one_sentence(old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        suite_of(**{old: new})


def test_an_unknown_suite_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r'no suite "piont".*There are ablations, .*, two-.*; or'):
        load_suite("piont")


def test_a_wrong_setting_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    suite = suite_of(warmup_steps="warmup_stebs")
    with pytest.raises(ConfigError, match=r'Unknown key "warmup_stebs".*"warmup_steps"'):
        benchmark_run(suite, root=tmp_path / "root", workers=1)
    assert not (tmp_path / "root").exists()


# --- what is kept, and what is refused ---


def write_finished(suite: Suite, root: Path, evaluation_seed: int | None = None) -> list[Job]:
    """Every run of the suite as if it had ended, settings as the commands resolve them."""
    jobs = jobs_of(suite, root)
    for job in jobs:
        config = (
            pretrain_config(**job.options, overrides=job.overrides)
            if job.needs is None
            else finetune_config(RunDir(job.needs), **job.options, overrides=job.overrides)
        )
        env_id = job.folder.parent.parent.name
        inputs = RunInputs(env_id=env_id, dataset="log.hdf5", dataset_sha256="0" * 64)
        text = run_yaml(inputs, job.kind, config, job.folder.parent)
        with RunDir.create(
            job.folder.parent, kind=job.kind, config_text=text, name=job.folder.name
        ) as run:
            run.set_status("finished")
            seed = job.seed if evaluation_seed is None else evaluation_seed
            run.write_json("evaluation.json", {"episodes": suite.evaluation_episodes, "seed": seed})
        (job.folder / "checkpoints" / "step-000000001").mkdir()
    return jobs


def finished(suite: Suite, root: Path) -> int:
    """How many runs `--dry-run` calls finished."""
    found = re.search(r", (\d+) of them finished", benchmark_text(suite, root))
    assert found is not None
    return int(found[1])


def test_each_seed_is_evaluated_on_episodes_of_its_own(tmp_path: Path) -> None:
    suite = suite_of(**{"seeds: 1": "seeds: 2"})
    jobs = write_finished(suite, tmp_path)
    assert {_next_command(job, suite) for job in jobs} == {None}
    for job in jobs:
        (job.folder / "evaluation.json").unlink()
        command = _next_command(job, suite)
        assert command is not None
        assert command[:6] == [
            "evaluate",
            str(job.folder),
            "--episodes",
            "5",
            "--seed",
            job.folder.name,
        ]


def test_an_evaluation_on_other_episodes_is_made_again_where_there_is_a_policy(
    tmp_path: Path,
) -> None:
    suite = suite_of(**{"seeds: 1": "seeds: 2"})
    jobs = write_finished(suite, tmp_path, evaluation_seed=0)
    assert [job.seed for job in jobs if _next_command(job, suite)] == [1, 1, 1]
    assert finished(suite, tmp_path) == 3
    by_hand = {"episodes": 5, "seed": 0, "mean_action": True}
    RunDir(jobs[0].folder).write_json("evaluation.json", by_hand)
    assert [job.seed for job in jobs if _next_command(job, suite)] == [0, 1, 1, 1]
    for job in jobs:
        shutil.rmtree(job.folder / "checkpoints")
    assert finished(suite, tmp_path) == 6  # records alone: what was evaluated is kept


@pytest.mark.parametrize("name", SUITES)
def test_no_run_of_an_unchanged_suite_is_refused(tmp_path: Path, name: str) -> None:
    suite = narrowed(load_suite(name), None, "7")
    jobs = write_finished(suite, tmp_path)
    assert finished(suite, tmp_path) == len(jobs)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("budget: 300", "budget: 400", 'ours/0" was made with budget 300.*run with 400'),
        (
            "warmup_steps: 100, ",
            "warmup_steps: 200, ",
            'ours/0" was made with warmup_steps 100.*run with 200',
        ),
        ("warmup_steps: 100, ", "", 'ours/0" was made with warmup_steps 100.*run with 5000'),
        (
            "finetune:",
            "settings: {rlpd: {finetune: {utd: 2}}}\nfinetune:",
            'rlpd/0" was made with utd 1.*run with 2.*or delete "[^"]*/rlpd/0"\\.',
        ),
        (
            "steps: 20\n",
            "steps: 30\n",
            'pretrained-ours/0" was made with steps 20.*run with 30.*or delete .* started from it',
        ),
        ("datasets: {}", "datasets: {HazardLine-v0: a.csv}", "with dataset None.*run with 'a.csv'"),
    ],
)
def test_runs_of_a_changed_suite_are_refused(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = SMALL + "datasets: {}\n"
    write_finished(suite_of(text), tmp_path)
    for act in (benchmark_text, lambda *a: benchmark_run(a[0], root=a[1], workers=1)):
        with pytest.raises(RunError, match=message):
            act(suite_of(text, **{old: new}), tmp_path)
    assert not (tmp_path / "logs").exists()  # before anything is begun


def test_what_a_policy_was_pretrained_under_is_compared_without_it(tmp_path: Path) -> None:
    """The record of a run holds what it took over: limits, networks and the critic."""
    text = SMALL.replace("  steps: 20\n", "  steps: 20\n  safety: {epsilon: 0.3}\n")
    for job in write_finished(suite_of(text), tmp_path):
        if job.needs is None:
            shutil.rmtree(job.folder)
    assert finished(suite_of(text), tmp_path) == 3
    for old, new, key in (
        ("epsilon: 0.3", "epsilon: 0.2", r"safety\.epsilon 0\.3"),
        ("critic_hidden: [16]", "critic_hidden: [32]", r"networks\.critic_hidden \[16\]"),
    ):
        with pytest.raises(RunError, match=f'ours/0" was made with {key}'):
            benchmark_text(suite_of(text, **{old: new}), tmp_path)


def test_how_a_run_was_computed_is_no_difference_nor_is_a_setting_it_did_not_know(
    tmp_path: Path,
) -> None:
    suite = suite_of()
    (job,) = (j for j in write_finished(suite, tmp_path) if j.folder.parent.name == "rlpd")
    path = job.folder / "config.yaml"
    text = path.read_text().replace("device: auto", "device: cpu")
    text = text.replace("compile: auto", "compile: 'on'").replace("  utd: 1\n", "")
    assert "utd" not in text
    path.write_text(text)
    assert finished(suite, tmp_path) == 3
    path.write_text(text.replace("  budget: 300\n", "  bugdet: 300\n"))
    with pytest.raises(RunError, match=r'rlpd/0" cannot be compared.*"bugdet"'):
        benchmark_text(suite, tmp_path)


def test_settings_of_an_agent_count_where_it_is_chosen(tmp_path: Path) -> None:
    jobs = {job.kind: job.folder for job in write_finished(suite_of(), tmp_path)}

    def change(kind: str, agent: str) -> None:
        path = jobs[kind] / "config.yaml"
        config = read_yaml(path.read_text(), path.name)
        settings = config[kind] if kind == "pretrain" else config[kind]["baseline"]
        settings["agents"][agent]["learning_rate"] = 0.7
        path.write_text(yaml_text(config))

    for kind in jobs:
        change(kind, "cql")
    change("finetune", "iql")  # RLPD goes on online
    assert finished(suite_of(), tmp_path) == 3
    change("pretrain", "iql")
    with pytest.raises(RunError, match=r"made with agents\.iql\.learning_rate 0\.7"):
        benchmark_text(suite_of(), tmp_path)
    online = suite_of(SMALL.replace("ours, rlpd", "iql"))
    shutil.rmtree(tmp_path)
    jobs = {job.kind: job.folder for job in write_finished(online, tmp_path)}
    change("finetune", "iql")
    with pytest.raises(RunError, match=r"made with baseline\.agents\.iql\.learning_rate 0\.7"):
        benchmark_text(online, tmp_path)


def test_gains_of_a_controller_count_where_there_is_one(tmp_path: Path) -> None:
    text = SMALL.replace("rlpd]", "sac-pid]")
    jobs = write_finished(suite_of(text), tmp_path)
    for job in jobs[1:]:
        path = job.folder / "config.yaml"
        path.write_text(re.sub("proportional: .*", "proportional: 0.7", path.read_text()))
    message = r'sac-pid/0" was made with baseline\.pid\.proportional 0\.7'
    with pytest.raises(RunError, match=message):
        benchmark_text(suite_of(text), tmp_path)
    assert finished(suite_of(SMALL.replace("ours, rlpd", "ours")), tmp_path) == 2


def test_the_records_kept_here_are_of_the_suite_as_it_is(tmp_path: Path) -> None:
    suite = narrowed(load_suite("point"), None, "0")
    with tarfile.open(RECORDS / "point-seed-0.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert finished(suite, tmp_path) == len(suite.methods) + 4  # nothing is pretrained for nothing


def test_versions_are_played_again_after_the_evaluation(tmp_path: Path) -> None:
    keeps = "settings: {ours: {finetune: {keep_versions: true}}}"
    suite = suite_of(**{"finetune:": f"replay_episodes: 3\n{keeps}\nfinetune:"})
    offline, online, other = write_finished(suite, tmp_path)
    assert "keep_versions=True" in online.arguments
    for job in (offline, other):
        assert not any("keep_versions" in argument for argument in job.arguments)
    assert _next_command(online, suite) is None  # nothing was kept, so nothing can be played
    (online.folder / "versions").mkdir()
    (online.folder / "versions" / "000000.safetensors").touch()
    wanted = ["replay", str(online.folder), "--episodes", "3", "--seed", "0"]
    command = _next_command(online, suite)
    assert command is not None
    assert command[:6] == wanted
    run = RunDir(online.folder)
    found = {"episodes": 3, "seed": 0, "versions": [{}]}
    run.write_json("replay.json", found)
    assert _next_command(online, suite) is None
    others: tuple[dict[str, Any], ...] = ({"episodes": 2}, {"seed": 1}, {"versions": []})
    for changes in others:
        run.write_json("replay.json", found | changes)
        assert _next_command(online, suite) == command
    assert _next_command(online, suite_of()) is None  # the suite does not ask for it


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Suite]:
    """Suites whose log is a small file of HazardLine instead of the cached default."""
    from safe_offrl.collect.behaviours import random_behaviour
    from safe_offrl.collect.mixture import log_episodes
    from safe_offrl.data_formats.hdf5 import write_dataset
    from safe_offrl.env.make import make_env
    from safe_offrl.spec import SafetySpec

    env = make_env("HazardLine-v0", SafetySpec())
    arrays = log_episodes(
        env, behaviours=[random_behaviour(1)], shares=[1.0], transitions=800, seed=0
    )
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
    subprocess.run(["make", "records", *where], check=True, cwd=ROOT)
    elsewhere = tmp_path / "elsewhere"
    with tarfile.open(tmp_path / "records" / "small-seed-0.tar.xz") as archive:
        archive.extractall(elsewhere, filter="data")
    said.clear()
    assert benchmark_run(cached(SMALL), root=elsewhere, workers=2, say=said.append) == result
    assert any("3 in" in line and "3 of them finished" in line for line in said)
    assert not (elsewhere / "HazardLine-v0" / "pretrained-ours").exists()


def test_a_suite_says_how_many_versions_were_above_the_limit(
    tmp_path: Path, cached: Callable[[str], Suite]
) -> None:
    said: list[str] = []
    keeps = "settings: {rlpd: {finetune: {keep_versions: true}}}\n"
    suite = cached(SMALL.replace("[ours, rlpd]", "[rlpd]") + "replay_episodes: 2\n" + keeps)
    result = benchmark_run(suite, root=tmp_path / "bench", workers=1, say=said.append)
    run = RunDir(tmp_path / "bench" / "HazardLine-v0" / "rlpd" / "0")
    kept = list((run.path / "versions").iterdir())
    assert len(kept) > 1
    (row,) = result["HazardLine-v0"]["runs"]
    assert row["replay"]["versions"] == len(kept)
    assert row["replay"]["above"] == run.read_json("replay.json")["above"]
    assert "played again" in (tmp_path / "bench" / "HazardLine-v0.md").read_text()


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
