"""Fitted evaluation: systems by hand, bootstrap weights, and dynamic programming on HazardLine."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.assess_coverage import CASES, LIMIT, log, policy_of, truth
from safe_offrl.assess import fitted_evaluation
from safe_offrl.assess.fitted_evaluation import (
    ALONE,
    Fitted,
    Moments,
    bootstrap_weights,
    evaluate_fitted,
    gather,
    logged_means,
    solve,
    whole_episodes,
)
from safe_offrl.assess.fitted_features import (
    RETURN,
    RISK,
    Features,
    FittedConfig,
    learn_features,
    take,
)
from safe_offrl.data.dataset import Dataset
from safe_offrl.limits import Limit
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import Actor
from safe_offrl.types import Batch, Layout

QUICK = FittedConfig(steps=600, networks=2, replicates=100)
TINY = 1e-9  # a ridge that is none


def two_steps() -> Dataset:
    """Three episodes of a horizon of 2, state 0 first and state 1 then; no accident terminates.

    Episode 0: rewards 1, 2; an accident in step 0 and one in step 1. Episode 1: rewards 1, 4; an
    accident in step 1. Episode 2 terminates after its first step, reward 7.
    """
    first = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])
    batch = Batch(
        observations=torch.stack([1.0 - first, first], 1),
        actions=torch.zeros(5, 1),
        rewards=torch.tensor([1.0, 2.0, 1.0, 4.0, 7.0]),
        accidents=torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0]),
        costs=torch.tensor([2.0, 1.0, 0.0, 3.0, 0.0]),
        next_observations=torch.tensor([[0.0, 1.0], [0, 0], [0, 1], [0, 0], [0, 0]]),
        terminated=torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]),
        time_to_go=torch.tensor([1.0, 0.5, 1.0, 0.5, 1.0]),
        return_to_go=torch.zeros(5),
    )
    layout = Layout(2, 1)
    starts = np.array([0, 2, 4, 5])
    return Dataset(layout.pack(batch), layout, starts, np.zeros(5, bool), 2, "two steps")


class Positions:
    """Features that are the state itself, and 1: the system is then a table."""

    def of(self, observations: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.cat([observations, observations.new_ones(len(observations), 1)], 1)

    def under_policy(self, observations: torch.Tensor, *_: object) -> torch.Tensor:
        return self.of(observations)


def moments_of(dataset: Dataset, limit: Limit) -> tuple[Moments, Moments]:
    groups = [np.array([e]) for e in range(dataset.episodes)]
    return gather(dataset, limit, groups, Positions(), torch.Generator())  # type: ignore[arg-type]


def test_accidents_are_absorbing_and_the_horizon_ends() -> None:
    """Which steps go on to a next value: risk not after an accident, neither after the last."""
    steps = take(two_steps(), LIMIT, torch.arange(5))
    assert steps.continuation(LIMIT).tolist() == [[0, 0, 1, 0, 0], [1, 0, 1, 0, 0]]
    by_cost = take(two_steps(), Limit("cost", 0.5, 6.0), torch.arange(5))
    assert by_cost.continuation(Limit("cost", 0.5, 6.0))[RISK].tolist() == [1, 0, 1, 0, 0]
    torch.testing.assert_close(by_cost.outcomes[RISK], torch.tensor([2.0, 1, 0, 3, 0]) / 6)


def test_the_system_by_hand() -> None:
    """State 1: every visit has an accident, mean reward 3. State 0, three visits:

    risk (1 + V(1) + 0) / 3 = 2/3; return (1 + 3 + 1 + 3 + 7) / 3 = 5; cost (2 + 2 + 0 + 2 + 0) / 3.
    """
    under_policy, own = moments_of(two_steps(), LIMIT)
    ones = torch.ones(1, 3, dtype=torch.float64)
    for moments, weights in ((under_policy, ones), (own, ALONE)):
        values = solve(moments, weights, TINY).values[0]
        assert values[RISK].item() == pytest.approx(2 / 3, abs=1e-5)
        assert values[RETURN].item() == pytest.approx(5.0, abs=1e-4)
    by_cost = moments_of(two_steps(), Limit("cost", 0.5, 6.0))[0]
    assert 6.0 * solve(by_cost, ones, TINY).values[0, RISK].item() == pytest.approx(2.0, abs=1e-4)


def test_weights_of_episodes_by_hand() -> None:
    """Episode 0 twice and episode 1 once: V(1) = (2 * 2 + 4) / 3, V(0) = 1 + V(1)."""
    weights = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    solution = solve(moments_of(two_steps(), LIMIT)[0], weights, TINY)
    assert solution.values[0, RETURN].item() == pytest.approx(1 + 8 / 3, abs=1e-4)
    # Risk: state 0 has an accident at once with weight 2 of 3, else later: 1.
    assert solution.values[0, RISK].item() == pytest.approx(1.0, abs=1e-5)


def test_the_logs_own_episodes_are_worth_themselves() -> None:
    """A policy that visits what the log holds: every step has the same weight for the return."""
    shares = solve(moments_of(two_steps(), LIMIT)[0], torch.ones(1, 3).double(), TINY).shares
    assert shares[RETURN].item() == pytest.approx(1.0, abs=1e-3)


def test_what_a_log_with_cut_episodes_may_have_come_to() -> None:
    """Risks 1, 1, 0 and returns 3, 5, 7; costs 3, 3, 0 of at most 6 in two steps."""
    whole, cost = two_steps(), Limit("cost", 0.5, 6.0)
    risk, returns = logged_means(whole, LIMIT)
    assert risk == pytest.approx((2 / 3, 2 / 3))
    assert returns == (5.0, 5.0)
    assert logged_means(whole, cost)[0] == pytest.approx((1 / 3, 1 / 3))
    # The third episode ends after one step of two.
    batch = whole.transitions._replace(terminated=torch.zeros(5))
    cut = replace(whole, rows=whole.layout.pack(batch))
    assert whole_episodes(cut).tolist() == [True, True, False]
    risk, returns = logged_means(cut, LIMIT)
    assert risk == pytest.approx((2 / 3, 1.0))
    assert returns == (-math.inf, math.inf)
    assert logged_means(cut, cost)[0] == pytest.approx((1 / 3, (0.5 + 0.5 + 0.5) / 3))


def test_one_cut_episode_does_not_hide_what_the_fit_gets_wrong() -> None:
    """The log's own mean risk is known to a thousandth all the same."""
    case = CASES["random log, careful policy"]
    found = log(case, 0)
    terminated = found.transitions.terminated.clone()
    terminated[found.episode_starts[1] - 1] = 0.0
    batch = found.transitions._replace(terminated=terminated)
    cut = replace(found, rows=found.layout.pack(batch))
    low, high = logged_means(cut, LIMIT)[0]
    assert high - low <= 1 / found.episodes
    both = [evaluate_fitted(d, policy_of(case.target), LIMIT, QUICK).risk for d in (found, cut)]
    assert both[0].misfit > 0.0
    assert abs(both[1].misfit - both[0].misfit) <= 1 / found.episodes + 1e-6


