"""The progress line and the curves of the online phase."""

from __future__ import annotations

import contextlib
import math
import threading
import time

import pytest

from safe_offrl.limits import Limit
from safe_offrl.record import progress
from safe_offrl.record.online_curves import OnlineCurves
from safe_offrl.record.progress import Heartbeat, ProgressLine
from safe_offrl.safety.monitor import SafetyMonitor
from safe_offrl.types import Episode

LIMIT = Limit("accident", 0.1, 1.0)


def episode(index: int, *, accident: bool = False, steps: int = 100) -> Episode:
    return Episode(
        index=index,
        seed=index,
        steps=steps,
        total_steps=steps * (index + 1),
        episode_return=float(index),
        cost=float(accident),
        accident=accident,
        accident_steps=int(accident),
        version=0,
        phase="online",
        shield_interventions=0,
    )


class Counted:
    """Curves and the monitor that counts for them, as a run has both."""

    def __init__(self, limit: Limit = LIMIT) -> None:
        self.monitor = SafetyMonitor(limit)
        self.curves = OnlineCurves([self.monitor], budget=10_000)

    def add(self, episode: Episode) -> bool:
        self.monitor.update(episode.accident, episode.cost, episode.version)
        return self.curves.add_episode(episode)


def decision(*, accepted: bool) -> dict[str, object]:
    return {
        "accepted": accepted,
        "v_previous": 0.3,
        "v_candidate": 0.2,
        "kl_forward_mean": 0.01,
        "kl_reverse_mean": 0.02,
    }


def test_curves_by_hand() -> None:
    run = Counted()
    for index in range(60):
        run.add(episode(index, accident=index in (3, 50)))
    values = run.curves.values()
    assert values["safety/accidents_total"] == 2.0
    assert values["safety/accident_rate"] == pytest.approx(2 / 60)
    # SAFETY.md: with 2 accidents the sum of probabilities is below 9.14 at 95 %.
    assert values["safety/accident_rate_upper"] == pytest.approx(9.14 / 60, abs=2e-4)
    assert values["safety/accident_rate_lower"] < 2 / 60
    assert values["online/return"] == pytest.approx(sum(range(10, 60)) / 50)
    assert values["budget/spent"] == pytest.approx(0.6)


def test_only_episodes_seen_to_their_end_have_a_return() -> None:
    run = Counted()
    run.add(episode(0, accident=True)._replace(outcome="fault"))
    assert math.isnan(run.curves.values()["online/return"])
    assert run.curves.line() == "accidents 1 | rate 1.000 (<= 1.000) | return nan"
    for index in (1, 2, 3):
        outcome = "lost" if index == 2 else "complete"
        run.add(episode(index)._replace(outcome=outcome))
    assert run.curves.values()["online/return"] == 2.0  # of the returns 1 and 3


def test_the_share_of_the_guards_fallback_is_that_of_the_last_ten_episodes() -> None:
    run = Counted()
    assert run.curves.recent_guarded == 0.0
    run.add(episode(0, steps=50)._replace(guarded_steps=50))
    assert run.curves.values()["safety/guarded_share"] == 1.0
    for index in range(1, 10):
        run.add(episode(index)._replace(guarded_steps=index))
    assert run.curves.values()["safety/guarded_share"] == (50 + 45) / 950
    assert "guard in 10.0 % of the steps" in run.curves.line()
    run.add(episode(10))  # the first one is no longer among them
    assert run.curves.values()["safety/guarded_share"] == 45 / 1000
    for index in range(11, 20):
        run.add(episode(index))
    assert run.curves.values()["safety/guarded_share"] == 0.0
    assert "guard" not in run.curves.line()


def test_an_environment_that_fails_before_the_first_step_has_no_share() -> None:
    run = Counted()
    run.add(episode(0, accident=True, steps=0)._replace(outcome="fault"))
    assert run.curves.values()["safety/guarded_share"] == 0.0


def test_the_accident_rate_has_its_bounds_whatever_is_limited() -> None:
    by_cost, by_accident = Counted(Limit("cost", 0.025, 1000.0)), Counted()
    for index in range(60):
        for run in (by_cost, by_accident):
            run.add(episode(index, accident=index in (3, 50)))
    cost, accident = by_cost.curves.values(), by_accident.curves.values()
    for tag in ("accident_rate", "accident_rate_lower", "accident_rate_upper"):
        assert cost[f"safety/{tag}"] == accident[f"safety/{tag}"]
    assert cost["safety/cost_mean_lower"] <= cost["safety/cost_mean"]
    assert cost["safety/cost_mean"] < cost["safety/cost_mean_upper"]
    assert (cost["safety/cost_limit"], accident["safety/epsilon"]) == (25.0, 0.1)


def test_a_point_is_due_every_250_steps() -> None:
    run = Counted()
    due = [run.add(episode(index)) for index in range(10)]
    # Totals 100 ... 1000: a multiple of 250 is reached in 300, 500, 800 and 1000.
    assert [index for index, d in enumerate(due) if d] == [2, 4, 7, 9]


def test_the_estimate_is_that_of_the_policy_that_acts() -> None:
    curves = Counted().curves
    assert math.isnan(curves.estimate)
    curves.add_iteration(decision(accepted=True))
    assert curves.trust() == {"safety/v_accident_estimate": 0.2, "trust/accepted": 1.0}
    curves.add_iteration(decision(accepted=False))
    assert curves.trust() == {"safety/v_accident_estimate": 0.3, "trust/accepted": 0.5}
    curves.add_iteration({**decision(accepted=False), "rolled_back": True})
    assert curves.estimate == 0.2  # of the policy that an alarm put back


