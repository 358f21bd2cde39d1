import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from safe_offrl.data.dataset import Dataset
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import Actor
from safe_offrl.safety import calibration
from safe_offrl.safety.calibration import (
    CONTRASTS,
    NO_FALLBACK,
    CalibrationReport,
    _more_to_rank,
    auroc,
    calibrate_critic,
)
from safe_offrl.safety.critic import RiskEstimate, SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.outlook import AccidentAhead, CostAhead, Outlook, accident_within
from safe_offrl.types import Batch, Layout


def floats(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def dataset(lengths: list[int], accidents: NDArray[np.bool_], **columns: torch.Tensor) -> Dataset:
    """Episodes of these lengths with observation and action of size 1."""
    n = sum(lengths)
    zeros, column = torch.zeros(n), torch.zeros(n, 1)
    batch = Batch(
        observations=column,
        actions=column,
        rewards=zeros,
        accidents=torch.from_numpy(accidents.astype(np.float32)),
        costs=zeros,
        next_observations=column,
        terminated=zeros,
        time_to_go=zeros + 0.5,
        return_to_go=zeros,
    )._replace(**columns)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    layout = Layout(1, 1)
    return Dataset(layout.pack(batch), layout, starts, np.zeros(n, dtype=bool), 10, "test")


def flags(n: int, *where: int) -> NDArray[np.bool_]:
    result = np.zeros(n, dtype=bool)
    result[list(where)] = True
    return result


# --- the statistics by hand ---


def test_auroc_by_hand() -> None:
    positive = np.array([True, True, False, False])
    assert auroc(floats(4, 3, 2, 1), positive) == 1.0
    assert auroc(floats(1, 2, 3, 4), positive) == 0.0
    # pairs (4,2) (4,3.5) right, (3,2) right, (3,3.5) wrong
    assert auroc(floats(4, 3, 2, 3.5), positive) == 0.75
    # ties count half: (2,2) half, (2,1) right, (3,2) right, (3,1) right
    assert auroc(floats(2, 3, 2, 1), positive) == 0.875
    assert auroc(floats(1, 1, 1, 1), positive) == 0.5
    assert math.isnan(auroc(floats(1, 2), np.array([True, True])))
    assert math.isnan(auroc(floats(1, 2), np.array([False, False])))


def test_accident_within_looks_ahead_and_stays_in_the_episode() -> None:
    # Episodes 0-4 and 5-7; accidents at 3 and 5.
    data = dataset([5, 3], flags(8, 3, 5))
    assert accident_within(data, 1).tolist() == flags(8, 3, 5).tolist()
    assert accident_within(data, 2).tolist() == flags(8, 2, 3, 5).tolist()
    assert accident_within(data, 10).tolist() == flags(8, 0, 1, 2, 3, 5).tolist()


def test_window_outcomes_continue_with_the_critic() -> None:
    values = floats(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    outcomes, _ = AccidentAhead(10).within(dataset([5, 3], flags(8, 3, 5)), values, 2)
    # 0, 1: V two steps on (an accident at 3 is not within two steps of 1 but of 2); 4: the end
    assert outcomes.tolist() == pytest.approx([0.3, 0.4, 1, 1, 0, 1, 0, 0])


# --- the report: an accident follows exactly where the action is above .5 ---


OUTLOOK = AccidentAhead(10)


def critic_of(
    *, observation: float, action: float, base: float, outlook: Outlook = OUTLOOK
) -> SafetyCritic:
    """Q_C = sigmoid(observation * o + action * a + base)."""
    generator = torch.Generator().manual_seed(0)
    critic = SafetyCritic(1, 1, outlook, SafetyCriticConfig(hidden=()), generator)
    with torch.no_grad():
        critic.net.output.weight.copy_(torch.tensor([observation, 0.0, action])[None, :, None])
        critic.net.output.bias.fill_(base)
    return critic


PERFECT = critic_of(observation=0.0, action=40.0, base=-20.0)
RANDOM = critic_of(observation=1.0, action=0.0, base=-1.0)
BACKWARDS = critic_of(observation=0.0, action=-40.0, base=20.0)


def one_step_episodes(n: int = 600) -> Dataset:
    g = torch.Generator().manual_seed(1)
    actions = 2.0 * torch.rand(n, 1, generator=g) - 1.0
    observations = torch.randn(n, 1, generator=g)
    accidents = (actions[:, 0] > 0.5).numpy()
    return dataset([1] * n, accidents, actions=actions, observations=observations)


LIMIT = Limit("accident", 0.1, 1.0)


def report_of(
    critic: SafetyCritic, data: Dataset, limit: Limit = LIMIT, share: float = 1.0
) -> CalibrationReport:
    """Of a log of which ``data`` is this share, held out."""
    actor = Actor(1, 1, (4,), torch.Generator().manual_seed(0))
    estimate, logged = RiskEstimate(0.12, 0.15, 0.1), round(data.episodes / share)
    return calibrate_critic(critic, actor, data, estimate, limit, logged)


def test_by_itself_a_report_knows_of_no_guard() -> None:
    """So say those of earlier versions."""
    report = report_of(PERFECT, one_step_episodes())
    assert report.guard_refusals == (NO_FALLBACK,)
    assert str(report).endswith(f"\nguard       abstains: {NO_FALLBACK}")
    watched = dataclasses.replace(report, guard_refusals=())
    assert str(watched).endswith("\nguard       allowed")
    assert watched.as_dict()["guard_refusals"] == ()


def test_a_perfect_critic_may_shield() -> None:
    report = report_of(PERFECT, one_step_episodes())
    assert report.shield_refusals == ()
    assert report.shield_acts
    assert report.auroc == 1.0
    assert report.ranking == 1.0
    assert report.ranking_low > 0.9
    assert report.ece < 0.05
    assert report.behaviour_accident_rate == pytest.approx(0.25, abs=0.05)
    assert (report.estimate, report.estimate_upper, report.estimate_plain_td) == (0.12, 0.15, 0.1)
    assert "allowed" in str(report)


def test_a_long_log_is_judged_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values that continue what followed a step are those of its own state."""
    steps = one_step_episodes()
    t = steps.transitions
    data = dataset(
        [20] * 30, t.accidents.numpy() > 0.0, actions=t.actions, observations=t.observations
    )
    whole = report_of(RANDOM, data)
    monkeypatch.setattr(calibration, "STEPS_AT_ONCE", 7)
    assert report_of(RANDOM, data).ece == pytest.approx(whole.ece, rel=1e-5)
    assert whole.ece > 0.05


@pytest.mark.parametrize("critic", [RANDOM, BACKWARDS])
def test_a_useless_critic_must_abstain_and_is_told_why(critic: SafetyCritic) -> None:
    report = report_of(critic, one_step_episodes())
    assert not report.shield_acts
    reasons = " ".join(report.shield_refusals)
    assert "AUROC" in reasons
    assert "ranking" in reasons
    assert "abstains" in str(report)


def test_a_state_critic_that_cannot_compare_actions_is_refused() -> None:
    """AUROC alone is no licence: here danger is the state's, and the critic knows just that."""
    g = torch.Generator().manual_seed(1)
    observations = torch.randn(600, 1, generator=g)
    actions = 2.0 * torch.rand(600, 1, generator=g) - 1.0
    accidents = (observations[:, 0] > 0.6).numpy()
    data = dataset([1] * 600, accidents, actions=actions, observations=observations)
    report = report_of(critic_of(observation=40.0, action=0.0, base=-24.0), data)
    assert report.auroc == 1.0
    assert not report.shield_acts
    assert any("ranking" in reason for reason in report.shield_refusals)


def test_contrasts_by_hand() -> None:
    """Dangerous .9 beside safe .1 at one state, and .8 beside .3 at another: sigmoid(a) apart."""
    states = torch.tensor([[0.0], [0.0], [5.0], [5.0]])
    actions = torch.tensor([[0.9], [0.1], [0.8], [0.3]])
    data = dataset([1] * 4, flags(4, 0, 2), observations=states, actions=actions)
    critic = critic_of(observation=0.0, action=1.0, base=0.0)

    def risk(action: float) -> float:
        return 1.0 / (1.0 + math.exp(-action))

    expected = [risk(0.8) - risk(0.3), risk(0.9) - risk(0.1)]
    report = report_of(critic, data)
    assert report.contrasts == pytest.approx(expected)
    backwards = report_of(critic_of(observation=0.0, action=-1.0, base=0.0), data)
    assert backwards.contrasts == pytest.approx([-x for x in reversed(expected)])
    assert (report.ranking, backwards.ranking) == (1.0, 0.0)


def test_a_ranking_no_better_than_chance_is_refused_and_one_just_better_is_not() -> None:
    """Pairs at one state each; the critic, which likes small actions, is right in a share."""

    def refusals(right: int, pairs: int = 200) -> str:
        states = torch.arange(pairs).repeat_interleave(2)[:, None] * 10.0
        small = torch.tensor([[0.2], [0.8]]).repeat(pairs, 1)
        first = torch.arange(2 * pairs) // 2 >= right  # then the small action is the dangerous one
        dangerous = (small[:, 0] > 0.5) ^ first
        data = dataset([1] * 2 * pairs, dangerous.numpy(), observations=states, actions=small)
        return " ".join(
            report_of(critic_of(observation=0.0, action=1.0, base=0.0), data).shield_refusals
        )

    # Clopper and Pearson: the lower 95 % limit of 112 in 200 is .4994, of 113 it is .5045.
    assert "ranking" in refusals(112)
    assert "ranking" not in refusals(113)


@pytest.mark.parametrize(
    ("accidents", "share", "more"),
    [
        (0, 0.1, 100),  # ten are missing, and one in ten is held out
        (8, 1.0, 2),
        (9, 0.1, 10),
        (9, 0.15, 7),  # 1 / .15 = 6.7
        (3, 0.3, 24),  # 7 / .3 = 23.3
    ],
)
def test_too_few_accidents_refuse_whatever_the_critic_and_say_how_many_more(
    accidents: int, share: float, more: int
) -> None:
    data = one_step_episodes()
    bad = np.flatnonzero(data.episode_accidents)[:accidents]
    good = np.flatnonzero(~data.episode_accidents)[: 450 - accidents]  # 450 / share is whole
    held_out = data.subset(np.sort(np.concatenate([bad, good])))
    report = report_of(PERFECT, held_out, share=share)
    assert report.accident_episodes == accidents
    assert not report.shield_acts
    assert report.shield_refusals[0] == (
        f"{accidents} held-out accident episodes, 10 needed (log about {more} more episodes with "
        "an accident)"
    )


def test_nothing_but_accidents_is_refused() -> None:
    data = one_step_episodes()
    report = report_of(PERFECT, data.subset(np.flatnonzero(data.episode_accidents)))
    assert not report.shield_acts


def test_a_ranking_that_too_few_pairs_show_says_how_many_more_would() -> None:
    """By the binomial law: P(at least so many of n right by chance) must come below 5 %."""

    def shown(n: int, right: int, pairs: int) -> bool:
        return bool(stats.binom.sf(right * n // pairs - 1, n, 0.5) < 0.05)

    for right, pairs in ((112, 200), (6, 8), (1001, 2000)):
        text = _more_to_rank(right, pairs, accident_episodes=1000.0)
        more = int(text.split(" more ")[0].split("about ")[1].replace(",", ""))
        assert text.endswith(f" more episodes with an accident, if {right / pairs:.2f} holds)")
        n = round(pairs * (1.0 + more / 1000.0))
        assert shown(n, right, pairs)
        assert not shown(n - 2 - n // 500, right, pairs)
    for useless in (0, 50, 100):
        assert _more_to_rank(useless, 200, 1000.0) == ""


def test_the_report_says_whose_the_estimate_is_and_where_to_look() -> None:
    lines = str(report_of(PERFECT, one_step_episodes())).splitlines()
    (index,) = [k for k, line in enumerate(lines) if line.startswith("V_accident")]
    assert lines[index + 1].strip().startswith("the safety critic's own view")
    assert "`safe-offrl assess`" in lines[index + 1]


def test_reliability_by_hand() -> None:
    """A critic that says .25 everywhere, right in 3 of 12: one bin, no error; .35 is .1 off."""
    data = dataset([1] * 12, flags(12, 0, 4, 8))
    quarter = math.log(0.25 / 0.75)
    report = report_of(critic_of(observation=0.0, action=0.0, base=quarter), data)
    assert len(report.reliability) == 1
    assert report.reliability[0] == pytest.approx((0.25, 0.25, 12))
    assert report.ece == pytest.approx(0.0, abs=1e-6)
    report = report_of(critic_of(observation=0.0, action=0.0, base=math.log(0.35 / 0.65)), data)
    assert report.ece == pytest.approx(0.1, abs=1e-6)


# --- the curves of the figure ---


def test_the_curves_are_those_of_the_reports_own_numbers() -> None:
    data = one_step_episodes()
    report = report_of(PERFECT, data)
    assert sum(b.transitions for b in report.bins) == len(data.rows)
    assert report.limit == 0.1
    assert len(report.contrasts) == report.ranking_pairs
    assert np.mean(np.array(report.contrasts) > 0.0) == report.ranking == 1.0
    assert list(report.contrasts) == sorted(report.contrasts)
    # One step an episode: everything that follows is in the log, nothing is the critic's word.
    assert all(b.outcome == b.seen for b in report.bins)


def test_of_a_long_log_the_report_keeps_quantiles_of_the_contrasts() -> None:
    data = one_step_episodes(6000)
    report = report_of(critic_of(observation=0.0, action=1.0, base=0.0), data)
    assert report.ranking_pairs > CONTRASTS == len(report.contrasts)
    few = report_of(critic_of(observation=0.0, action=1.0, base=0.0), one_step_episodes(600))
    assert report.contrasts[100] == pytest.approx(np.median(few.contrasts), abs=0.02)
    assert list(report.contrasts) == sorted(report.contrasts)


def test_what_lies_beyond_the_window_is_not_seen() -> None:
    """A critic that says .5 everywhere; ten safe steps, of which the window covers one."""
    half = critic_of(observation=0.0, action=0.0, base=0.0)
    (only,) = report_of(half, dataset([10] * 12, flags(120))).bins
    # The last step of an episode has nothing after it, the nine before it the critic's own .5.
    assert only.outcome == pytest.approx(0.45)
    assert only.seen == 0.0
    assert (only.transitions, only.episodes) == (120, 12)


def test_of_a_cost_only_the_window_is_seen() -> None:
    """As above with costs: one step of 1 in 12 episodes of ten steps, the rest the critic's .5."""
    half = critic_of(observation=0.0, action=0.0, base=0.0, outlook=CostAhead(10, 1.0, 0.99, 20))
    g = half.config.cost_discount
    costs = torch.zeros(120)
    costs[55] = 1.0
    data = dataset([10] * 12, flags(120, 55), costs=costs)
    (only,) = report_of(half, data, Limit("cost", 0.1, 10.0)).bins
    assert only.seen == pytest.approx((1.0 - g) / 120)
    assert only.outcome == pytest.approx((1.0 - g) / 120 + 0.9 * g * 0.5)


def test_the_page_on_the_method_names_what_the_report_holds() -> None:
    page = Path(__file__).parents[2] / "docs" / "method.md"
    sentence = page.read_text().partition("judges the safety critic on held-out episodes: ")[2]
    named = re.split(r",(?: and)? ", " ".join(sentence.partition(".\n")[0].split()))
    fields = {
        "reliability": "reliability",
        "AUROC": "auroc",
        "ranking among candidate actions": "ranking",
        "`V_accident(s0)` with its upper estimate": "estimate_upper",
    }
    assert named == list(fields)
    assert set(fields.values()) <= {f.name for f in dataclasses.fields(CalibrationReport)}
