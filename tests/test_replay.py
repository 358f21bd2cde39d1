"""Every version that acted is kept, and played again: estimates against the truth."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from safe_offrl import commands
from safe_offrl.commands.replay import _truth_of
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import Actor
from safe_offrl.record.final_policy import final_policy
from safe_offrl.record.kept_versions import keep_version, kept_versions, load_version
from safe_offrl.record.run import RunDir
from safe_offrl.report.realised import realised
from safe_offrl.report.run_data import read_run
from safe_offrl.safety.shield import Shield
from safe_offrl.stats.fixed import mean_lower
from safe_offrl.types import Episode
from tests.record.test_final_policy import ONLINE, SMALL, silent

KEPT = [*ONLINE, "acceptance.tail_ratio=1000.0", "safety.delta=1000.0", "safety_constraint=false"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> RunDir:
    config = commands.pretrain_config(dataset=str(tiny_dataset), steps=40, overrides=SMALL)
    plan = commands.plan_pretrain(config, say=silent)
    root = tmp_path_factory.mktemp("replayed")
    return commands.pretrain_run(plan, name="offline", runs=root, say=silent)


def learnt(pretrained: RunDir, name: str, *overrides: str, keep: bool | None = True) -> RunDir:
    settings = commands.finetune_config(
        pretrained, budget=600, keep_versions=keep, overrides=[*KEPT, *overrides]
    )
    plan = commands.plan_finetune(pretrained, settings, accept_risk=True)
    return commands.finetune_run(plan, name=name, runs=pretrained.path.parent, say=silent)


@pytest.fixture(scope="module")
def online(pretrained: RunDir) -> RunDir:
    """Every candidate is accepted, so that there are versions."""
    return learnt(pretrained, "online")


def test_every_version_that_acted_is_kept_as_it_acted(online: RunDir) -> None:
    acted = list(dict.fromkeys(episode.version for episode in online.episodes()))
    assert len(acted) > 2
    versions = [load_version(path) for path in kept_versions(online.path)]
    assert [policy.version for policy in versions] == acted
    last = online.load_checkpoint().info["policy"]["version"]
    shas = [policy.sha256 for policy in versions]
    assert len(set(shas)) == len(shas)
    assert last >= acted[-1]


def test_a_run_that_is_resumed_keeps_the_same(online: RunDir) -> None:
    run = RunDir(shutil.copytree(online.path, online.path.with_name("resumed")))
    shutil.rmtree(run.path / "versions")
    go_back(run)
    commands.resume_finetune("resumed", runs=run.path.parent, say=silent)
    before, after = kept_versions(online.path), kept_versions(run.path)
    assert after
    kept = {path.name: path.read_bytes() for path in before}
    assert all(path.read_bytes() == kept[path.name] for path in after)


def test_a_replay_says_what_each_version_is_and_goes_on(online: RunDir) -> None:
    said: list[str] = []
    runs = online.path.parent
    result = commands.replay_run("online", episodes=4, runs=runs, say=said.append)
    rows = result["versions"]
    assert [row["version"] for row in rows] == [
        load_version(path).version for path in kept_versions(online.path)
    ]
    # The estimate under which a version was accepted, and of the first what it was measured at.
    iterations = online.iterations()
    assert rows[0]["estimate"] == iterations[0]["v_previous"]
    chosen = {line["version"]: line["v_candidate"] for line in iterations if line["accepted"]}
    assert [row["estimate"] for row in rows[1:]] == [chosen[row["version"]] for row in rows[1:]]
    assert sum(row["acted"] for row in rows) == len(online.episodes())
    known = [(row["estimate"], row["truth"]) for row in rows]
    if result["correlation"] is not None:
        assert result["correlation"] == pytest.approx(np.corrcoef(np.array(known).T)[0, 1])
    assert any(f"{len(rows)} versions" in line for line in said)
    assert (online.path / "replay.png").read_bytes().startswith(b"\x89PNG")

    # What was played is not played again; what is missing is, and comes out the same.
    path = online.path / "replay.json"
    stored = json.loads(path.read_bytes())
    path.write_text(json.dumps(stored | {"versions": stored["versions"][:-1]}))
    stored["versions"][0]["return"] = 123.0
    path.write_text(json.dumps(stored | {"versions": stored["versions"][:-1]}))
    again = commands.replay_run("online", episodes=4, runs=runs, say=silent)
    assert again["versions"][0]["return"] == 123.0
    assert again["versions"][1:] == rows[1:]
    other = commands.replay_run("online", episodes=3, runs=runs, say=silent)
    assert other["versions"][0]["return"] != 123.0


def test_what_cannot_be_replayed_is_said(pretrained: RunDir, online: RunDir) -> None:
    runs = pretrained.path.parent
    with pytest.raises(ConfigError, match="Ask for at least 2"):
        commands.replay_run("online", episodes=1, runs=runs, say=silent)
    learnt(pretrained, "forgetful", keep=None)
    with pytest.raises(RunError, match="--keep-versions"):
        commands.replay_run("forgetful", runs=runs, say=silent)
    learnt(pretrained, "robot", "env.kind=real")
    with pytest.raises(ConfigError, match="real, where nothing is played again"):
        commands.replay_run("robot", runs=runs, say=silent)


def test_a_damaged_version_is_named(online: RunDir, tmp_path: Path) -> None:
    path = tmp_path / "000001.safetensors"
    whole = kept_versions(online.path)[1].read_bytes()
    for damage in (b"", b"nothing of the kind", whole[:100], whole[:-20]):
        path.write_bytes(damage)
        with pytest.raises(RunError, match="000001"):
            load_version(path)


def test_a_version_of_another_task_is_refused(online: RunDir) -> None:
    run = RunDir(shutil.copytree(online.path, online.path.with_name("mixed")))
    first = load_version(kept_versions(run.path)[0])
    actor = Actor(3, 2, (4,), torch.Generator().manual_seed(0))
    scaling = first.normalizer._replace(mean=np.zeros(3), std=np.ones(3), offset=None)
    keep_version(
        run.path, DeployedPolicy.from_actor(actor, Shield.abstaining(), scaling, first.version)
    )
    with pytest.raises(RunError, match="is not of this run"):
        commands.replay_run("mixed", episodes=2, runs=run.path.parent, say=silent)


def episode(cost: float, *, accident: bool = False) -> Episode:
    """Two that are alike are the same episode, as their content says."""
    flags, content = (accident, int(accident)), f"{cost} {accident}"
    return Episode(0, 0, 10, 10, 0.0, cost, *flags, 0, "evaluate", 0, content=content)


def test_bounds_by_hand() -> None:
    # Mean 3, variance 2 * 4 / 2 = 4, error 2 / sqrt(3); the .95 quantile of t with 2 degrees of
    # freedom is 2.9200.
    assert mean_lower([1.0, 3.0, 5.0], 0.95) == pytest.approx(3.0 - 2.92 * 2.0 / 3**0.5, abs=1e-3)
    assert mean_lower([31.0, 33.0, 35.0], 0.95) == pytest.approx(33.0 - 3.372, abs=1e-3)
    assert mean_lower([30.0], 0.95) == -math.inf
    found = realised([episode(1.0), episode(3.0), episode(5.0)], "cost")
    assert found.value == 3.0
    assert found.low == pytest.approx(3.0 - 4.0 / 3**0.5)
    assert found.at_least == 0.0  # no cost is below 0
    none = [episode(0.0)] * 9
    assert realised(none, "accident").at_least == 0.0
    one = realised([episode(0.0, accident=True), *none], "accident")
    assert one.value == 0.1
    assert one.at_least == pytest.approx(1 - 0.95**0.1)
    assert realised([episode(0.0, accident=True)], "accident", 0.5).at_least == 0.5


@pytest.mark.parametrize("limit", [0.05, 0.5])
def test_a_version_is_above_where_its_lower_bound_is(
    online: RunDir, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of twenty episodes have an accident: at least .071 with 95 % confidence."""
    played = [episode(1.0, accident=k < 4) for k in range(20)]
    monkeypatch.setattr("safe_offrl.commands.replay.evaluate", lambda *_, **__: iter(played))
    final = final_policy(online)
    final.env.close()
    final = final._replace(limits=(Limit("accident", limit, 1.0),))
    row = _truth_of(final, final.policy, 20, 0, few=False)
    assert row["truth"] == 0.2
    assert row["above"] == (limit == 0.05)
    # They are two episodes that are played again and again. One of two: at least .025.
    row = _truth_of(final, final.policy, 20, 0, few=True)
    assert row["truth"] == 0.2
    assert not row["above"]


