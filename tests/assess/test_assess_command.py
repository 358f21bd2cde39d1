"""`safe-offrl assess`, and the gate of `finetune`: nothing is begun on what the log cannot show."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from safe_offrl import cli, commands
from safe_offrl.assess.estimates import Estimates
from safe_offrl.assess.fitted_evaluation import Fitted
from safe_offrl.assess.fitted_features import FittedConfig
from safe_offrl.commands import assess
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.record.run import RunDir
from safe_offrl.safety.monitor import allowance

QUICK = FittedConfig(steps=60, networks=1, replicates=20, groups=20)
SIZES = ["networks.actor_hidden=[16]", "networks.critic_hidden=[16]", "critic.hidden=[16,16]"]
TINY = ["steps=20", "alignment_steps=5", "log_every=10", "batch_size=32", *SIZES]
ONLINE = ["warmup_steps=200", "iteration_steps=200", "batch_size=32"]


def silent(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assess, "CONFIG", QUICK)


@pytest.fixture
def pretrained(tiny_dataset: Path, tmp_path: Path) -> RunDir:
    config = commands.pretrain_config(dataset=str(tiny_dataset), overrides=TINY)
    plan = commands.plan_pretrain(config, say=silent)
    return commands.pretrain_run(plan, name="p", runs=tmp_path / "runs", say=silent)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[int]]:
    """``said(risk)``: from now on every log shows this risk +- 0.1 %; the list counts how often."""

    def assume(risk: float) -> list[int]:
        calls: list[int] = []

        def found(*_: Any, **__: Any) -> Estimates:
            calls.append(1)
            part = Fitted(risk, 0.001, 0.0, 0.0, 0.0, 5000.0)
            return Estimates("accident", 1.0, 5000, part, part, 0.5)

        monkeypatch.setattr(assess, "assess_policy", found)
        return calls

    return assume


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["safe-offrl", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_an_assessment_is_written_read_again_and_printed(
    pretrained: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No stand-in here: the log of the fixture, and its own evaluation."""
    arguments = ["assess", str(pretrained.path), "--epsilon", "0.3", "--json"]
    assert call(monkeypatch, *arguments) == 0
    output = capsys.readouterr()
    answer = json.loads(output.out)["runs"][str(pretrained.path)]
    assert "fitted Q evaluation" in output.err
    stored = pretrained.read_json("assessment.json")
    assert stored["estimates"] == answer["estimates"]
    assert 0.0 <= answer["risk_low"] <= answer["risk_upper"] <= answer["risk_high"] <= 1.0
    assert answer["limit"] == 0.3
    assert answer["sentence"] in output.err
    assert len(stored["policy_sha256"]) == 64
    before = (pretrained.path / "assessment.json").read_bytes()
    assert call(monkeypatch, *arguments) == 0
    assert "fitted Q evaluation" not in capsys.readouterr().err  # it was still true
    assert (pretrained.path / "assessment.json").read_bytes() == before


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"format": 1}'])
def test_an_assessment_that_is_not_of_this_policy_is_made_again(
    pretrained: RunDir, said: Callable[[float], list[int]], damage: bytes
) -> None:
    calls = said(0.01)
    commands.assess_runs([pretrained.path], say=silent)
    path = pretrained.path / "assessment.json"
    path.write_bytes(damage)
    commands.assess_runs([pretrained.path], say=silent)
    foreign = json.loads(path.read_bytes()) | {"policy_sha256": "another"}
    path.write_text(json.dumps(foreign))
    commands.assess_runs([pretrained.path], say=silent)
    assert len(calls) == 3