def test_one_group_is_the_sum_and_fewer_features_are_a_part() -> None:
    moments = moments_of(two_steps(), LIMIT)[0]
    ones = torch.ones(1, 3, dtype=torch.float64)
    whole = solve(moments.summed(), ALONE, TINY).values
    torch.testing.assert_close(whole, solve(moments, ones, TINY).values)
    # The constant alone: w (5 - continuations) = sum of outcomes; 5 w = 15 + 2 w.
    alone = solve(moments.summed().only(torch.tensor([2])), ALONE, TINY).values[0]
    assert alone[RETURN].item() == pytest.approx(5.0, abs=1e-4)


def test_bootstrap_weights_sum_to_the_groups_and_spread_like_draws() -> None:
    weights = bootstrap_weights(4000, 10, np.random.default_rng(0))
    assert weights[0].tolist() == [1.0] * 10
    torch.testing.assert_close(weights.sum(1), torch.full((4001,), 10.0, dtype=torch.float64))
    assert (weights > 0).all()
    # Dirichlet(1, ..., 1) times G: variance (G - 1) / (G + 1); of multinomial counts 1 - 1 / G.
    assert weights[1:].var().item() == pytest.approx(9 / 11, rel=0.05)


def test_error_is_made_of_its_parts() -> None:
    parts = Fitted(0.1, sampling=0.03, disagreement=0.01, features=0.04, misfit=0.12, episodes=9.0)
    assert parts.error == pytest.approx(0.13)  # 3, 4, 12
    assert parts._replace(sampling=0.0, disagreement=0.03).error == pytest.approx(0.13)


@pytest.mark.parametrize("name", ["random log, careful policy", "random log, reckless policy"])
def test_against_dynamic_programming(name: str) -> None:
    """From random behaviour, for policies of 4 and 41 % accidents."""
    case = CASES[name]
    found = evaluate_fitted(log(case, 0), policy_of(case.target), LIMIT, QUICK)
    for part, exact in zip((found.risk, found.returns), truth(case.target), strict=True):
        assert abs(part.value - exact) < 4.0 * part.error
        assert 0.005 < part.error < 0.12
        assert part.misfit < 0.05
        assert 30.0 < part.episodes <= 300.0
    assert found.q_values is None


def test_the_policy_that_logged_is_found_to_do_what_the_log_did() -> None:
    case = CASES["careful log, careful policy"]
    dataset = log(case, 0)
    found = evaluate_fitted(dataset, policy_of(case.target), LIMIT, QUICK, with_q=True)
    mean = dataset.episode_accidents.mean()
    assert found.risk.value == pytest.approx(mean, abs=0.02)
    # As good as counting the log's own episodes, within a factor.
    counting = math.sqrt(mean * (1 - mean) / dataset.episodes)
    assert 0.5 * counting < found.risk.error < 4.0 * counting
    assert found.q_values is not None
    q, v = found.q_values[:, RISK]
    starts = dataset.episode_starts[:-1]
    assert v[starts].mean().item() == pytest.approx(mean, abs=0.03)
    before_accident = dataset.column("accidents").numpy() > 0
    assert q[before_accident].mean() > q.mean() + 0.1


