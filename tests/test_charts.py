import math

import numpy as np
import pytest

from safe_offrl import charts
from safe_offrl.errors import RunError
from safe_offrl.report import compare
from safe_offrl.run_data import Decision, RunData
from safe_offrl.statistics import run_level_interval
from safe_offrl.types import Episode


def _run(accidents, steps, returns=None, method="constrained", estimates=()):
    ends = np.cumsum(steps)
    returns = np.zeros(len(accidents)) if returns is None else returns
    episodes = [
        Episode(
            index=i,
            seed=i,
            steps=int(steps[i]),
            total_steps=int(ends[i]),
            episode_return=float(returns[i]),
            cost=0.0,
            accident=bool(accidents[i]),
            accident_steps=0,
            version=0,
            phase="online",
            shield_interventions=0,
        )
        for i in range(len(accidents))
    ]
    decisions = [
        Decision(step, True, True, kl=0.0, delta=1.0, v_candidate=0.0, v_deployed=v, limit=0.1)
        for step, v in estimates
    ]
    return RunData(
        name="a",
        kind="finetune",
        status="finished",
        method=method,
        seed=0,
        pretrained="",
        env_id="PointHazard-v0",
        budget=None,
        constraint="accident",
        limit=0.1,
        confidence=0.95,
        episodes=episodes,
        constrained=True,
        decisions=decisions,
        evaluation=None,
        estimate=math.nan,
    )


def test_smoothing_by_hand():
    run = _run([0, 0, 0, 0], [10, 20, 30, 40], returns=[1.0, 3.0, 5.0, 10.0])
    steps, values = charts._smoothed(run, 2, lambda e: e.episode_return)
    assert steps.tolist() == [30.0, 60.0, 100.0]
    assert values.tolist() == [2.0, 4.0, 7.5]
    steps, values = charts._smoothed(run, 50, lambda e: e.episode_return)  # fewer than a window
    assert (steps.tolist(), values.tolist()) == ([100.0], [4.75])


def test_average_covers_the_common_steps_only():
    curves = [
        (np.array([0.0, 10.0]), np.array([0.0, 10.0])),
        (np.array([4.0, 20.0]), np.array([2.0, 2.0])),
    ]
    steps, values = charts._average(curves, points=3)
    assert steps.tolist() == [4.0, 7.0, 10.0]
    assert values.tolist() == [3.0, 4.5, 6.0]


def test_pooled_rate_orders_by_the_beginning_of_an_episode():
    # Begin at 0, 0, 5, 10. The accident of the second run ends first, yet does not come first.
    runs = [_run([0, 0], [10, 10]), _run([1, 0], [5, 20])]
    steps, rate, low, high = charts._pooled_rate(runs)
    assert steps.tolist() == [10.0, 10.0, 25.0, 25.0]
    assert rate == pytest.approx([0.0, 1 / 2, 1 / 3, 1 / 4])
    bounds = run_level_interval(1, 0.95)
    assert (low[3], high[3]) == (bounds[0] / 4, 1.0)


@pytest.mark.parametrize("estimates", [[], [(50, math.nan)], [(50, 0.2), (100, math.nan)]])
def test_draws_whatever_is_there(tmp_path, estimates):
    runs = [
        _run([1], [30], method="rlpd (all off)"),
        _run([0] * 120, [10] * 120, estimates=estimates),
    ]
    charts.draw(runs, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_png_is_written(tmp_path, paired_runs):
    target = tmp_path / "compare.png"
    charts.write_png(compare(paired_runs(seeds=2, episodes=120)), target)
    assert target.read_bytes().startswith(b"\x89PNG")
    assert target.stat().st_size > 20_000


def test_png_of_one_short_run(tmp_path, write_run):
    target = tmp_path / "compare.png"
    charts.write_png(compare([write_run("a", [1, 0, 0])]), target)
    assert target.stat().st_size > 10_000


def test_nothing_to_draw(tmp_path, write_run):
    with pytest.raises(RunError, match="online episode"):
        charts.write_png(compare([write_run("empty", [])]), tmp_path / "x.png")
