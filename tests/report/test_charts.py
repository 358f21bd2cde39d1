import dataclasses
import math
import re

import numpy as np
import pytest

from safe_offrl.errors import RunError
from safe_offrl.limits import ACCIDENT, COST
from safe_offrl.report import charts, page
from safe_offrl.report.charts import constraints, curves, outcome, style
from safe_offrl.report.charts.inline import inline_svg
from safe_offrl.report.comparison import compare
from safe_offrl.report.decisions import LoggedDecision
from safe_offrl.report.run_data import RunData, read_run
from safe_offrl.report.tables import format_table
from safe_offrl.stats.anytime import run_level_interval
from safe_offrl.stats.fixed import clopper_pearson
from safe_offrl.types import Episode


def _run(accidents, steps, returns=None, method="constrained", estimates=(), decisions=()):
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
    decisions = [*decisions] or [
        LoggedDecision(
            step, True, True, kl=0.0, delta=1.0, v_candidate=0.0, v_deployed=v, limit=0.1
        )
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
        limits={},
        confidence=0.95,
        episodes=episodes,
        constrained=True,
        decisions=decisions,
        evaluation=None,
        estimate=math.nan,
    )


def _group(runs, looks=None):
    return style.groups_of(runs, looks or style.looks_of([runs[0].method]))[0]


def test_smoothing_by_hand():
    run = _run([0, 0, 0, 0], [10, 20, 30, 40], returns=[1.0, 3.0, 5.0, 10.0])
    steps, values = curves.smoothed(run, 2, lambda e: e.episode_return)
    assert steps.tolist() == [30.0, 60.0, 100.0]
    assert values.tolist() == [2.0, 4.0, 7.5]
    steps, values = curves.smoothed(run, 50, lambda e: e.episode_return)  # fewer than a window
    assert (steps.tolist(), values.tolist()) == ([100.0], [4.75])


def _unseen(run, *indices):
    """The run, with these episodes lost: nobody knows what they brought."""
    episodes = [
        e._replace(outcome="lost", episode_return=0.0) if i in indices else e
        for i, e in enumerate(run.episodes)
    ]
    return dataclasses.replace(run, episodes=episodes)


def test_an_episode_that_was_not_seen_to_its_end_has_no_return():
    run = _unseen(_run([0, 1, 0, 1], [10, 20, 30, 40], returns=[1.0, 3.0, 5.0, 10.0]), 1)
    steps, values = curves.smoothed(run, 2, curves.known_return)
    assert steps.tolist() == [60.0, 100.0]
    assert values.tolist() == [3.0, 7.5]
    steps, values = curves.smoothed(_unseen(run, 0, 1, 2, 3), 2, curves.known_return)
    assert len(steps) == len(values) == 0


@pytest.mark.parametrize("unseen", [1, 2])
def test_a_run_without_a_known_return_is_drawn_where_it_can_be(unseen):
    """Every other chart counts it, and that of returns shows the other runs, if there are any."""
    runs = [_run([1, 1], [10, 10], returns=[2.0, 2.0]) for _ in range(2)]
    runs = [_unseen(run, 0, 1) if i < unseen else run for i, run in enumerate(runs)]
    panels = curves.curve_panels([_group(runs)])
    assert all(inline_svg(panel, "x").startswith("<svg") for panel in panels)
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    panels[0].draw(axis)
    drawn = [line.get_ydata() for line in axis.lines]
    assert all((np.asarray(y) == 2.0).all() for y in drawn)
    assert len(drawn) == (unseen < 2)


