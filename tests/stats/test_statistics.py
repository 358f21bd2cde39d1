import json
import math

import numpy as np
import pytest
from scipy import special

from safe_offrl.stats import anytime, fixed, resampling

RUNS, EPISODES = 4000, 400
ALPHA = 0.05
# Three standard errors of a miss rate that is exactly 5 %, over RUNS runs: 6.0 %.
ALLOWED = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)


@pytest.mark.parametrize(
    ("confidence", "errors"), [(0.5, 0.0), (0.8, 0.842), (0.9, 1.282), (0.95, 1.645), (0.99, 2.326)]
)
def test_standard_errors_of_a_one_sided_limit(confidence, errors):
    """Tables of the normal distribution have them so; the default exactly, not nearly."""
    assert fixed.standard_errors(confidence) == errors


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accidents", "bound", "tolerance"),
    [
        (0, 3.48, 0.005),
        (1, 6.80, 0.005),
        (2, 9.14, 0.006),
        (3, 11.2, 0.05),
        (5, 14.9, 0.05),
        (10, 23.0, 0.05),
        (20, 37.6, 0.05),
        (50, 76.9, 0.05),
    ],
)
def test_run_level_upper_table(accidents, bound, tolerance):
    assert anytime.run_level_upper(accidents, 0.95) == pytest.approx(bound, abs=tolerance)


@pytest.mark.parametrize(("accidents", "total"), [(0, 3.0), (3, 11.2), (50, 20.0), (900, 1000.0)])
def test_run_level_evidence_is_the_mixture(accidents, total):
    # a int theta^(a - 1) theta^N e^(P (1 - theta)) over (0, 1); theta = u^(1 / a) takes the prior
    # to the uniform distribution, and a midpoint sum does the rest, in logs because of P = 1000.
    u = (np.arange(400_000) + 0.5) / 400_000
    theta = u ** (1 / 0.3)
    quadrature = special.logsumexp(accidents * np.log(theta) + total * (1 - theta)) - math.log(
        len(u)
    )
    assert anytime.log_run_level_evidence(accidents, total) == pytest.approx(quadrature, abs=2e-4)


def test_run_level_evidence_is_continuous_where_the_formula_changes():
    at = 7.3
    below, above = (anytime.log_run_level_evidence(7, at * (1 + e)) for e in (-1e-9, 1e-9))
    assert below == pytest.approx(above, abs=1e-7)


def test_run_level_is_stable_where_hyp1f1_overflows():
    assert math.isinf(special.hyp1f1(1.0, 1000.3, 3000.0))
    # N = 10 000: about N + 2.4 sqrt(N) + a mixture's log-price, never below N + 1.64 sqrt(N).
    assert 10_164 < anytime.run_level_upper(10_000, 0.95) < 10_500


def test_run_level_lower_single_accident():
    # N = 1: a e^P P^(a-1) Gamma(1-a, P) = 20; for small P that is .3 Gamma(.7) P^-.7,
    # so P = (.3 * 1.29806 / 20)^(1/.7) = .0036.
    assert anytime.run_level_lower(1, 0.95) == pytest.approx(0.0036, abs=1e-4)
    assert anytime.run_level_lower(0, 0.95) == 0.0


def test_run_level_interval_contains_the_count_and_splits_alpha():
    for n in (1, 5, 40):
        low, high = anytime.run_level_interval(n, 0.9)
        assert low < n < high
        assert (low, high) == (anytime.run_level_lower(n, 0.95), anytime.run_level_upper(n, 0.95))


@pytest.mark.parametrize(
    ("epsilon", "expected"), [(0.10, (29, 31, 35)), (0.05, (59, 67, 70)), (0.01, (299, 409, 349))]
)
def test_accident_free_episodes_needed(epsilon, expected):
    # Run level at 1 %: 3.482 / .01 = 348.2, so 348 episodes give 1.0005 % and 349 are needed.
    needed = fixed.episodes_needed(epsilon, 0.95)
    assert needed == expected
    for n, one_fewer, tool in zip(needed, (n - 1 for n in needed), range(3), strict=True):
        assert (
            fixed.smallest_epsilon(n, 0.95)[tool]
            <= epsilon
            < fixed.smallest_epsilon(one_fewer)[tool]
        )


def test_fifty_episodes_certify_nothing_below_5_8_percent():
    assert fixed.smallest_epsilon(50, 0.95).fixed == pytest.approx(1 - 0.05 ** (1 / 50))
    assert fixed.smallest_epsilon(50, 0.95).fixed == pytest.approx(0.058, abs=5e-4)
    assert fixed.smallest_epsilon(0, 0.95) == (1.0, 1.0, 1.0)