def test_the_gate_refuses_before_a_folder_is_made(
    pretrained: RunDir,
    said: Callable[[float], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    calls = said(0.2)
    runs = tmp_path / "online"
    arguments = ["finetune", str(pretrained.path), "--runs", str(runs), "--epsilon", "0.1"]
    arguments += ["--budget", "600", *ONLINE]
    for extra in ([], ["--dry-run"]):
        assert call(monkeypatch, *arguments, *extra) == 2
        error = capsys.readouterr().err
        assert "accident probability 20.0%" in error
        assert "--accept-risk" in error
    assert not runs.exists()
    assert len(calls) == 1  # the second refusal read the first one's file
    # It costs a budget of one episode nothing to be refused for what it is.
    assert call(monkeypatch, *arguments[:-5], "--budget", "5") == 2
    assert "less than one episode" in capsys.readouterr().err


def test_what_the_log_shows_to_be_safe_goes_on_and_says_so(
    pretrained: RunDir, said: Callable[[float], list[int]]
) -> None:
    said(0.05)
    config = commands.finetune_config(pretrained, budget=600, epsilon=0.1, overrides=ONLINE)
    plan = commands.plan_finetune(pretrained, config, say=silent)
    plan.env.close()
    assert "risk        accident probability 5.0%" in plan.header
    assert "limit 10.0%" in plan.header
    # The limit is a strict one, on the upper limit and not on the estimate.
    upper = pretrained.read_json("assessment.json")["risk_upper"]
    config = commands.finetune_config(pretrained, budget=600, epsilon=upper, overrides=ONLINE)
    assert upper > 0.05
    plan = commands.plan_finetune(pretrained, config, say=silent)
    plan.env.close()
    assert plan.config.probation


def test_what_the_log_cannot_show_begins_on_probation_and_says_so(
    pretrained: RunDir, said: Callable[[float], list[int]]
) -> None:
    said(0.05)
    config = commands.finetune_config(
        pretrained, budget=3000, epsilon=0.05, overrides=[*ONLINE, "warmup_steps=2500"]
    )
    assert not config.probation
    plan = commands.plan_finetune(pretrained, config, say=silent)
    plan.env.close()
    assert plan.config.probation
    assert "probation   the log does not show that every limit is kept" in plan.header
    # The first decision comes at step 2,700, at the end of the 27th episode if all are full-length.
    assert plan.env.horizon == 100
    assert allowance(plan.limits[0], 0.95, 27) == 6
    assert "(more than 6 of 27 full-length episodes with an accident, evenly spread" in plan.header
    short_overrides = [*ONLINE, "warmup_steps=100", "iteration_steps=20"]
    few = commands.finetune_config(pretrained, budget=600, epsilon=0.05, overrides=short_overrides)
    short = commands.plan_finetune(pretrained, few, say=silent)
    short.env.close()
    assert "(2 full-length episodes are too few for that)" in short.header
    accepted = commands.plan_finetune(pretrained, config, accept_risk=True, say=silent)
    accepted.env.close()
    assert not accepted.config.probation
    assert "probation" not in accepted.header


def test_in_reality_how_many_accidents_are_allowed_is_for_the_user_to_say(
    pretrained: RunDir, said: Callable[[float], list[int]]
) -> None:
    said(0.05)
    real = [*ONLINE, "env.kind=real", "safety.epsilon=0.05"]
    config = commands.finetune_config(pretrained, budget=600, overrides=real)
    with pytest.raises(RunError, match=r"cannot show .* give an --accident-budget, or start"):
        commands.plan_finetune(pretrained, config, say=silent)
    allowed = commands.finetune_config(pretrained, budget=600, accident_budget=2, overrides=real)
    plan = commands.plan_finetune(pretrained, allowed, say=silent)
    plan.env.close()
    assert plan.config.probation
    # What the log shows to be above the limit no budget lets begin.
    said(0.2)
    (pretrained.path / "assessment.json").unlink()
    with pytest.raises(RunError, match="is above the limit") as refused:
        commands.plan_finetune(pretrained, allowed, say=silent)
    assert "--accident-budget" not in str(refused.value)


def test_accepted_risk_is_not_assessed_and_is_stored(
    pretrained: RunDir, said: Callable[[float], list[int]], tmp_path: Path
) -> None:
    calls = said(0.9)
    config = commands.finetune_config(pretrained, budget=600, overrides=ONLINE)
    plan = commands.plan_finetune(pretrained, config, accept_risk=True, say=silent)
    assert "risk        accepted by --accept-risk; not assessed" in plan.header
    run = commands.finetune_run(plan, name="online", runs=tmp_path / "runs", say=silent)
    stored = yaml.safe_load(run.config_text)["inputs"]["risk"]
    assert stored == "accepted by --accept-risk; not assessed"
    assert not calls
    commands.assess_runs([pretrained.path], say=silent)
    free = commands.finetune_config(
        pretrained, budget=600, safety_constraint=False, overrides=ONLINE
    )
    for chosen, accept, words in (
        (config, True, "accepted by --accept-risk; accident probability 90.0%"),
        (free, False, "not limited; accident probability 90.0%"),
    ):
        plan = commands.plan_finetune(pretrained, chosen, accept_risk=accept, say=silent)
        plan.env.close()
        assert words in plan.header
    assert len(calls) == 1


def test_of_several_runs_one_is_named(
    pretrained: RunDir, said: Callable[[float], list[int]], tmp_path: Path
) -> None:
    config = commands.pretrain_config(
        dataset=yaml.safe_load(pretrained.config_text)["inputs"]["dataset"],
        seed=1,
        overrides=TINY,
    )
    plan = commands.plan_pretrain(config, say=silent)
    other = commands.pretrain_run(plan, name="q", runs=tmp_path / "runs", say=silent)
    said(0.05)
    commands.assess_runs([pretrained.path], say=silent)
    said(0.03)
    lines: list[str] = []
    both = [pretrained.path, other.path]
    # A return of 5 % is higher than one of 3 %: fitted() above gives both the same number.
    assert commands.assess_runs(both, epsilon=0.1, say=lines.append)["chosen"] == str(both[0])
    assert "highest lower bound of return" in lines[-1]
    result = commands.assess_runs(both, epsilon=0.04, say=lines.append)
    assert (result["chosen"], result["qualifies"]) == (str(other.path), True)
    result = commands.assess_runs(both, epsilon=0.001, say=lines.append)
    assert (result["chosen"], result["qualifies"]) == (str(other.path), False)
    assert "none is shown to be below its limit" in lines[-1]


def test_bad_input_is_refused(pretrained: RunDir) -> None:
    with pytest.raises(ConfigError, match='under the constraint "accident", so cost_limit'):
        commands.assess_runs([pretrained.path], cost_limit=3.0, say=silent)
    with pytest.raises(ConfigError, match="strictly between 0 and 1"):
        commands.assess_runs([pretrained.path], epsilon=2.0, say=silent)
    with pytest.raises(RunError, match="is not a run folder"):
        commands.assess_runs([pretrained.path / "nothing"], say=silent)