def test_an_evaluation_without_a_return_is_drawn_where_it_can_be(tmp_path, write_run):
    played = {"episodes": 300, "accidents": 300, "mean_return": None, "mean_length": 3.0}
    played |= {"return_standard_error": None, "mean_cost": 1.0, "cost_standard_error": 0.0}
    paths = [write_run(name, [0, 1], seed=0, evaluation=played) for name in ("a", "b")]
    paths.append(write_run("c", [], kind="pretrain", evaluation=played))
    comparison = compare(paths)
    assert all(row.evaluated_rate.value == 1.0 for row in comparison.rows)
    assert all(math.isnan(row.evaluated_return.value) for row in comparison.rows)
    assert [row["evaluated_return"]["value"] for row in comparison.as_dict()["runs"]] == [None] * 3
    assert "nan" not in format_table(comparison)
    charts.write_figure(comparison, tmp_path / "c.png")
    page.write_html(comparison, tmp_path / "c.html")


def test_curves_meet_over_the_common_steps_only():
    found = [
        (np.array([0.0, 10.0]), np.array([0.0, 10.0])),
        (np.array([4.0, 20.0]), np.array([2.0, 2.0])),
    ]
    steps, values = style.together(found, points=3)
    assert steps.tolist() == [4.0, 7.0, 10.0]
    assert values.tolist() == [[4.0, 7.0, 10.0], [2.0, 2.0, 2.0]]
    assert style.mean_of_curves(values).tolist() == [3.0, 4.5, 6.0]


def test_accidents_so_far_by_hand():
    """Ends at 10, 20 and at 5, 30. The second run, over at 30, keeps its count until 40."""
    runs = [_run([1, 0, 1], [10, 10, 20]), _run([0, 1], [5, 25])]
    grid, counts = curves.accidents_so_far(runs, points=5)
    assert grid.tolist() == [0.0, 10.0, 20.0, 30.0, 40.0]
    assert counts.tolist() == [[0.0, 1.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 1.0, 1.0]]


def test_pooled_rate_orders_by_the_beginning_of_an_episode():
    # Begin at 0, 0, 5, 10. The accident of the second run ends first, yet does not come first.
    runs = [_run([0, 0], [10, 10]), _run([1, 0], [5, 20])]
    steps, rate, low, high = curves.pooled_rate(runs)
    assert steps.tolist() == [10.0, 10.0, 25.0, 25.0]
    assert rate == pytest.approx([0.0, 1 / 2, 1 / 3, 1 / 4])
    bounds = run_level_interval(1, 0.95)
    assert (low[3], high[3]) == (bounds[0] / 4, 1.0)
    last = [values[-1] for values in curves.pooled_rate(runs, points=2)]
    assert last == [25.0, 1 / 4, low[3], high[3]]  # fewer points, the same numbers


def test_labels_keep_their_distance_and_their_order():
    assert curves.spread([5.0, 1.0, 1.2], 1.0) == [5.0, 1.0, 2.0]
    assert curves.spread([3.0, 3.0, 3.0], 0.5) == [3.0, 3.5, 4.0]


def _decision(step, **changes):
    good = LoggedDecision(
        step, True, True, kl=0.5, delta=1.0, v_candidate=0.05, v_deployed=0.2, limit=0.1
    )
    return good._replace(**changes)


def test_constraints_over_iterations_by_hand():
    decisions = [
        _decision(10),
        _decision(20, verdict=False),
        _decision(30, accepted=False),  # nothing moved
        _decision(40, accepted=False, rolled_back=True),
    ]
    run = _run([0], [50], decisions=decisions)
    steps, share = constraints.held(run, window=2)
    assert steps.tolist() == [10.0, 20.0, 30.0, 40.0]
    assert share.tolist() == [1.0, 0.5, 0.5, 1.0]
    assert constraints._curve(run, constraints._kl_share)[1].tolist() == [0.5, 0.5, 0.0, 0.5]
    assert constraints._curve(run, constraints._estimate_share)[1].tolist() == [2.0] * 4