def test_the_same_seed_gives_the_same_numbers() -> None:
    case = CASES["random log, careful policy"]
    config = FittedConfig(steps=20, networks=1, replicates=5)
    actor, dataset = policy_of(case.target), log(case, 3)
    one, two = (evaluate_fitted(dataset, actor, LIMIT, config, seed=4) for _ in range(2))
    assert one == two
    assert one.risk.features < 1e-4  # of one network alone there is nothing to leave out


def test_a_discrete_policy_is_averaged_over_exactly() -> None:
    """Two actions, two episodes each: action 1 (taken with 3/4) has an accident, action 0 none."""
    n = 200
    taken = torch.arange(n) % 2
    zeros = torch.zeros(n)
    batch = Batch(
        observations=torch.ones(n, 1),
        actions=torch.nn.functional.one_hot(taken, 2).float(),
        rewards=1.0 - taken.float(),
        accidents=taken.float(),
        costs=taken.float(),
        next_observations=torch.ones(n, 1),
        terminated=zeros + 1.0,
        time_to_go=zeros + 1.0,
        return_to_go=zeros,
    )
    layout = Layout(1, 2)
    dataset = Dataset(
        layout.pack(batch), layout, np.arange(n + 1), np.zeros(n, bool), 5, "x", {"action_count": 2}
    )
    actor = Actor(1, 2, (), torch.Generator(), kind_for(discrete=True))
    with torch.no_grad():
        weight, bias = actor.parameters()
        weight.zero_()
        bias.copy_(torch.log(torch.tensor([0.25, 0.75])))
    config = FittedConfig(steps=100, networks=1, replicates=5, ridge=TINY)
    found = evaluate_fitted(dataset, actor, LIMIT, config)
    assert found.risk.value == pytest.approx(0.75, abs=1e-3)
    assert found.returns.value == pytest.approx(0.25, abs=1e-3)


# --- the two halves ---


def test_networks_learn_from_their_own_half_alone() -> None:
    """Other rewards in half 1 leave the networks of half 0 as they were, to the last bit."""
    case = CASES["random log, careful policy"]
    one, other = log(case, 0), log(case, 0)
    half = torch.from_numpy(np.repeat(np.arange(one.episodes) % 2, one.episode_lengths))
    # The same total spread, by which outcomes are scaled: two episodes' rewards change places.
    won = one.episode_returns > 0
    lost, gained = (
        int(np.flatnonzero((won == value) & (np.arange(one.episodes) % 2 == 1))[0])
        for value in (False, True)
    )
    last = other.episode_starts[1:] - 1
    other.transitions.rewards[[last[lost], last[gained]]] = torch.tensor([1.0, 0.0])
    config = FittedConfig(steps=30, networks=1)
    nets = [
        learn_features(
            d,
            policy_of(case.target),
            LIMIT,
            half,
            config,
            torch.Generator().manual_seed(0),
            lambda _: None,
        )
        for d in (one, other)
    ]
    # Members: risk of half 0, of half 1, return of half 0, of half 1.
    first, second = (list(net.parameters()) for net in nets)
    same = [
        all(torch.equal(a[m], b[m]) for a, b in zip(first, second, strict=True)) for m in range(4)
    ]
    assert same == [True, True, True, False]


def test_the_system_of_a_half_has_the_features_of_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[set[int], Features]] = []
    halves: list[torch.Tensor] = []

    def gathered(dataset: Dataset, limit: Limit, groups: Any, features: Features, rng: Any) -> Any:
        seen.append(({int(e) for group in groups for e in group}, features))
        return gather(dataset, limit, groups, features, rng)

    def learnt(dataset: Dataset, actor: Actor, limit: Limit, half: Any, *rest: Any) -> Any:
        halves.append(half)
        return learn_features(dataset, actor, limit, half, *rest)

    monkeypatch.setattr(fitted_evaluation, "gather", gathered)
    monkeypatch.setattr(fitted_evaluation, "learn_features", learnt)
    case = CASES["random log, careful policy"]
    dataset = log(case, 0)
    config = FittedConfig(steps=5, networks=1, replicates=2)
    evaluate_fitted(dataset, policy_of(case.target), LIMIT, config)
    half_of_episode = halves[0][torch.from_numpy(dataset.episode_starts[:-1])]
    assert len(seen) == 2
    assert not seen[0][0] & seen[1][0]
    assert len(seen[0][0] | seen[1][0]) == dataset.episodes
    for episodes, features in seen:
        own = {int(half_of_episode[e]) for e in episodes}
        # Members 0 and 2 learnt from half 0, 1 and 3 from half 1.
        assert {int(m) % 2 for m in features._members} == {1 - h for h in own}
        assert len(own) == 1