def test_clopper_pearson():
    # k = 0: (1 - p)^10 = .025 -> p = .30850; the interval mirrors for k = n.
    assert fixed.clopper_pearson(0, 10) == pytest.approx((0.0, 0.30850), abs=1e-5)
    assert fixed.clopper_pearson(10, 10) == pytest.approx((0.69150, 1.0), abs=1e-5)
    low, high = fixed.clopper_pearson(2, 10)  # defined by its binomial tails
    assert special.bdtr(2, 10, high) == pytest.approx(0.025)
    assert special.bdtrc(1, 10, low) == pytest.approx(0.025)
    assert (
        fixed.clopper_pearson_upper(0, 59, 0.95) < 0.05 < fixed.clopper_pearson_upper(0, 58, 0.95)
    )
    assert fixed.clopper_pearson(0, 0) == (0.0, 1.0)


def test_betabinomial_sequence():
    # n = 1, k = 1: p is rejected when (.5 / 50.5) / p >= 20, that is p <= .000495.
    assert anytime.betabinomial_sequence(1, 1) == pytest.approx((0.5 / 50.5 / 20, 1.0))
    assert anytime.betabinomial_sequence(0, 0) == (0.0, 1.0)
    low, high = anytime.betabinomial_sequence(30, 100)
    assert low < 0.3 < high
    narrow = anytime.betabinomial_sequence(30, 100, 0.8)
    assert low < narrow[0] < 0.3 < narrow[1] < high


@pytest.mark.parametrize("bad", [(-1, 3), (4, 3)])
def test_impossible_counts_are_refused(bad):
    for function in (fixed.clopper_pearson, anytime.betabinomial_sequence):
        with pytest.raises(ValueError, match="0 <= k <= n"):
            function(*bad)
    with pytest.raises(ValueError, match="confidence"):
        anytime.run_level_upper(0, 1.0)


# --- coverage while looking all the time ----------------------------------------------------------


def _simulate(kind, rng):
    """Probabilities and accidents [RUNS, EPISODES] of policies that change, or not."""
    probability = np.empty((RUNS, EPISODES))
    accident = np.empty((RUNS, EPISODES), dtype=bool)
    count = np.zeros(RUNS)
    for i in range(EPISODES):
        if kind == "constant":
            p = np.full(RUNS, 0.05)
        elif kind == "drifting":  # gets better, then worse
            p = np.full(RUNS, 0.05 + 0.1 * abs(math.cos(i / 60)))
        else:  # adaptive: as reckless as the present bound allows, careful after accidents
            p = np.where(count < 0.05 * i, 0.3, 0.01)
        probability[:, i] = p
        accident[:, i] = rng.random(RUNS) < p
        count += accident[:, i]
    return probability, accident


@pytest.mark.parametrize("kind", ["constant", "drifting", "adaptive"])
def test_run_level_bounds_cover_at_all_times(kind):
    probability, accident = _simulate(kind, np.random.default_rng(1))
    truth, counts = probability.cumsum(1), accident.cumsum(1)
    upper = np.array([anytime.run_level_upper(n, 0.95) for n in range(counts.max() + 1)])
    lower = np.array([anytime.run_level_lower(n, 0.95) for n in range(counts.max() + 1)])
    missed_above = (truth > upper[counts]).any(1).mean()
    missed_below = (truth < lower[counts]).any(1).mean()
    assert 0.002 < missed_above <= ALLOWED  # the lower end: the simulation is not vacuous
    assert 0.001 < missed_below <= ALLOWED


def _ever_missed(interval, p, rng, runs=2000, episodes=300):
    """Share of runs in which the interval excluded the true p after some episode."""
    counts = (rng.random((runs, episodes)) < p).cumsum(1)
    missed = np.zeros(runs, dtype=bool)
    for n in range(1, episodes + 1):
        ks, where = np.unique(counts[:, n - 1], return_inverse=True)
        outside = np.array([not low <= p <= high for low, high in (interval(k, n) for k in ks)])
        missed |= outside[where]
    return missed.mean()


@pytest.mark.parametrize("p", [0.02, 0.1, 0.4])
def test_betabinomial_sequence_covers_at_all_times(p):
    rate = _ever_missed(
        lambda k, n: anytime.betabinomial_sequence(int(k), n), p, np.random.default_rng(2)
    )
    assert rate <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / 2000)