def test_constraint_panels_are_those_that_were_measured():
    unmeasured = _decision(10, kl=math.nan, v_candidate=math.nan, v_deployed=math.nan)
    free = _group([_run([0], [50], decisions=[unmeasured])])
    assert constraints.constraint_panels([free]) == []
    no_estimate = _decision(10, v_candidate=math.nan, v_deployed=math.nan)
    kl_only = _group([_run([0], [50], decisions=[no_estimate])])
    assert [p.name for p in constraints.constraint_panels([kl_only])] == ["held", "kl"]
    whole = _group([_run([0], [50], decisions=[_decision(10), _decision(20, verdict=False)])])
    held, kl, limit = constraints.constraint_panels([whole])
    assert "Of all iterations: constrained 50.0%." in held.words
    assert "Largest of any run: constrained 0.5." in kl.words
    assert "Largest of any run: constrained 2." in limit.words


def test_pareto_front_by_hand():
    points = [(3.0, 5.0), (1.0, 2.0), (2.0, 1.0), (2.0, 4.0), (4.0, 5.0), (1.0, 1.0)]
    assert outcome.pareto_front(points) == [(1.0, 2.0), (2.0, 4.0), (3.0, 5.0)]


def test_the_front_is_named_in_words():
    """Good: return 2, one accident in 1000 steps. Wild: return 3, two. Bad: return 1, two."""
    runs = [
        _run([1, 0], [500, 500], returns=[2.0, 2.0], method="good"),
        _run([1, 1], [500, 500], returns=[3.0, 3.0], method="wild"),
        _run([1, 1], [500, 500], returns=[1.0, 1.0], method="bad"),
    ]
    looks = style.looks_of(["good", "wild", "bad"])
    plane, profile = outcome.outcome_panels(style.groups_of(runs, looks))
    assert "good 2 at 1, wild 3 at 2, bad 1 at 2" in plane.words
    assert plane.words.endswith("On the Pareto front: good, wild.")
    assert plane.title == "Return against accidents while learning"
    costly = [dataclasses.replace(run, constraint="cost") for run in runs]
    plane, _ = outcome.outcome_panels(style.groups_of(costly, looks))
    assert plane.title == "Return against cost while learning"
    assert profile.name == "profile"


def test_harm_by_hand(write_run):
    """Two accidents in 150 steps while learning; or 10 in 500 evaluated episodes of 40 steps."""
    learning = _run([1, 0, 1], [50, 50, 50])
    assert outcome.harm(learning, ACCIDENT) == pytest.approx(1000 * 2 / 150)
    evaluation = {"episodes": 500, "accidents": 10, "mean_return": 2.5, "mean_length": 40.0}
    evaluation |= {"mean_cost": 1.5, "cost_standard_error": 0.1}
    frozen = read_run(write_run("a", [], kind="pretrain", evaluation=evaluation))
    assert outcome.harm(frozen, ACCIDENT) == 0.5
    assert outcome.harm(frozen, COST) == 1.5
    never = read_run(write_run("b", [], kind="pretrain"))
    assert math.isnan(outcome.harm(never, ACCIDENT))


def test_a_judgement_by_hand(write_run):
    """Three and nine accidents in 300 episodes each; estimates of 2 % and 6 %."""
    runs = []
    for name, accidents, estimate in (("a", 3, 0.02), ("b", 9, 0.06)):
        values = {"episodes": 300, "accidents": accidents, "mean_return": 0.0}
        values |= {"mean_cost": float(accidents), "cost_standard_error": 0.5}
        decision = {"accepted": False, "v_previous": estimate}
        runs.append(read_run(write_run(name, [0], evaluation=values, iterations=[decision])))
    found = outcome._judgement(runs, ACCIDENT)
    assert found == pytest.approx((0.04, 0.02, *clopper_pearson(12, 600, 0.95)))
    # Costs 3 and 9: their mean has the standard error 3.
    assert outcome._judgement(runs, COST) == pytest.approx((0.04, 6.0, 0.0, 12.0))
    assert outcome._judgement(runs[:1], COST) == pytest.approx((0.02, 3.0, 2.0, 4.0))


def test_every_method_looks_different():
    looks = style.looks_of([f"m{i}" for i in range(20)])
    seen = {(look.colour, look.line) for look in looks.values()}
    assert len(seen) == 20
    assert len({look.gid for look in looks.values()}) == 20
    assert all("marker" in look.curve() for look in looks.values())  # colours alone are too few
    assert "marker" not in style.looks_of(["a", "b"])["a"].curve()


