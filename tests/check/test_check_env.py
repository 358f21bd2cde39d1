"""`check-env` on real environments with one defect each: what it says, and that it says no more."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from safe_offrl import cli
from safe_offrl.check.environment import check_environment
from safe_offrl.check.oddities import clock_in_words
from safe_offrl.errors import ConfigError
from safe_offrl.record.env_report import EnvReport
from safe_offrl.spec import SafetySpec

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _in_the_folder_of_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "path", list(sys.path))


def check(name: str, episodes: int = 5, **safety: Any) -> EnvReport:
    return check_environment(f"bad_environments:{name}-v0", SafetySpec(**safety), episodes=episodes)


def findings(report: EnvReport, status: str) -> dict[str, str]:
    return {c.name: c.text for c in report.checks if c.status == status}


def test_a_sound_environment_has_nothing_to_repair() -> None:
    report = check("Sound", episodes=20)
    assert report.usable
    assert not findings(report, "warn")
    texts = findings(report, "ok")
    assert list(texts) == [
        *("make", "observations", "actions", "horizon", "accident rule", "gymnasium"),
        *("episodes", "deterministic", "other process", "seeds", "episode ends", "accidents"),
        *("scale", "speed", "pickle"),
    ]
    assert texts["horizon"].startswith("20 steps")
    assert 0.0 < report.measured["accident_share"] < 1.0
    # One accident ends an episode and costs 1, so the two means are the same.
    assert report.measured["mean_cost"] == report.measured["accident_share"]
    assert str(report).endswith("\nusable, 0 warnings")


def test_signals_are_measured() -> None:
    signals = {"distance": "parts.distance", "wall": "wall"}
    report = check("TwoSignals", episodes=20, signals=signals)
    assert report.usable
    texts = [check.text for check in report.checks if check.name == "signals"]
    assert texts[0] == "distance is parts.distance, wall is wall"
    assert re.fullmatch(
        r"distance: [0-9.]+ an episode \([0-9.]+ to [0-9.]+\), above 0 in 100.0% of the steps",
        texts[1],
    )
    assert findings(report, "warn")["signals"].startswith("wall is 0 in every step. Is that right?")
    plain = check("TwoSignals", episodes=20)
    assert {c.name for c in plain.checks} == {c.name for c in report.checks} - {"signals"}
    assert report.measured["mean_cost_wall"] == 0.0 < report.measured["mean_cost_distance"]
    assert set(report.measured) - set(plain.measured) == {"mean_cost_wall", "mean_cost_distance"}


@pytest.mark.parametrize(
    ("name", "path", "where", "text"),
    [
        ("TwoSignals", "parts.speed", "episodes", "info['parts'] is a dict with the keys distance"),
        ("TwoSignals", "parts", "episodes", "it must be one number"),
        ("TwoSignals", "no_such_module:far", "signals", "could not be imported"),
        ("RandomSignal", "wall", "deterministic", "at step 1, the signal wall was "),
    ],
)
def test_a_signal_that_must_be_repaired_fails(name: str, path: str, where: str, text: str) -> None:
    report = check(name, signals={"wall": path})
    failed = findings(report, "FAIL")
    assert list(failed) == [where]
    assert text in failed[where]


@pytest.mark.parametrize(
    ("name", "where", "text"),
    [
        ("NoCost", "episodes", "gives no accident signal"),
        ("CostOnlyOnAccidents", "episodes", 'info has no "cost"'),
        ("NanObservation", "episodes", "NaN or infinity at step 3"),
        ("InfiniteReward", "episodes", "reward inf at step 1"),
        ("NanCost", "episodes", "cost nan at step 1"),
        ("UnboundedActions", "actions", "infinite action bounds"),
        ("Image", "observations", "image observations of shape (8, 8, 3)"),
        ("MissingKey", "episodes", 'without numbers for "gone"'),
        ("WrongSize", "episodes", "3 numbers, but its observation space has 2"),
        ("SixValues", "episodes", 'the cost in info["cost"]'),
        ("NoSeed", "episodes", "unexpected keyword argument 'seed'"),
        ("StepRaises", "episodes", "KeyError: 'motor' (bad_environments.py, line "),
        ("ConstructorRaises", "make", "no licence found"),
        ("GlobalRandomness", "deterministic", "at step 1, observation[0] was "),
        ("StateSurvivesReset", "deterministic", "at step 1, the reward was "),
        ("HashOrder", "other process", "after reset, observation[1] was "),
        ("NoLimit", "horizon", "no time limit"),
        ("PlaceholderBounds", "actions", "3.4e+38, which can only stand for"),
        ("CostVector", "episodes", 'info["cost"] is an array of shape (2,)'),
        ("OldReset", "episodes", "reset() of"),
        ("Nowhere", "make", 'no environment "bad_environments:Nowhere-v0"'),
    ],
)
def test_what_must_be_repaired_fails(name: str, where: str, text: str) -> None:
    report = check(name)
    failed = findings(report, "FAIL")
    assert list(failed) == [where]
    assert text in failed[where]
    assert not report.usable
    assert "not usable yet: 1 to repair" in str(report)


@pytest.mark.parametrize(
    ("name", "where", "text"),
    [
        ("NegativeCost", "accidents", "A cost below 0 was seen"),
        ("CloseRaises", "gymnasium", "closed already (bad_environments.py"),
        ("BothEnds", "episode ends", "both terminated and truncated"),
        ("TimeLimitTerminates", "episode ends", "Every episode terminates at step 7"),
        ("NeverAnAccident", "accidents", "0% of the random episodes have one; cost 0 per episode"),
        ("AlwaysAnAccident", "accidents", "100% of the random episodes"),
        ("LargeObservation", "scale", "observation[1] is of another size than 1, "),
        (
            "TinyObservations",
            "scale",
            "observation[0], observation[1] are of another size than 1, ",
        ),
        (
            "FarObservation",
            "scale",
            "observation[0] is so large, up to 5.4e+06, that float32 rounds",
        ),
        ("FarObservationInFloat64", "scale", "the policies that collect trains see it as it is"),
        ("ConstantObservation", "scale", "observation[1] is the same in every step"),
        ("Slow", "speed", "without the learning"),
        ("NotPicklable", "pickle", "cannot be pickled"),
        ("OutsideItsSpace", "gymnasium", "not within the observation space"),
    ],
)
def test_what_is_only_strange_warns(name: str, where: str, text: str) -> None:
    report = check(name)
    warned = findings(report, "warn")
    assert list(warned) == [where]
    assert text in warned[where]
    assert report.usable
    assert str(report).endswith("\nusable, 1 warning")


@pytest.mark.parametrize(
    ("name", "where", "text"),
    [
        ("LargeBounds", "action bounds", "Actions reach 1e+08"),
        ("EverySeedTheSame", "seeds", "Every one of 20 seeds plays the same episode"),
        ("ThreeScenarios", "seeds", "20 seeds play only 3 different episodes"),
        ("SeedsTheGlobalGenerator", "global chance", "uses or seeds a generator of the whole"),
        ("SummedCost", "summed cost", "the cost never falls"),
        ("WritesIntoItsAction", "actions given", "writes into the action"),
        ("LeavesItsSpaceLate", "observation space", "observation[0]: outside of"),
        ("ClockTerminates", "episode ends", "terminate at step 15 and none lasts longer"),
        ("FailsSometimes", "episodes", "of 20 failed"),
        ("ResetsItself", "autoreset", "The wrapper Autoreset begins the next episode"),
    ],
)
def test_what_only_many_episodes_show_warns(name: str, where: str, text: str) -> None:
    report = check(name, episodes=20)
    warned = findings(report, "warn")
    assert set(warned) - {"gymnasium"} == {where}  # whose checker dislikes some of them too
    assert text in warned[where]
    assert report.usable


def test_a_cost_that_is_reported_a_step_late() -> None:
    report = check("CostAStepLate", episodes=20)
    warned = findings(report, "warn")
    assert "reset() gives a cost of 1" in warned["late cost"]
    assert report.measured["accident_share"] == 0.0  # each was in the last step, and is not seen


def test_costs_that_are_no_sums_are_left_alone() -> None:
    for name in ("Sound", "GrowingCost", "AlwaysAnAccident"):
        assert "summed cost" not in findings(check(name, episodes=20), "warn")


def test_an_own_rule_is_enough_and_what_an_accident_costs_is_said() -> None:
    report = check("CostVector", episodes=20, accident="bad_environments:any_cost")
    assert not findings(report, "warn")
    words = 'an accident being 1, since info["cost"] is an array of shape (2,) and type float64'
    assert words in findings(report, "ok")["accidents"]
    assert report.measured["accident_share"] == report.measured["mean_cost"] > 0.0
    limited = check(
        "CostVector", accident="bad_environments:any_cost", constraint="cost", cost_limit=1.0
    )
    assert "The expected cost is limited" in findings(limited, "FAIL")["episodes"]


def test_a_clock_by_hand() -> None:
    # Ten episodes of ten steps; nobody ended before: (0 + 1) / (90 + 1) to the ninth.
    assert "Every episode terminates at step 10." in clock_in_words([10] * 10, [True] * 10)
    # Three ended before, in 24 steps, and 7 times 9 steps passed: (4 / 88)^6 is far below 1e-3.
    lengths, ended = [7, 8, 9, *[10] * 7], [True] * 10
    assert "7 episodes terminate at step 10 and none lasts longer" in clock_in_words(lengths, ended)
    # Two at step 10 may meet by chance: (4 / 43)^1.
    assert clock_in_words([7, 8, 9, 10, 10], [True] * 5) == ""
    # So may many where every third step ends an episode: (7 / 15)^3 = 0.1.
    assert clock_in_words([1, 1, 1, 1, 1, 1, 3, 3, 3, 3], [True] * 10) == ""
    # One is cut off there: it is no termination that ends them all.
    assert clock_in_words([10] * 10, [True] * 9 + [False]) == ""
    assert clock_in_words([20, *[10] * 9], [False] + [True] * 9) == ""
    assert clock_in_words([1] * 20, [True] * 20) == ""  # a bandit: one step is all there is


def test_every_refusal_is_named_at_once() -> None:
    report = check("ImageAndUnbounded", accident="bad_environments:nothing")
    assert set(findings(report, "FAIL")) == {"observations", "actions", "accident rule"}


def test_the_accident_rule_is_the_chosen_one() -> None:
    report = check("NoCost", accident="bad_environments:hits_wall")
    assert report.usable
    assert report.measured["accident_share"] > 0.0
    wrong = findings(check("Sound", accident="bad_environments:not_a_verdict"), "FAIL")
    assert "returned 'yes'" in wrong["episodes"]
    summed = check("Sound", accident="episode_cost", cost_threshold=0.5)
    assert "sums to > 0.5" in findings(summed, "ok")["accident rule"]
    assert summed.usable


def test_an_id_that_only_this_process_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    gymnasium.register("OnlyHere-v0", entry_point="bad_environments:Sound", max_episode_steps=20)
    report = check_environment("OnlyHere-v0", SafetySpec(), episodes=3)
    assert report.usable  # from Python
    assert "Every command is a process of its own" in findings(report, "warn")["other process"]


def test_the_layout_of_dict_observations_is_shown() -> None:
    report = check("Nested")
    assert report.usable
    assert [(p.name, p.start, p.stop) for p in report.layout] == [
        ("arm.angle", 0, 1),
        ("wheels", 1, 5),
    ]
    lines = [line.split() for line in str(report).splitlines()]
    assert ["[0:1]", "arm.angle", "(1,)"] in lines
    assert ["[1:5]", "wheels", "(2,", "2)"] in lines


def test_too_few_episodes_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        check("Sound", episodes=1)


# --- the command ---


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["safe-offrl", "check-env", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_exits_with_0_or_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = command(monkeypatch, capsys, "bad_environments:Nested-v0", "--episodes", "5")
    assert code == 0, out
    assert "usable, " in out
    code, out, err = command(
        monkeypatch, capsys, "bad_environments:NoCost-v0", "safety.horizon=9", "--json"
    )
    assert code == 1
    answer = json.loads(out)
    assert answer["usable"] is False
    assert {"status": "ok", "name": "horizon", "text": "9 steps, safety.horizon"} in answer[
        "checks"
    ]
    assert "FAIL  episodes" in err
    assert "Traceback" not in err


def test_the_command_refuses_what_is_no_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(monkeypatch, capsys, "PointHazard-v0", "safety.horizn=9")
    assert code == 2
    assert 'Did you mean "safety.horizon"' in err


def test_an_accident_in_every_episode_is_what_a_cost_limit_is_for() -> None:
    safety = SafetySpec(constraint="cost", cost_limit=1.0)
    report = check_environment("bad_environments:AlwaysAnAccident-v0", safety, episodes=4)
    assert "accidents" not in findings(report, "warn")
    never = check_environment("bad_environments:NeverAnAccident-v0", safety, episodes=4)
    assert "No cost was seen" in findings(never, "warn")["accidents"]


def test_of_two_limits_both_are_advised_on() -> None:
    for limits in ({"accident": 0.1, "cost": 1.0}, {"cost": 1.0, "accident": 0.1}):
        safety = SafetySpec(limits=limits)
        always = check_environment("bad_environments:AlwaysAnAccident-v0", safety, episodes=4)
        assert "log with both kinds" in findings(always, "warn")["accidents"]
        never = check_environment("bad_environments:NeverAnAccident-v0", safety, episodes=4)
        assert "log with accidents" in findings(never, "warn")["accidents"]
        assert "No cost was seen" in findings(never, "warn")["accidents"]
