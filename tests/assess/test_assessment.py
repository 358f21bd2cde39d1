"""Intervals and sentences by hand; what zero accidents, a foreign policy and a choice come to."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks.assess_coverage import CASES, CONFIDENCE, LIMIT, log, policy_of, truth
from safe_offrl.assess.assessment import assess_policy, choose_policy, support
from safe_offrl.assess.estimates import Estimates, lower_limit, upper_limit
from safe_offrl.assess.fitted_evaluation import Fitted
from safe_offrl.assess.fitted_features import FittedConfig
from safe_offrl.assess.importance_sampling import Weighted
from safe_offrl.commands.assess import describe, limit_verdict, numbers
from safe_offrl.data.dataset import Dataset
from safe_offrl.envs.hazard_line import SIZE
from safe_offrl.errors import DataError
from safe_offrl.policies.networks import Actor
from safe_offrl.stats.fixed import clopper_pearson, clopper_pearson_upper

QUICK = FittedConfig(steps=300, networks=2, replicates=100)


def fitted(value: float, error: float, episodes: float = 500.0) -> Fitted:
    return Fitted(value, error, 0.0, 0.0, 0.0, episodes)


def estimates(
    risk: float = 0.02, error: float = 0.005, returns: float = 1.0, **changes: object
) -> Estimates:
    found = Estimates("accident", 1.0, 600, fitted(risk, error), fitted(returns, 0.1), 0.5)
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def without_accidents(dataset: Dataset) -> Dataset:
    return dataset.subset(np.flatnonzero(~dataset.episode_accidents))


# --- intervals ---


def test_a_limit_is_clopper_pearsons_of_as_many_episodes() -> None:
    """10 accidents in 200 episodes have the standard error sqrt(.05 * .95 / 200)."""
    error = (0.05 * 0.95 / 200) ** 0.5
    assert upper_limit(0.05, error, 0.95) == pytest.approx(clopper_pearson_upper(10, 200, 0.95))
    low, high = clopper_pearson(10, 200, 0.9)
    assert lower_limit(0.05, error, 0.95) == pytest.approx(low)
    assert upper_limit(0.05, error, 0.95) == pytest.approx(high)


def test_an_estimate_of_zero_is_no_proof_of_zero() -> None:
    """0 +- 1 %: as if 99 episodes had had none, 3 % and not 1.6 %."""
    assert upper_limit(0.0, 0.01, 0.95) == pytest.approx(clopper_pearson_upper(0, 99, 0.95))
    assert upper_limit(-0.2, 0.01, 0.95) == upper_limit(0.0, 0.01, 0.95)
    assert lower_limit(0.0, 0.01, 0.95) == 0.0
    assert upper_limit(1.0, 0.01, 0.95) == pytest.approx(1.0)


def test_limits_grow_with_error_and_confidence() -> None:
    errors = [upper_limit(0.03, e, 0.95) for e in (0.001, 0.01, 0.03, 0.1, 0.4)]
    assert errors == sorted(errors)
    assert upper_limit(0.03, 0.01, 0.99) > upper_limit(0.03, 0.01, 0.9)
    assert lower_limit(0.03, 0.01, 0.99) < lower_limit(0.03, 0.01, 0.9) < 0.03


def test_no_error_at_all_still_leaves_what_the_episodes_cannot_show() -> None:
    """300 effective episodes without an accident show 1 - .05^(1/300) = 1 % at best."""
    found = estimates(risk=0.0, error=0.0, returns=1.0)
    found = dataclasses.replace(found, risk=fitted(0.0, 0.0, 300.0))
    assert found.risk_upper(0.95) == pytest.approx(clopper_pearson_upper(0, 300, 0.95))
    low, high = found.risk_interval(0.95)
    assert low == 0.0
    assert high == pytest.approx(clopper_pearson_upper(0, 300, 0.975))


def test_a_cost_is_in_its_own_unit() -> None:
    found = dataclasses.replace(estimates(risk=0.01, error=0.001), constraint="cost", scale=1000.0)
    low, high = found.risk_interval(0.95)
    assert 7.0 < low < 10.0 < high < 13.0
    assert found.shows_below(13.0, 0.95)
    assert "the cost per episode is below 13.0" in found.sentence(13.0, 0.95)


def test_the_interval_of_the_return_is_normal() -> None:
    assert estimates(returns=1.0).return_interval(0.95) == pytest.approx((0.804, 1.196), abs=1e-3)


def test_a_return_is_one_that_the_logs_rewards_allow() -> None:
    """Of a log whose only reward, 1, comes with the end of an episode: 0 to 1."""
    dataset = log(CASES["random log, careful policy"]._replace(episodes=150), 0)
    found = assess_policy(dataset, policy_of((0.97,) * (SIZE - 2)), LIMIT, QUICK)
    low, high = found.return_interval(CONFIDENCE)
    assert found.returns.value > 1.0  # what the fit says, by chance
    assert 0.9 < low < high == found.return_value == 1.0
    assert not found.doubts
    said = describe("run", found, LIMIT.value, CONFIDENCE)
    assert said.startswith("run: return 1 [")
    assert "a return of 1.03 was fitted where the log's rewards allow 0 to 1 in an episode" in said
    assert limit_verdict(found, LIMIT.value, CONFIDENCE)["return"] == 1.0


def test_a_fit_far_outside_of_what_the_rewards_allow_is_a_doubt() -> None:
    """Else the most broken of several fits would have the highest lower bound of return."""
    for value, doubted in ((2.0, False), (2.1, False), (2.4, True), (-0.4, True), (-0.2, False)):
        found = estimates(returns=value, return_range=(0.0, 2.0))  # +- .1
        assert bool(found.doubts) == doubted, value
        assert all(0.0 <= x <= 2.0 for x in found.return_interval(0.95))
    words = "a return of 2.4 was fitted where the log's rewards allow 0 to 2 in an episode"
    broken = estimates(returns=2.4, return_range=(0.0, 2.0))
    assert words in broken.sentence(0.05, 0.95)
    assert not broken.shows_below(0.05, 0.95)
    # Without an error to speak of, a hundredth of the range is none either.
    exact = estimates(return_range=(0.0, 2.0), returns=2.0)
    exact = dataclasses.replace(exact, returns=fitted(2.01, 0.0))
    assert not exact.doubts


def test_a_risk_that_is_shown_is_a_share() -> None:
    assert numbers(estimates(risk=1.02, error=0.1), 0.05, 0.95).startswith(
        "accident probability 100.0% ["
    )


# --- what it says ---


def test_sentences() -> None:
    found = estimates(risk=0.02, error=0.005)
    upper = found.risk_upper(0.95)
    assert 0.028 < upper < 0.035
    assert found.shows_below(0.05, 0.95)
    assert found.sentence(0.05, 0.95) == (
        "The log shows that the accident probability is below 5.0%, with 95% confidence."
    )
    assert not found.shows_below(upper, 0.95)  # strictly below
    assert "cannot show" in found.sentence(0.025, 0.95)
    assert "above the limit" in found.sentence(0.005, 0.95)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"support": 0.001}, "0.1% of the logged actions"),
        ({"risk": fitted(0.001, 0.0001, 3.0)}, "worth 3.0 episodes"),
        ({"risk": fitted(float("nan"), 0.001)}, "finite"),
        ({"returns": fitted(1.0, float("inf"))}, "finite"),
    ],
)
def test_doubts_show_nothing(changes: dict[str, object], words: str) -> None:
    found = dataclasses.replace(estimates(), **changes)  # type: ignore[arg-type]
    assert not found.shows_below(0.5, 0.95)
    assert words in found.sentence(0.5, 0.95)


def test_what_a_log_cannot_show_it_says_how_many_more_episodes_would() -> None:
    """Without an accident 1 - .05^(1/n) < .05 takes n = log .05 / log .95 = 58.4 of its own."""
    found = dataclasses.replace(estimates(), risk=fitted(0.0, 0.0, 29.2), episodes=500)
    more = found.more_to_show(0.05, 0.95)
    assert more == pytest.approx(500, abs=10)  # as many again
    assert found.sentence(0.05, 0.95).endswith(
        f" fits it. About {more} more episodes like these would, if they say the same."
    )


def test_how_many_more_by_clopper_and_pearson() -> None:
    """Ten in 100 have the error .03. Four times as many have half of it: 40 in 400."""
    found = estimates(risk=0.1, error=0.03)
    limit = clopper_pearson_upper(40, 400, 0.95) + 1e-9
    assert found.more_to_show(limit, 0.95) == pytest.approx(3 * 600, abs=10)
    assert found.more_to_show(0.1, 0.95) is None  # the estimate itself is not below it
    part = Fitted(0.1, 0.03, 0.0, 0.02, 0.0, 500.0)  # what no further episode mends
    stuck = dataclasses.replace(found, risk=part)
    assert stuck.more_to_show(limit, 0.95) is None
    assert stuck.sentence(limit, 0.95).endswith("fits it.")
    part = part._replace(features=0.01)
    # (.03^2 / t + .01^2) = .015^2 at t = 7.2
    mended = dataclasses.replace(found, risk=part).more_to_show(limit, 0.95)
    assert mended == pytest.approx(6.2 * 600, abs=10)
    # A sample of the log was looked at: more of it would not be.
    assert dataclasses.replace(found, whole=False).more_to_show(limit, 0.95) is None


def test_a_log_worth_too_little_says_how_many_more_it_takes() -> None:
    found = dataclasses.replace(estimates(), risk=fitted(0.001, 0.0001, 4.0))
    # 600 episodes are worth 4: 10 take 1,500.
    assert found.sentence(0.5, 0.95) == (
        "The log says too little of this policy: the log is worth 4.0 episodes of this policy, 10 "
        "needed (log about 900 more episodes like these, or behave more like it)."
    )


def test_it_is_read_back_as_it_was_written() -> None:
    found = estimates(
        weighted_risk=Weighted(0.1, 0.2, 0.3, 0.4, 5.0), whole=False, return_range=(-1.0, 2.5)
    )
    assert Estimates.from_dict(json.loads(json.dumps(found.as_dict()))) == found


# --- choosing ---


def test_the_choice_is_constrained() -> None:
    """Highest lower bound of return of those that are shown below; not the highest return."""
    runs = {
        "rich": estimates(risk=0.2, returns=9.0),
        "sure": estimates(returns=2.0),
        "vague": estimates(returns=2.1),
        "poor": estimates(returns=1.0),
        "foreign": estimates(returns=8.0, support=0.0),
    }
    runs["vague"] = dataclasses.replace(runs["vague"], returns=fitted(2.1, 1.0))
    limits = dict.fromkeys(runs, (0.05, 0.95))
    assert choose_policy(runs, limits) == ("sure", True)


def test_without_a_candidate_the_choice_is_the_least_risk_and_says_so() -> None:
    runs = {
        "a": estimates(risk=0.3),
        "b": estimates(risk=0.2),
        "doubtful": estimates(risk=0.0, error=0.001, support=0.0),
    }
    assert choose_policy(runs, dict.fromkeys(runs, (0.05, 0.95))) == ("b", False)


# --- from logs ---


def test_a_log_without_accidents_does_not_claim_zero() -> None:
    case = CASES["careful log, careful policy"]
    dataset = without_accidents(log(case, 0))
    found = assess_policy(dataset, policy_of(case.target), LIMIT, QUICK)
    best = clopper_pearson_upper(0, dataset.episodes, CONFIDENCE)
    assert found.risk_upper(CONFIDENCE) >= best * 0.999
    assert not found.shows_below(best, CONFIDENCE)


def test_support_is_the_share_of_the_policys_own_actions() -> None:
    careful = CASES["careful log, careful policy"]
    own = support(log(careful, 0), policy_of(careful.target), 0)
    assert own == pytest.approx(0.95, abs=0.01)
    # Uniform actions: P(|atanh(u) - m| < 1.96 * .3) = (tanh(m + .588) - tanh(m - .588)) / 2.
    flat = CASES["random log, careful policy"]
    half = policy_of((0.5,) * (SIZE - 2))
    centre = np.arctanh(0.5)
    exact = (np.tanh(centre + 0.588) - np.tanh(centre - 0.588)) / 2.0
    assert support(log(flat, 0), half, 0) == pytest.approx(exact, abs=0.02)


def test_a_policy_that_the_log_knows_nothing_of_is_doubted() -> None:
    dataset = log(CASES["careful log, careful policy"], 0)
    found = assess_policy(dataset, policy_of((-0.99,) * (SIZE - 2)), LIMIT, QUICK)
    assert found.support < 0.02
    assert found.doubts
    assert not found.shows_below(0.999, CONFIDENCE)


def test_reweighing_where_the_log_has_its_probabilities() -> None:
    """From a log of uniform actions: density 1/2 on [-1, 1]."""
    case = CASES["random log, careful policy"]
    dataset = log(case, 0)
    known = dataclasses.replace(
        dataset, behaviour_log_probs=np.full(len(dataset.rows), np.log(0.5))
    )
    found = assess_policy(known, policy_of(case.target), LIMIT, QUICK)
    exact = truth(case.target)
    for part, value in zip((found.weighted_risk, found.weighted_return), exact, strict=True):
        assert part is not None
        assert 1.0 <= part.episodes < 150.0
        assert abs(part.doubly_robust - value) < 4.0 * part.doubly_robust_error + 0.02
    unknown = assess_policy(dataset, policy_of(case.target), LIMIT, QUICK)
    assert unknown.weighted_risk is None
    assert unknown.risk == found.risk  # the fit does not look at them


def test_an_accident_in_mid_episode_counts_once_when_reweighed() -> None:
    """Three steps, accidents in the last two, behaviour = policy: WIS is 1, and cost's is 2."""
    case = CASES["careful log, careful policy"]
    dataset = log(case, 0)
    actor = Actor(SIZE, 1, (), torch.Generator().manual_seed(0))
    batch = dataset.transitions
    batch.accidents[:] = 1.0
    batch.costs[:] = 1.0
    with torch.no_grad():
        own = actor.density(batch.observations).log_prob(batch.actions).numpy()
    always = dataclasses.replace(dataset, behaviour_log_probs=own)
    found = assess_policy(always, actor, LIMIT, FittedConfig(steps=20, networks=1, replicates=5))
    assert found.weighted_risk is not None
    assert found.weighted_risk.wis == pytest.approx(1.0)


def test_too_few_episodes_are_refused() -> None:
    few = log(CASES["careful log, careful policy"], 0).subset(np.arange(19))
    with pytest.raises(DataError, match=r"19 episodes, too few .* Log at least 1 more\."):
        assess_policy(few, policy_of(CASES["careful log, careful policy"].target), LIMIT, QUICK)


def test_the_exact_accident_probability_is_covered() -> None:
    """Eight small logs; the benchmark does a hundred of five kinds. At 95 % two misses are rare."""
    case = CASES["random log, careful policy"]._replace(episodes=150)
    exact = truth(case.target)[0]
    missed = above = 0
    for seed in range(8):
        found = assess_policy(log(case, seed), policy_of(case.target), LIMIT, QUICK, seed)
        low, high = found.risk_interval(CONFIDENCE)
        missed += not low <= exact <= high
        above += found.risk_upper(CONFIDENCE) < exact
        assert high < 0.5  # an interval that says something
    assert missed <= 2
    assert above <= 2