def test_restored_curves_go_on_the_same() -> None:
    run, monitor = Counted(), SafetyMonitor(LIMIT)
    whole, resumed = run.curves, OnlineCurves([monitor], budget=10_000)
    episodes = [episode(i, accident=i % 9 == 0) for i in range(30)]
    for e in episodes:
        run.add(e)
    whole.add_iteration(decision(accepted=True))
    monitor.load_state_dict(run.monitor.state_dict())
    resumed.restore(episodes, [decision(accepted=True)])
    assert (resumed.values(), resumed.line()) == (whole.values(), whole.line())


def test_line_is_readable() -> None:
    run = Counted()
    run.add(episode(0, accident=True))
    curves = run.curves
    assert curves.line() == "accidents 1 | rate 1.000 (<= 1.000) | return 0.00"
    curves.add_iteration(decision(accepted=True))
    assert curves.line().endswith("| KL 0.0200 | V_acc 0.200 | accepted 100 %")


def test_twenty_plain_lines_with_the_time_left() -> None:
    lines: list[str] = []
    progress = ProgressLine(10_000, say=lines.append)
    for step in range(100, 10_001, 100):
        progress.update(step, "x")
    progress.close()
    assert len(lines) == 20
    assert lines[0].startswith("500/10,000 steps | x | ETA 0:0")
    assert lines[-1] == "10,000/10,000 steps | x | ETA 0:00"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """``clock[0]`` is the time; nobody waits for it."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Heartbeat, "_beat", lambda self: None)  # the thread has a test of its own
    return now


def test_a_line_is_printed_after_fifteen_seconds_whatever_the_step(clock: list[float]) -> None:
    """Ten steps of 250,000 a second: a twentieth of the run would take 20 minutes."""
    lines: list[tuple[float, str]] = []
    with contextlib.closing(
        ProgressLine(250_000, say=lambda text: lines.append((clock[0], text)))
    ) as line:
        for step in range(1, 1001):
            clock[0] = step / 10
            line.update(step, "loss 1" if step % 500 == 0 else None)
    assert [when for when, _ in lines] == [15.0, 30.0, 45.0, 60.0, 75.0, 90.0]
    # Ten steps a second, of 250,000: some 24,985 seconds. What is shown is a second old at most.
    for when, text in lines:
        head, *middle, left = text.split(" | ")
        shown = int(head.split("/")[0])
        assert 10 * when - 10 <= shown <= 10 * when
        assert left == f"ETA {progress.clock((250_000 - shown) / 10 + 0.01)}"
        assert middle == (["loss 1"] if when >= 60.0 else [])


def test_the_remaining_time_leaves_out_what_compiled(clock: list[float]) -> None:
    """The first step takes 40 seconds, the others a tenth; as do those of the second part."""
    lines: list[str] = []
    with contextlib.closing(ProgressLine(2000, say=lines.append)) as line:
        for step in range(1, 2001):
            first = step in (1, 1001)
            clock[0] += 40.0 if first else 0.1
            if first:
                line.restart()
            line.update(step, "x" if step % 100 == 0 else None)
    left = {int(text.split("/")[0].replace(",", "")): text.split()[-1] for text in lines}
    for step in (100, 300, 900, 1100, 1900):
        minutes, seconds = left[step].split(":")
        assert 60 * int(minutes) + int(seconds) == pytest.approx((2000 - step) / 10, abs=1.0)


def test_the_remaining_time_follows_the_last_minute(clock: list[float]) -> None:
    """1,000 steps at 100 a second, then ten a second, as where learning begins online."""
    with contextlib.closing(ProgressLine(2000, say=lambda _: None)) as line:
        for step in range(1, 1801):
            clock[0] += 0.01 if step <= 1000 else 0.1
            line.update(step, "x")
        assert line._line[-4:] in ("0:19", "0:20")
        assert len(line._marks) < 100


def test_a_twentieth_of_a_long_run_is_what_the_remaining_time_follows(clock: list[float]) -> None:
    """Steps of two minutes: a minute holds none."""
    with contextlib.closing(ProgressLine(100, say=lambda _: None)) as line:
        for step in range(1, 51):
            clock[0] += 120.0
            line.update(step, "x")
        assert line._line.split()[-1] in ("99:59", "100:00")


def test_where_no_step_ends_a_line_says_that_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELL_SECONDS", 0.1)
    lines: list[str] = []
    before = threading.active_count()
    with contextlib.closing(ProgressLine(1000, say=lines.append)) as line:
        time.sleep(0.55)
        assert 2 <= len(lines) <= 5
        assert set(lines) == {"0/1,000 steps | at work, 0:00 so far"}
        line.update(7, "x")
        lines.clear()
        time.sleep(0.35)
        assert lines[-1] == "7/1,000 steps | at work, 0:00 so far"
    lines.clear()
    time.sleep(0.3)
    assert lines == []
    assert threading.active_count() == before


def test_a_heart_beats_only_into_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELL_SECONDS", 0.4)
    lines: list[str] = []
    with contextlib.closing(Heartbeat(lines.append, "still here, {}".format)) as heart:
        for k in range(8):
            heart.say(f"line {k}")
            time.sleep(0.05)
        assert lines == [f"line {k}" for k in range(8)]
        time.sleep(0.6)
        assert lines[8:] == ["still here, 0:00"] or lines[8:] == ["still here, 0:01"]


def test_a_heart_does_not_mind_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELL_SECONDS", 0.02)

    def broken(text: str) -> None:
        raise BrokenPipeError

    with contextlib.closing(Heartbeat(broken, str)):
        time.sleep(0.1)