def test_peeking_at_clopper_pearson_fails():
    rate = _ever_missed(
        lambda k, n: fixed.clopper_pearson(int(k), n), 0.1, np.random.default_rng(3), runs=1000
    )
    assert rate > 0.15


# --- alarm ----------------------------------------------------------------------------------------


def _first_alarm(probability, epsilon, rng, runs=RUNS):
    """Episode of the first alarm of each run [runs]; len(probability) + 1 if none.

    ``probability`` [episodes], or a function of (episode, log evidence [runs]).
    """
    episodes = 1000 if callable(probability) else len(probability)
    state = anytime.AlarmState(0, np.full(runs, math.log(0.5)), np.zeros(runs), 0.0)
    first = np.full(runs, episodes + 1)
    for i in range(episodes):
        evidence = anytime.alarm_log_evidence(state)
        p = probability(i, evidence) if callable(probability) else probability[i]
        state = anytime.alarm_update(state, rng.random(runs) < p, epsilon)
        crossed = anytime.alarm_log_evidence(state) >= -math.log(ALPHA)
        first = np.where(crossed & (first > episodes), i + 1, first)
    return first


@pytest.mark.parametrize("epsilon", [0.02, 0.1])
def test_alarm_is_rarely_false_on_the_edge_of_its_null(epsilon):
    constant = np.full(1000, epsilon)
    drifting = epsilon * np.abs(np.cos(np.arange(1000) / 100))

    def adaptive(i, evidence):  # on the edge while evidence is high, safe otherwise
        return np.where((evidence > -1) | (i < 200), epsilon, epsilon / 4)

    for probability in (constant, drifting, adaptive):
        rate = (_first_alarm(probability, epsilon, np.random.default_rng(4)) <= 1000).mean()
        assert rate <= ALLOWED


def test_alarm_false_rate_is_not_vacuous():
    rate = (_first_alarm(np.full(1000, 0.1), 0.1, np.random.default_rng(5)) <= 1000).mean()
    assert rate > 0.01


def test_alarm_is_quick_also_after_a_long_safe_past():
    rng = np.random.default_rng(6)
    at_once = _first_alarm(np.full(400, 0.3), 0.1, rng, 500)
    later = _first_alarm(np.r_[np.full(400, 0.02), np.full(400, 0.3)], 0.1, rng, 500) - 400
    assert np.median(at_once) < 40
    assert np.median(later[later > 0]) < 80
    assert np.quantile(later, 0.95) < 200


def test_alarm_by_hand():
    state = anytime.alarm_start()
    assert anytime.alarm_log_evidence(state) == pytest.approx(0.0)
    # The first bet is 2 epsilon, half of the evidence rides on it: an accident gives .5 * 2 + .5.
    assert anytime.alarm_log_evidence(anytime.alarm_update(state, True, 0.1)) == pytest.approx(
        math.log(1.5)
    )
    # No accident: .5 * (1 - .2) / (1 - .1) + .5.
    state = anytime.alarm_update(state, False, 0.1)
    assert anytime.alarm_log_evidence(state) == pytest.approx(math.log(0.5 * 0.8 / 0.9 + 0.5))
    # Second bet: (0 + .5) / (1 + .5 / .2) = 1 / 7. Staked: .5 * .8 / .9 + 1/6, reserve 1/3.
    state = anytime.alarm_update(state, True, 0.1)
    staked = (0.5 * 0.8 / 0.9 + 1 / 6) * (1 / 7) / 0.1
    assert anytime.alarm_log_evidence(state) == pytest.approx(math.log(staked + 1 / 3))


@pytest.mark.parametrize("epsilon", [0.001, 0.1, 0.7])
def test_alarm_factor_is_fair_at_epsilon_and_unfavourable_below(epsilon):
    state = anytime.alarm_start()
    for accident in np.random.default_rng(0).random(200) < 1.5 * epsilon:
        good, bad = (anytime.alarm_update(state, x, epsilon) for x in (False, True))
        now, no, yes = (math.exp(anytime.alarm_log_evidence(s)) for s in (state, good, bad))
        assert (1 - epsilon) * no + epsilon * yes == pytest.approx(now)
        half = epsilon / 2
        assert (1 - half) * no + half * yes <= now * (1 + 1e-12)
        state = bad if accident else good


def test_alarm_state_is_plain_json_and_never_sinks_below_its_reserve():
    state = anytime.alarm_start()
    for _ in range(2000):
        state = anytime.alarm_update(state, False, 0.5)
    assert anytime.alarm_log_evidence(state) >= -math.log(2001)
    assert anytime.AlarmState(*json.loads(json.dumps(state))) == state


# --- underflow is minus infinity ------------------------------------------------------------------


