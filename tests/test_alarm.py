"""An alarm of the monitor online, in an environment where every episode has an accident."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safe_offrl import commands
from safe_offrl.monitor import SafetyMonitor
from safe_offrl.run import RunDir
from safe_offrl.safety import Limit
from tests.test_resume import online_plan, pretrain_plan, pretrained, root

__all__ = ["pretrain_plan", "pretrained", "root"]  # fixtures
EPSILON = 0.05


def alarming_run(root: Path, pretrained: RunDir, name: str) -> RunDir:
    plan = online_plan(pretrained, f"safety.epsilon={EPSILON}")
    step = plan.env.step

    def always(action: np.ndarray) -> Any:
        *rest, info = step(action)
        return *rest, {**info, "accident": True}

    plan.env.step = always  # type: ignore[method-assign]
    return commands.finetune_run(plan, name=name, runs=root, say=lambda text: None)


@pytest.fixture(scope="module")
def alarmed(root: Path, pretrained: RunDir) -> RunDir:
    return alarming_run(root, pretrained, "alarmed")


def test_after_an_alarm_the_curve_of_its_evidence_begins_anew(alarmed: RunDir) -> None:
    """It shows the evidence that the next alarm goes by, not what led to those before."""
    answered = [i["step"] for i in alarmed.iterations() if i["reason"].startswith("alarm")]
    lines = [json.loads(x) for x in (alarmed.path / "metrics.jsonl").read_text().splitlines()]
    points = [x for x in lines if "safety/alarm_log_evidence" in x]
    assert answered[-1] == 1400
    assert points[-1]["step"] == 1500  # of one episode since
    fresh = SafetyMonitor(Limit("accident", EPSILON, 1.0))
    fresh.update(True, 0.0, 0)
    assert points[-1]["safety/alarm_log_evidence"] == fresh.log_evidence
    # All the other numbers go on: they are of the whole run.
    assert points[-1]["safety/accidents_total"] == 15.0
