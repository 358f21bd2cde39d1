"""The calibration figures: the numbers of the online one by hand, and that any report is drawn."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safe_offrl.report.calibration_chart import BLOCKS, Block, online_blocks, online_png, report_png
from safe_offrl.safety.calibration import CalibrationReport
from safe_offrl.stats.fixed import clopper_pearson
from safe_offrl.stats.reliability import reliability_bins
from safe_offrl.types import Episode


def episodes(count: int, *, accidents: set[int] = frozenset(), **fields: Any) -> list[Episode]:  # type: ignore[assignment]
    """``count`` episodes of 10 steps; the k-th costs k."""
    return [
        Episode(
            index=k,
            seed=k,
            steps=10,
            total_steps=10 * (k + 1),
            episode_return=0.0,
            cost=float(k),
            accident=k in accidents,
            accident_steps=int(k in accidents),
            version=0,
            phase="online",
            shield_interventions=0,
        )
        for k in range(count)
    ]


def iteration(step: int, previous: float | None, candidate: float | None, **flags: bool) -> Any:
    line = {"accepted": False, "rolled_back": False, **flags}
    return {"step": step, "v_previous": previous, "v_candidate": candidate, **line}


# --- the online phase ---


def test_an_episode_is_held_against_the_estimate_made_before_it() -> None:
    lines = [
        iteration(100, 0.5, 0.1, accepted=True),  # episodes 10 to 34: the candidate acts
        iteration(350, 0.2, 0.9),  # refused, episodes 35 to 59: the old one stays
    ]
    one, two = online_blocks(episodes(60, accidents={3, 12, 40, 41}), lines, "accident")
    assert (one.episodes, one.first_step, one.last_step) == (25, 100, 350)
    assert one.estimate == pytest.approx(0.1)
    assert (one.realised, one.low, one.high) == (1 / 25, *clopper_pearson(1, 25))
    assert (two.episodes, two.first_step, two.last_step) == (25, 350, 600)
    assert two.estimate == pytest.approx(0.2)
    assert two.realised == 2 / 25


def test_after_a_roll_back_the_estimate_is_that_of_the_policy_it_went_back_to() -> None:
    lines = [iteration(0, 0.9, 0.3, rolled_back=True)]
    (block,) = online_blocks(episodes(25), lines, "accident")
    assert block.estimate == pytest.approx(0.3)


def test_the_blocks_share_the_episodes_evenly() -> None:
    blocks = online_blocks(episodes(1001), [iteration(0, 0.1, None)], "accident")
    assert len(blocks) == BLOCKS
    assert {b.episodes for b in blocks} <= {125, 126}
    assert sum(b.episodes for b in blocks) == 1001


def test_blocks_of_a_cost_by_hand() -> None:
    """Costs 0 to 4: mean 2, standard error sqrt(2.5 / 5)."""
    (block,) = online_blocks(episodes(5), [iteration(0, 7.0, None)], "cost")
    error = math.sqrt(0.5)
    assert block == pytest.approx(Block(0, 50, 5, 7.0, 2.0, 2 - 2 * error, 2 + 2 * error))


def test_where_nothing_was_estimated_there_is_nothing_to_hold_against() -> None:
    assert online_blocks(episodes(100), [], "accident") == ()
    unconstrained = [iteration(10 * k, None, None, accepted=True) for k in range(100)]
    assert online_blocks(episodes(100), unconstrained, "accident") == ()
    assert online_blocks(episodes(24), [iteration(0, 0.1, None)], "accident") == ()  # too few


@pytest.mark.parametrize("constraint", ["accident", "cost"])
def test_the_online_figure_is_a_picture(constraint: str) -> None:
    blocks = online_blocks(episodes(60), [iteration(0, 0.1, None)], constraint)
    assert size(online_png(blocks, constraint, 0.05)) == (990, 528)


# --- the report ---


def report(seed: int = 0, count: int = 2000, **changes: Any) -> CalibrationReport:
    """A report as a critic would get it that is right about risks between .001 and 1."""
    rng = np.random.default_rng(seed)
    risk = 10.0 ** rng.uniform(-3.0, 0.0, count)
    danger = rng.random(count) < risk
    episode = np.arange(count) // 20
    base = CalibrationReport(
        episodes=count // 20,
        accident_episodes=30,
        auroc=0.9,
        ranking=0.7,
        ranking_low=0.6,
        ranking_pairs=100,
        contrasts=tuple(np.linspace(-0.03, 0.07, 100)),
        reliability=(),
        ece=0.01,
        constraint="accident",
        limit=0.05,
        estimate=0.04,
        estimate_upper=0.05,
        estimate_plain_td=0.02,
        behaviour_accident_rate=0.2,
        behaviour_cost=0.3,
        shield_refusals=(),
        bins=reliability_bins(risk, danger.astype(float), danger.astype(float), episode),
    )
    return dataclasses.replace(base, **changes)


def size(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return image.size


EMPTY = np.zeros(3)
NAN = math.nan


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"constraint": "cost", "limit": 25.0, "estimate": 30.0, "shield_refusals": ("why",)},
        # No accident at all: no pairs, every outcome 0, which a logarithm has not.
        {
            "auroc": NAN,
            "ranking": NAN,
            "contrasts": (),
            "bins": reliability_bins(np.full(9, 0.01), np.zeros(9), np.zeros(9), np.arange(9)),
        },
        # A handful of steps of one episode: no point has an interval that says anything.
        {"bins": reliability_bins(EMPTY, EMPTY, EMPTY, np.zeros(3, dtype=int))},
    ],
    ids=["accident", "cost", "no accident", "one episode"],
)
def test_any_report_is_drawn(changes: dict[str, Any]) -> None:
    assert size(report_png(report(**changes))) == (1265, 814)


def test_the_figure_shows_the_report() -> None:
    first = report_png(report())
    assert report_png(report()) == first
    assert report_png(report(contrasts=(-0.01, 0.02))) != first
    assert report_png(report(estimate=0.09)) != first