@pytest.mark.parametrize("runs", [1, 2, 3, 4])
def test_few_runs_are_drawn_and_many_have_a_band(runs):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    group = _group([_run([0], [10])] * runs)
    values = np.arange(3.0 * runs, dtype=np.float64).reshape(runs, 3)
    line = style.draw_group(axis, group, values[0], values, style.mean_of_curves)
    thin = 0 if runs == 1 or runs > 3 else runs
    assert len(axis.lines) == thin + 1
    assert len(axis.collections) == (runs > 3)
    assert line.tolist() == np.asarray(axis.lines[-1].get_ydata()).tolist()


@pytest.mark.parametrize("estimates", [[], [(50, math.nan)], [(50, 0.2), (100, math.nan)]])
def test_draws_whatever_is_there(estimates):
    runs = [
        _run([1], [30], method="rlpd (all off)"),
        _run([0] * 120, [10] * 120, estimates=estimates),
    ]
    groups = style.groups_of(runs, style.looks_of([run.method for run in runs]))
    for panel in [*curves.curve_panels(groups), *constraints.constraint_panels(groups)]:
        assert inline_svg(panel, "x").startswith("<svg")


def test_a_chart_of_a_page_takes_the_colours_of_the_page():
    (panel, *_) = curves.curve_panels([_group([_run([1], [30])])])
    text = inline_svg(panel, "x")
    assert set(re.findall(r"#[0-9a-f]{3,6}\b", text)) <= {"#808080"}  # ticks, grey on both papers
    assert {"var(--ink)", "var(--grid)", "var(--c0)"} <= set(re.findall(r"var\(--\w+\)", text))
    assert 'class="method-0"' in text
    assert all(name.startswith("x-") for name in re.findall(r' id="([^"]*)"', text))
    used = re.findall(r'(?:url\(|href=")#([^)"]*)', text)
    assert used
    assert set(used) <= set(re.findall(r' id="([^"]*)"', text))


@pytest.mark.parametrize(("name", "begin"), [("c.png", b"\x89PNG"), ("c.svg", b"<?xml")])
def test_figure_is_written(tmp_path, paired_runs, name, begin):
    comparison = compare(paired_runs(seeds=2, episodes=120))
    target = tmp_path / name
    charts.write_figure(comparison, target)
    assert target.read_bytes().startswith(begin)
    assert target.stat().st_size > 20_000


def test_names_inside_a_drawing_are_the_same_every_time(tmp_path, write_run):
    comparison = compare([write_run("a", [1, 0, 0])])
    found = []
    for name in ("a.svg", "b.svg"):
        charts.write_figure(comparison, tmp_path / name)
        text = (tmp_path / name).read_text()
        found.append(re.findall(r' id="([^"]*)"', text))
        assert "dc:date" not in text
    assert found[0] == found[1]


def test_figure_of_one_short_run(tmp_path, write_run):
    target = tmp_path / "compare.png"
    charts.write_figure(compare([write_run("a", [1, 0, 0])]), target)
    assert target.stat().st_size > 10_000


def test_each_environment_has_charts_of_its_own(write_group):
    a = write_group("x/ours", [[0, 1]])
    b = write_group("y/ours", [[1, 1]], env="HazardLine-v0")
    sections = charts.sections_of(compare([a, b]))
    found = [(s.environment, s.title) for s in sections]
    assert found == [
        ("PointHazard-v0", "While learning"),
        ("PointHazard-v0", "At the end"),
        ("HazardLine-v0", "While learning"),
        ("HazardLine-v0", "At the end"),
    ]


def test_nothing_to_draw(tmp_path, write_run):
    with pytest.raises(RunError, match="online episode"):
        charts.write_figure(compare([write_run("empty", [])]), tmp_path / "x.png")