@pytest.mark.parametrize("episodes", [3_000, 10_000, 100_000])
def test_a_30_percent_policy_is_never_certified_as_below_10_percent(episodes):
    k = round(0.3 * episodes)
    assert anytime.betabinomial_sequence(k, episodes)[0] > 0.1
    assert anytime.run_level_upper(k) / episodes > 0.3
    assert anytime.run_level_lower(k) / episodes > 0.1
    assert fixed.clopper_pearson(k, episodes)[0] > 0.1
    # "P was smaller than 10 % of the episodes" has no evidence at all, whatever underflows.
    assert anytime.log_run_level_evidence(k, 0.1 * episodes) < 0.0


def test_the_clamped_mistake_would_certify_it():
    # The same formula with gammainc floored at 1e-300: its 690 nats are overtaken by the rest.
    n = 10_000
    c, total = 0.3 + 0.3 * n, 0.1 * n
    assert special.gammainc(c, total) == 0.0  # the truth is about e^-1300
    clamped = math.log(0.3 / c) + total - c * math.log(total) + math.lgamma(c + 1)
    clamped += math.log(max(special.gammainc(c, total), 1e-300))
    assert clamped > math.log(20)
    assert anytime.log_run_level_evidence(3000, total) < 0.0


# --- comparisons ----------------------------------------------------------------------------------


def test_rate_ratio():
    # 10 against 30 at equal exposure: share 1/4 of 40, Clopper-Pearson (.1269, .4120).
    result = fixed.rate_ratio(10, 100.0, 30, 100.0)
    assert result.ratio == pytest.approx(1 / 3)
    assert (result.low, result.high) == pytest.approx((0.1269 / 0.8731, 0.4120 / 0.5880), abs=1e-3)
    # p = 2 P(Bin(40, 1/2) <= 10)
    exact = 2 * sum(math.comb(40, i) for i in range(11)) / 2**40
    assert result.p_value == pytest.approx(exact)
    assert fixed.rate_ratio(30, 100.0, 10, 100.0).ratio == pytest.approx(3.0)
    assert fixed.rate_ratio(10, 100.0, 10, 200.0).ratio == pytest.approx(2.0)
    # Unequal exposures: all 3 in the first of shares 1/4 and 3/4, p = 2 (1/4)^3.
    assert fixed.rate_ratio(3, 100.0, 0, 300.0).p_value == pytest.approx(2 / 64)


def test_rate_ratio_with_zeros():
    assert fixed.rate_ratio(0, 1.0, 0, 1.0)[1:] == (0.0, math.inf, 1.0)
    result = fixed.rate_ratio(0, 1.0, 5, 1.0)
    # share upper: (1 - s)^5 = .025 -> s = .5218; p = 2 / 32
    assert result == pytest.approx((0.0, 0.0, 0.52182 / 0.47818, 2 / 32), abs=1e-4)
    with pytest.raises(ValueError, match="positive"):
        fixed.rate_ratio(1, 0.0, 1, 1.0)


def test_mean_and_error():
    assert fixed.mean_and_error([1.0, 3.0, 5.0, 7.0]) == (4.0, math.sqrt(20.0 / 3.0 / 4.0))
    assert str(fixed.mean_and_error([2.0])) == "Mean(value=2.0, error=nan)"
    assert str(fixed.mean_and_error([])) == "Mean(value=nan, error=nan)"


def test_iqm():
    assert resampling.iqm([100.0, 1.0, 2.0, -50.0]) == 1.5
    assert resampling.iqm([1.0, 2.0, 9.0]) == 4.0  # floor(3 / 4) = 0 dropped
    assert resampling.iqm(np.arange(8.0)) == 3.5
    assert math.isnan(resampling.iqm([]))


def test_bootstrap_interval():
    rng = np.random.default_rng(0)
    values = np.random.default_rng(1).normal(10.0, 2.0, size=400)
    low, high = resampling.bootstrap_interval([values], lambda x: float(x.mean()), rng)
    half = 1.96 * values.std() / 20  # the normal theory of a mean of 400
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_bootstrap_draws_within_strata():
    strata = [np.zeros((3, 2)), np.ones((5, 2))]
    shares = []

    def statistic(rows):
        shares.append(float(rows.mean()))
        return 0.0

    resampling.bootstrap_interval(strata, statistic, np.random.default_rng(0), resamples=20)
    assert shares == [5 / 8] * 20
    with pytest.raises(ValueError, match="at least one row"):
        resampling.bootstrap_interval([[]], lambda x: 0.0, np.random.default_rng(0))
