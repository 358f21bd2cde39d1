"""An alarm of the monitor online, in an environment where every episode has an accident."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safe_offrl import commands
from safe_offrl.limits import Limit
from safe_offrl.record.run import RunDir
from safe_offrl.safety.monitor import SafetyMonitor
from tests.test_resume import online_plan, pretrain_plan, pretrained, root

__all__ = ["pretrain_plan", "pretrained", "root"]  # fixtures
EPSILON = 0.05


def alarming_run(
    root: Path, pretrained: RunDir, name: str, *overrides: str, since: int = 0
) -> tuple[RunDir, list[str]]:
    """The run, and what it said; every step behind the first ``since`` is an accident."""
    options = "selection.share=0", *overrides  # else the end would test who has acted
    plan = online_plan(pretrained, f"safety.epsilon={EPSILON}", *options)
    step, steps = plan.env.step, itertools.count(1)

    def watched(action: np.ndarray) -> Any:
        *rest, info = step(action)
        return *rest, {**info, "accident": next(steps) > since}

    plan.env.step = watched  # type: ignore[method-assign]
    said: list[str] = []
    return commands.finetune_run(plan, name=name, runs=root, say=said.append), said


@pytest.fixture(scope="module")
def alarmed(root: Path, pretrained: RunDir) -> tuple[RunDir, list[str]]:
    return alarming_run(root, pretrained, "alarmed")


def test_after_an_alarm_the_curve_of_its_evidence_begins_anew(
    alarmed: tuple[RunDir, list[str]],
) -> None:
    """It shows the evidence that the next alarm goes by, not what led to those before."""
    run, _ = alarmed
    answered = [i["step"] for i in run.iterations() if i["reason"].startswith("alarm")]
    lines = [json.loads(x) for x in (run.path / "metrics.jsonl").read_text().splitlines()]
    points = [x for x in lines if "safety/alarm_log_evidence" in x]
    assert answered[-1] == 1400
    assert points[-1]["step"] == 1500  # of one episode since
    fresh = SafetyMonitor(Limit("accident", EPSILON, 1.0))
    fresh.update(True, 0.0, 0)
    assert points[-1]["safety/alarm_log_evidence"] == fresh.log_evidence
    # All the other numbers go on: they are of the whole run.
    assert points[-1]["safety/accidents_total"] == 15.0


SAME = (
    "the episodes so far show, at 95 % confidence, that some policy of this run exceeded epsilon "
    "0.05; "
)


def test_an_alarm_is_said_when_it_sounds_and_when_it_is_answered(
    alarmed: tuple[RunDir, list[str]],
) -> None:
    run, said = alarmed
    lines = [text.removeprefix("alarm       ") for text in said if text.startswith("alarm")]
    answers = [i for i in run.iterations() if i["reason"].startswith("alarm: ")]
    assert [i["step"] for i in answers] == [600, 1000, 1400]
    # Three accidents in three episodes are 3.7 nats, and 3.5 are needed at first.
    assert lines[0] == (
        f"episode 2: {SAME}its policy acts on until the next decision, from step 600 on, "
        "which is on going back to an earlier one"
    )
    assert lines[1] == "step 600: the pretrained policy already acts; delta is 0.025 from here on"
    assert len(lines) == 6
    for answer, line in zip(answers, lines[1::2], strict=True):
        assert answer["reason"].removeprefix("alarm: ") in line
        assert f"{answer['delta']:g}" in line


def test_where_nothing_answers_an_alarm_that_is_said_once(root: Path, pretrained: RunDir) -> None:
    _, said = alarming_run(root, pretrained, "unanswered", "safety_constraint=false")
    assert [text for text in said if text.startswith("alarm")] == [
        f"alarm       episode 2: {SAME}the run goes on as it is: its settings take no policy back"
    ]


def test_an_alarm_that_nobody_has_answered_at_the_end_is_said_again(
    root: Path, pretrained: RunDir
) -> None:
    _, said = alarming_run(root, pretrained, "late", "iteration_steps=5000")
    assert [text for text in said if text.startswith("alarm")][1:] == [
        "alarm       the run ended before a decision answered it: the last policy may exceed the "
        "limit"
    ]


def test_an_alarm_while_versions_are_tested_chooses_another_one(
    root: Path, pretrained: RunDir
) -> None:
    """The tests begin behind 600 steps, and each of their episodes has an accident."""
    options = "selection.share=0.6", "warmup_steps=100", "iteration_steps=100", "safety.epsilon=0.2"
    run, said = alarming_run(root, pretrained, "tested", *options, since=600)
    lines = [text for text in said if text.startswith(("alarm", "selected", "handed over"))]
    (alarm,) = (i for i, text in enumerate(lines) if text.startswith("alarm"))
    assert lines[alarm].endswith("the next version to be tested is another one, where there is one")
    assert lines[alarm + 1].startswith("selected    step 1,400: version ")
    before, after, last = (lines[i].partition("version ")[2][0] for i in (alarm - 1, alarm + 1, -1))
    assert before != after == last  # the alarm spoke of the one before
    assert [i["step"] for i in run.iterations()][-1] == 1400
    assert run.iterations()[-1]["rolled_back"]