def test_a_version_is_above_if_it_is_above_any_limit(
    online: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of twenty episodes each costs 1, and four have an accident: a rate of .2, at least .071."""
    played = [episode(1.0, accident=k < 4) for k in range(20)]
    monkeypatch.setattr("safe_offrl.commands.replay.evaluate", lambda *_, **__: iter(played))
    final = final_policy(online)
    final.env.close()
    for epsilon, cost, above in ((0.05, 2.0, True), (0.3, 0.5, True), (0.3, 2.0, False)):
        both = Limit("accident", epsilon, 1.0), Limit("cost", cost / 100.0, 100.0)
        row = _truth_of(final._replace(limits=both), final.policy, 20, 0, few=False)
        assert (row["truth"], row["further"], row["above"]) == (0.2, [1.0], above)


def go_back(run: RunDir) -> None:
    """To its first checkpoint, as if it had been interrupted after it."""
    for path in sorted((run.path / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    run.lock()
    with run:
        run.set_status("interrupted")


def test_what_a_replay_said_is_gone_when_the_run_goes_on(online: RunDir) -> None:
    run = RunDir(shutil.copytree(online.path, online.path.with_name("further")))
    commands.replay_run("further", episodes=2, runs=run.path.parent, say=silent)
    go_back(run)
    commands.resume_finetune("further", runs=run.path.parent, say=silent)
    assert not (run.path / "replay.json").exists()


def test_a_replay_that_was_broken_off_is_not_compared(online: RunDir) -> None:
    run = RunDir(shutil.copytree(online.path, online.path.with_name("partial")))
    whole = commands.replay_run("partial", episodes=2, runs=run.path.parent, say=silent)
    found = read_run(run.path).replay
    assert found is not None
    assert found.versions == len(whole["versions"])
    assert found.most_cost == max(row["most_cost"] for row in whole["versions"])
    part = whole | {"versions": whole["versions"][:-1]}
    (run.path / "replay.json").write_text(json.dumps(part))
    assert read_run(run.path).replay is None
