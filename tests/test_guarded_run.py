"""A run behind a guard, from the log to a certificate: every command knows of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from safe_offrl import commands
from safe_offrl.certify.certificate import sealed
from safe_offrl.commands.active_parts import active_line
from safe_offrl.errors import RunError
from safe_offrl.record.final_policy import final_policy
from safe_offrl.record.run import RunDir
from safe_offrl.safety.calibration import NO_FALLBACK
from safe_offrl.safety.guard import Guard
from safe_offrl.train.fallback import Fallback
from safe_offrl.train.finetune_config import FinetuneConfig

TINY = ["alignment_steps=20", "log_every=10", "batch_size=32"]
TINY += ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]
# An untrained critic sees about a cost of 1 ahead of everything.
LIMIT = ["safety.constraint=cost", "safety.cost_limit=1"]
ONLINE = ["warmup_steps=200", "iteration_steps=200", "batch_size=32"]


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pretrained(root: Path, tiny_dataset: Path) -> RunDir:
    """Of a log that shows what the guard needs, so it is told."""
    config = commands.pretrain_config(
        dataset=str(tiny_dataset), steps=60, overrides=[*TINY, *LIMIT]
    )
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fallback, "refusals", lambda self, *_: [() for _ in self.constraints])
        plan = commands.plan_pretrain(config, say=silent)
        assert "20 of value alignment and 60 of the guard's fallback" in plan.header
        run = commands.pretrain_run(plan, name="offline", runs=root, say=said.append)
    assert any("\nguard       allowed" in text for text in said)
    return run


def plan_of(pretrained: RunDir, **settings: Any) -> commands.FinetunePlan:
    config = commands.finetune_config(pretrained, budget=400, overrides=ONLINE, **settings)
    return commands.plan_finetune(pretrained, config, accept_risk=True, say=silent)


@pytest.fixture(scope="module")
def online(root: Path, pretrained: RunDir) -> RunDir:
    plan = plan_of(pretrained)
    return commands.finetune_run(plan, name="online", runs=root, say=silent)


def active(header: str) -> str:
    (line,) = [line for line in header.splitlines() if line.startswith("active ")]
    return line


def test_a_header_says_whether_the_guard_acts(pretrained: RunDir) -> None:
    assert "shield (abstains), guard;" in active(plan_of(pretrained).header)
    assert "guard" not in active(plan_of(pretrained, guard=False).header)


def test_a_header_says_why_it_abstains(pretrained: RunDir, root: Path) -> None:
    config = FinetuneConfig()
    both = {"shield": ("of this",), "guard": ("of that", "and that")}
    line = "active      KL, accident constraint, shield (abstains), guard (abstains)"
    why = "; the shield abstains for of this; the guard abstains for of that; and that"
    assert active_line(config, both) == line + why
    without = FinetuneConfig(guard=False)
    assert active_line(without, both) == (
        "active      KL, accident constraint, shield (abstains); the shield abstains for of this"
    )
    # Pretrain runs of earlier versions do not say what their guard needs.
    report = pretrained.read_json("calibration.json")
    earlier = {key: value for key, value in report.items() if key != "guard_refusals"}
    try:
        pretrained.write_json("calibration.json", earlier)
        assert f"the guard abstains for {NO_FALLBACK}" in active(plan_of(pretrained).header)
    finally:
        pretrained.write_json("calibration.json", report)


def test_the_ledger_and_the_curves_have_what_the_fallback_did(online: RunDir) -> None:
    guarded = [episode.guarded_steps for episode in online.episodes()]
    assert 0 < sum(guarded) < sum(episode.steps for episode in online.episodes())
    lines = (online.path / "ledger.jsonl").read_text().splitlines()
    assert ["guarded_steps" in line for line in lines] == [steps > 0 for steps in guarded]
    points = [json.loads(x) for x in (online.path / "metrics.jsonl").read_text().splitlines()]
    shares = [p["safety/guarded_share"] for p in points if "safety/guarded_share" in p]
    assert shares[-1] == pytest.approx(sum(guarded) / sum(e.steps for e in online.episodes()))


def test_off_it_does_nothing(root: Path, pretrained: RunDir) -> None:
    plan = plan_of(pretrained, guard=False)
    run = commands.finetune_run(plan, name="unguarded", runs=root, say=silent)
    assert not any(episode.guarded_steps for episode in run.episodes())
    assert "guard" not in run.load_checkpoint().info["policy"]
    final = final_policy(run)
    final.env.close()
    assert final.policy.guard is None


def certified(root: Path, name: str) -> dict[str, Any]:
    return commands.certify_run(name, cost_limit=90.0, runs=root, say=silent)


def test_a_certificate_is_about_the_guard_too(root: Path, online: RunDir) -> None:
    certificate = certified(root, "online")
    final = final_policy(online)
    final.env.close()
    assert final.policy.guard is not None
    expected = {"acts": True, "caution": 2.0, "sha256": final.policy.guard.sha256}
    assert certificate["guard"] == expected | {"limits": {"cost": 1.0}}
    folder = online.path / "certificates" / "1"
    episodes = [json.loads(x) for x in (folder / "episodes.jsonl").read_text().splitlines()]
    guarded = sum(episode.get("guarded_steps", 0) for episode in episodes)
    assert certificate["guarded_steps"] == guarded > 0
    assert final.policy.guard.sha256 in (folder / "certificate.html").read_text()
    assert f"its fallback acted in {guarded:,} steps" in (folder / "certificate.html").read_text()
    checks = commands.verify_certificate(folder / "certificate.json", say=silent)
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("guard", [{"acts": True, "sha256": "0" * 64}, {"acts": False}, None])
def test_a_certificate_of_another_guard_is_not_that_of_the_run(
    root: Path, online: RunDir, guard: dict[str, Any] | None
) -> None:
    if not (online.path / "certificates" / "1" / "certificate.json").is_file():
        certified(root, "online")
    path = online.path / "certificates" / "1" / "certificate.json"
    content = {k: v for k, v in json.loads(path.read_bytes()).items() if k != "guard"}
    other = path.with_name("other.json")
    other.write_text(json.dumps(sealed(content | ({} if guard is None else {"guard": guard}))))
    with pytest.raises(RunError, match="does not hold: policy"):
        commands.verify_certificate(other, say=silent)
    other.unlink()


def test_without_a_guard_a_certificate_has_none(root: Path, online: RunDir) -> None:
    certificate = certified(root, "offline")  # a pretrained policy acts by itself
    assert certificate["guard"] == {"acts": False, "limits": {}}
    assert certificate["guarded_steps"] == 0
    folder = root / "offline" / "certificates" / "1"
    assert "its fallback acted" not in (folder / "certificate.html").read_text()
    assert all(
        check.passed
        for check in commands.verify_certificate(folder / "certificate.json", say=silent)
    )


def test_an_evaluation_is_of_the_policy_behind_its_guard(
    root: Path, online: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guard that lets nothing pass leaves its mark on it."""
    always = commands.evaluate_run("online", episodes=4, runs=root, out=root / "a", say=silent)
    take_over = Guard.take_over

    def infinitely(self: Guard, observation: Any, left: float, action: Any, spent: Any) -> Any:
        return take_over(self, observation, left, action, dict.fromkeys(spent, math.inf))

    monkeypatch.setattr(Guard, "take_over", infinitely)
    never = commands.evaluate_run("online", episodes=4, runs=root, out=root / "b", say=silent)
    assert always["mean_return"] != never["mean_return"]
    assert never["guarded_share"] == 1.0
    assert 0.0 <= always["guarded_share"] < 1.0
