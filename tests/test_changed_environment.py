"""An environment that is another one behind its id: every command that meets it says so."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from safe_offrl import cli, commands
from safe_offrl.assess.fitted_features import FittedConfig
from safe_offrl.collect import build as collecting
from safe_offrl.collect.behaviours import random_behaviour
from safe_offrl.collect.build import build_dataset, default_dataset
from safe_offrl.collect.log_plan import CollectConfig
from safe_offrl.collect.sb3 import LearnersConfig, PPOConfig
from safe_offrl.commands import assess
from safe_offrl.commands.environment import LOGGED, PRETRAINED
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.hdf5 import read_hdf5, write_dataset
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.env.identity import KEY
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.record.run import RESUMED, RunDir
from safe_offrl.spec import SafetySpec
from tests.changing_task import CHANGES, Change, enter, task, write_task
from tests.test_resume import Killed, kill_at, silent

P = "ce_"
ENV = f"{P}track:{P}Track-v0"
RULE = f"safety.accident={P}rules:fast"
SIZES = ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16]"]
ONLINE = ["warmup_steps=40", "iteration_steps=40", "batch_size=16"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task in "task", a log of it, and three runs in "runs".

    "offline" is pretrained, and certified for a limit that is easily kept; "online" went on from
    it, and "begun" did until it was killed.
    """
    home = tmp_path_factory.mktemp("changed")
    write_task(home / "task", P)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFE_OFFRL_CACHE", str(home / "cache"))
        enter(home / "task", P, patch)
        spec = SafetySpec(accident=f"{P}rules:fast")
        learners = LearnersConfig(ppo=PPOConfig(steps=0, penalised_steps=0))
        config = CollectConfig(transitions=1000, pilot_share=0.1, learners=learners)
        build_dataset(ENV, spec, path=home / "log.hdf5", config=config)
        pretraining = commands.pretrain_config(
            env=ENV,
            dataset=str(home / "log.hdf5"),
            steps=20,
            overrides=["alignment_steps=5", "batch_size=32", "compile=off", RULE, *SIZES],
        )
        plan = commands.plan_pretrain(pretraining, say=silent)
        assert "environment NOT" not in plan.header
        commands.pretrain_run(plan, name="offline", runs=home / "runs", say=silent)
        commands.certify_run("offline", epsilon=0.97, episodes=12, runs=home / "runs", say=silent)
        online = plan_online(home)
        assert "environment NOT" not in online.header
        commands.finetune_run(online, name="online", runs=home / "runs", say=silent)
        with pytest.MonkeyPatch.context() as kill:
            kill_at(kill, "append_episode", 3)
            with pytest.raises(Killed):
                commands.finetune_run(
                    plan_online(home), name="begun", runs=home / "runs", say=silent
                )
    return home


def plan_online(home: Path) -> commands.FinetunePlan:
    offline = RunDir(home / "runs" / "offline")
    config = commands.finetune_config(offline, budget=200, overrides=["compile=off", *ONLINE])
    return commands.plan_finetune(offline, config, accept_risk=True, say=silent)


@pytest.fixture
def changed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Change:
    """Enter the task as it is after the change of that name, in a new process as it were."""
    change: Change = CHANGES[request.param]
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(home / "cache"))
    enter(write_task(tmp_path / "task", P, change), P, monkeypatch)
    return change


