"""A run on probation ends where its warm-up shows that the pretrained policy exceeds the limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from safe_offrl import commands
from safe_offrl.record.run import RunDir
from tests.accident_line import pretrained_on_a_line, silent

ONLINE = ["warmup_steps=200", "iteration_steps=60", "batch_size=32", "update_every=5"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return pretrained_on_a_line(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("probation", [True, False])
def test_an_alarm_in_the_warm_up_ends_it(
    pretrained: RunDir, probation: bool, tmp_path: Path
) -> None:
    overrides = [*ONLINE, f"probation={str(probation).lower()}"]
    config = commands.finetune_config(pretrained, budget=400, epsilon=0.01, overrides=overrides)
    plan = commands.plan_finetune(pretrained, config, accept_risk=True, say=silent)
    said: list[str] = []
    run = commands.finetune_run(plan, name="online", runs=tmp_path, say=said.append)
    steps, decisions = run.episodes()[-1].total_steps, run.iterations()
    assert any(line.startswith("alarm       episode") for line in said)
    if probation:
        assert "on probation, the pretrained policy was shown to exceed its limit" in said[-1]
        assert steps < 200
        assert not decisions
        assert run.state["status"] == "finished"
    else:
        assert "on probation" not in said[-1]
        assert steps > 200
        assert decisions