@pytest.fixture
def unchanged(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter a copy of the task, in another folder."""
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(home / "cache"))
    folder = write_task(tmp_path / "a copy" / "task", P)
    enter(folder, P, monkeypatch)
    return folder


def phrases(change: Change) -> list[str]:
    return [text.replace("{p}", P) for text in change.said]


def copied(home: Path, tmp_path: Path) -> Path:
    """The runs folder of a copy of all, to be written to."""
    shutil.copy(home / "log.hdf5", tmp_path)
    return Path(shutil.copytree(home / "runs", tmp_path / "runs"))


# --- the cached default log ---


def test_the_default_log_is_another_one_for_every_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(env_id: str, spec: SafetySpec, *, path: Path, config: Any, progress: Any) -> Path:
        built.append(path)
        path.write_bytes(b"data")
        return path

    def default(folder: str, change: Change | None = None) -> Path:
        with monkeypatch.context() as patch:
            enter(write_task(tmp_path / folder, P, change), P, patch)
            return default_dataset(ENV, SafetySpec(accident=f"{P}rules:fast"))

    built: list[Path] = []
    monkeypatch.setattr(collecting, "build_dataset", fake)
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path / "cache"))
    first = default("first")
    assert default("second") == first  # the same task in another folder
    assert built == [first]
    others = [default(name, change) for name, change in CHANGES.items()]
    assert len({first, *others}) == 1 + len(CHANGES)
    assert built == [first, *others]


def test_a_log_says_where_it_was_made_and_its_content_is_what_it_was(
    home: Path, unchanged: Path, tmp_path: Path
) -> None:
    arrays, metadata, _, _ = read_hdf5(home / "log.hdf5")
    assert metadata[KEY] == task(P).identity()
    assert metadata[KEY]["environment"]["kwargs"] == {"edge": 1.0, "gain": 0.03}

    def content(metadata: dict[str, Any]) -> str:
        write_dataset(tmp_path / "log.hdf5", arrays, metadata)
        return load(tmp_path / "log.hdf5").sha256

    without = {key: value for key, value in metadata.items() if key != KEY}
    assert content(without) == content(metadata) == load(home / "log.hdf5").sha256
    assert content({**metadata, "seed": 5}) != content(metadata)


def load(path: Path) -> Dataset:
    return load_dataset(path, discount=0.99, spec=SafetySpec(accident=f"{P}rules:fast"))


# --- learning ---


@pytest.mark.parametrize("changed", [n for n in CHANGES if n != "horizon"], indirect=True)
def test_pretrain_says_how_the_environment_differs_from_the_logs(
    home: Path, changed: Change, tmp_path: Path
) -> None:
    config = commands.pretrain_config(
        env=ENV, dataset=str(home / "log.hdf5"), overrides=["steps=1", RULE, *SIZES]
    )
    plan = commands.plan_pretrain(config, say=silent)
    lines = [line for line in plan.header.splitlines() if "environment NOT as logged: " in line]
    assert len(lines) == 1
    assert all(text in lines[0] for text in phrases(changed))


@pytest.mark.parametrize("changed", ["kwargs"], indirect=True)
def test_a_run_keeps_both_identities(
    home: Path, changed: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = commands.pretrain_config(
        env=ENV,
        dataset=str(home / "log.hdf5"),
        steps=5,
        overrides=["alignment_steps=1", "batch_size=16", "compile=off", RULE, *SIZES],
    )
    plan = commands.plan_pretrain(config, say=silent)
    run = commands.pretrain_run(plan, name="elsewhere", runs=tmp_path / "runs", say=silent)
    assert run.versions[KEY] == task(P).identity()
    assert run.versions[LOGGED] == load(home / "log.hdf5").metadata[KEY]
    said: list[str] = []
    quick = FittedConfig(steps=60, networks=1, replicates=20, groups=20)
    monkeypatch.setattr(assess, "CONFIG", quick)
    commands.assess_runs([run.path], say=said.append)
    assert said[0].startswith("environment NOT as logged: kwargs edge 1.0 -> 0.2")
    offline = RunDir(home / "runs" / "offline")
    assert LOGGED not in offline.versions
    # And online, from a policy that was pretrained in the log's.
    online = commands.finetune_run(
        plan_online(home), name="online", runs=tmp_path / "runs", say=silent
    )
    assert online.versions[KEY] == run.versions[KEY]
    assert online.versions[LOGGED] == online.versions[PRETRAINED] == offline.versions[KEY]
    assert "judged in another environment" in online.config_text


@pytest.mark.parametrize("changed", CHANGES, indirect=True)
def test_finetune_says_how_the_environment_differs(home: Path, changed: Change) -> None:
    if changed is CHANGES["horizon"]:
        with pytest.raises(ConfigError, match=r"has 30 steps now, but \"offline\" .* within 40\."):
            plan_online(home)
        return
    plan = plan_online(home)
    plan.env.close()
    (line,) = [text for text in plan.header.splitlines() if text.startswith("environment NOT")]
    assert line.startswith("environment NOT as logged and pretrained in: ")
    assert all(text in line for text in phrases(changed))
    assert plan.inputs.risk == (
        "accepted by --accept-risk; not assessed; judged in another environment"
    )


@pytest.mark.parametrize("changed", ["helper"], indirect=True)
def test_a_run_goes_on_in_another_environment_only_if_that_is_accepted(
    home: Path, changed: Change, tmp_path: Path
) -> None:
    runs = copied(home, tmp_path)
    before = (runs / "begun" / "versions.json").read_bytes()
    with pytest.raises(RunError, match=rf"changed since .*: the source of {P}winds\. Restore it"):
        commands.resume_finetune("begun", runs=runs, say=silent)
    assert (runs / "begun" / "versions.json").read_bytes() == before
    # Episodes since the last checkpoint would come out otherwise; as on a real machine, none is
    # played again if the checkpoint has them.
    said: list[str] = []
    run = RunDir(runs / "begun")
    began = run.versions[KEY]
    with pytest.raises(RunError, match="came out differently when replayed"):
        commands.resume_finetune("begun", runs=runs, accept_risk=True, say=said.append)
    assert f"environment NOT that of begun so far: the source of {P}winds" in said[0]
    assert run.environments == [began, task(P).identity()]
    assert run.versions[RESUMED] == [task(P).identity()]
    # It is said once: the run is of both.
    with pytest.raises(RunError, match="came out differently when replayed"):
        commands.resume_finetune("begun", runs=runs, say=silent)
    # What went on elsewhere is not pooled with what did not.
    result = commands.compare_runs([runs / "begun", runs / "online"], say=silent)
    assert any("the environments that they were resumed in" in note for note in result["notes"])
    assert result["groups"] == []


def test_what_only_looks_otherwise_goes_on_to_its_end(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A source that has changed and does the same, as after a repair."""
    comment = Change("cliff", "START = 0.0", "START = 0.0  # metres", ())
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(home / "cache"))
    enter(write_task(tmp_path / "task", P, comment), P, monkeypatch)
    runs = copied(home, tmp_path)

    def resumed(*options: str) -> int:
        arguments = ["safe-offrl", "finetune", "--resume", "begun", "--runs", str(runs), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert resumed() == 2
    assert "or go on all the same with --accept-risk" in capsys.readouterr().err
    assert resumed("--accept-risk") == 0
    assert f"the source of {P}cliff" in capsys.readouterr().out
    assert RunDir(runs / "begun").episodes() == RunDir(runs / "online").episodes()


# --- evaluations and certificates ---


@pytest.mark.parametrize("changed", ["wrapper"], indirect=True)
def test_evaluate_says_that_it_is_another_environment_and_records_it(
    home: Path, changed: Change, tmp_path: Path
) -> None:
    runs = copied(home, tmp_path)
    said: list[str] = []
    result = commands.evaluate_run("online", episodes=2, runs=runs, say=said.append)
    assert said[0].startswith("environment NOT that of online: additional wrappers none -> ")
    assert result[KEY] == task(P).identity()
    assert RunDir(runs / "online").read_json("evaluation.json")[KEY] == result[KEY]
    notes = commands.compare_runs([runs / "online"], say=silent)["notes"]
    assert any(
        note.startswith("online was evaluated in another environment than it ran in: additional")
        for note in notes
    )


@pytest.mark.parametrize("changed", CHANGES, indirect=True)
def test_a_certificate_of_another_environment_is_not_valid(home: Path, changed: Change) -> None:
    certificate = home / "runs" / "offline" / "certificates" / "1" / "certificate.json"
    said: list[str] = []
    with pytest.raises(RunError, match=r"does not hold: environment\. Do not rely on it"):
        commands.verify_certificate(certificate, say=said.append)
    (line,) = [text for text in said if text.startswith("FAILED")]
    assert "environment changed since then: " in line
    assert all(text in line for text in phrases(changed))


def test_a_certificate_holds_where_the_same_sources_are(home: Path, unchanged: Path) -> None:
    certificate = home / "runs" / "offline" / "certificates" / "1" / "certificate.json"
    checks = commands.verify_certificate(certificate, say=silent)
    assert [c.name for c in checks if c.passed][-2:] == ["environment", "policy"]


def test_an_environment_that_is_gone_is_not_the_certified_one(home: Path, unchanged: Path) -> None:
    (unchanged / f"{P}track.py").write_text("1 / 0\n")
    certificate = home / "runs" / "offline" / "certificates" / "1" / "certificate.json"
    said: list[str] = []
    with pytest.raises(RunError, match="does not hold: environment"):
        commands.verify_certificate(certificate, say=said.append)
    assert any("cannot be made any more" in text for text in said)


@pytest.mark.parametrize("changed", ["rule", "class", "horizon", "kwargs"], indirect=True)
def test_a_certificate_of_an_earlier_version_is_checked_as_far_as_it_says(
    home: Path, changed: Change, tmp_path: Path
) -> None:
    """It holds the hashes of two files and the horizon: of kwargs it knows nothing."""
    from safe_offrl.certify.certificate import sealed

    runs = copied(home, tmp_path)
    path = runs / "offline" / "certificates" / "1" / "certificate.json"
    content = json.loads(path.read_bytes())
    del content["environment"][KEY], content["sha256"]
    path.write_text(json.dumps(sealed(content)))
    said: list[str] = []
    if changed is CHANGES["kwargs"]:
        commands.verify_certificate(path, say=said.append)
        return
    with pytest.raises(RunError, match="does not hold: environment"):
        commands.verify_certificate(path, say=said.append)
    key = {"rule": "accident_source", "class": "environment_source", "horizon": "horizon"}
    (name,) = [n for n, c in CHANGES.items() if c is changed]
    assert any(f"changed since then: {key[name]}" in text for text in said)


@pytest.mark.parametrize("changed", ["registering module"], indirect=True)
def test_certify_says_that_it_is_another_environment_and_begins_anew(
    home: Path, changed: Change, tmp_path: Path
) -> None:
    runs = copied(home, tmp_path)
    begun = runs / "offline" / "certificates" / "1"
    (begun / "certificate.json").unlink()  # as if it had been interrupted
    said: list[str] = []
    result = commands.certify_run("offline", epsilon=0.97, episodes=20, runs=runs, say=said.append)
    assert result["claim"]["attempt"] == 2
    assert "Attempt 1 is not finished, but differs in" in said[0]
    assert "environment" in said[0]
    (line,) = [text for text in said if text.startswith("environment NOT")]
    assert line.startswith(f"environment NOT that of offline: the source of {P}track")
    assert result["environment"][KEY] == task(P).identity()


# --- comparisons ---


@pytest.mark.parametrize("changed", CHANGES, indirect=True)
def test_compare_pools_nothing_over_what_has_changed(
    home: Path, changed: Change, tmp_path: Path
) -> None:
    """The other run is the same one but for the environment that it names: as the task is now."""
    runs = copied(home, tmp_path)
    shutil.copytree(runs / "online", runs / "copy")
    pooled = commands.compare_runs([runs / "online", runs / "copy"], say=silent)
    assert [row["label"] for row in pooled["groups"]] == ["ALL 2 runs"]
    RunDir(runs / "copy").path.joinpath("versions.json").write_text(
        json.dumps({**RunDir(runs / "copy").versions, KEY: task(P).identity()})
    )
    said: list[str] = []
    apart = commands.compare_runs([runs / "online", runs / "copy"], say=said.append)
    assert (apart["groups"], apart["pairings"]) == ([], [])
    assert "ALL" not in "\n".join(line for text in said for line in text.splitlines()[:40])
    note = apart["notes"][0]
    assert note.startswith(f"The runs of {ENV} differ, and nothing is pooled or compared over them")
    assert all(text in note for text in phrases(changed))


def test_random_actions_are_logged(home: Path) -> None:
    """What the tests above learn from is what they are about: both outcomes, under the rule."""
    dataset = load(home / "log.hdf5")
    assert random_behaviour(1).name == "random"
    assert 0.0 < dataset.episode_accidents.mean() < 1.0
