"""SPIBB and Soft-SPIBB: counts, plans and transfers by hand, and what they promise, exactly."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from safe_offrl.agents import AGENTS, tabular
from safe_offrl.agents.spibb import (
    SPIBB,
    SoftSPIBB,
    SoftSPIBBConfig,
    SPIBBConfig,
    bootstrapped,
    errors,
    transferred,
)
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.agents.tabular import Counts, Improve, iterate, values_of
from safe_offrl.data.dataset import Dataset
from safe_offrl.envs import hazard_grid as grid
from safe_offrl.errors import DataError
from safe_offrl.policies.categorical import CATEGORICAL
from safe_offrl.policies.networks import NetworkConfig, Networks
from safe_offrl.types import Batch, Layout
from tests.agents.setups import setup_of
from tests.agents.test_agents import one_hot, seeded, transitions
from tests.agents.test_discrete_agents import probabilities_of

NOTHING_ELSE = Steering()
EVERY_LOG = 100

Floats = NDArray[np.float64]


def log_of(batch: Batch) -> Dataset:
    """Every transition an episode of its own."""
    n = len(batch.rewards)
    layout = Layout(batch.observations.shape[1], batch.actions.shape[1])
    rows = layout.pack(batch)
    return Dataset(rows, layout, np.arange(n + 1), np.zeros(n, bool), 40, "")


def steps_of(
    rows: list[tuple[int, int, int, float, bool]], states: int = 3, actions: int = 2
) -> Batch:
    """(state, action, next state, reward, whether it terminated) of each step."""
    state, action, following, reward, terminated = zip(*rows, strict=True)
    names = torch.eye(states)
    return transitions(
        names[list(state)],
        one_hot(torch.tensor(action), actions),
        torch.tensor(reward),
        names[list(following)],
        torch.tensor(terminated).float(),
    )


def counts_of(rows: list[tuple[int, int, int, float, bool]], **sizes: int) -> Counts:
    return Counts.of(log_of(steps_of(rows, **sizes)), "spibb")


# --- counts and the model ---

# State 0 by action 0 twice to 1 and once to the end, by action 1 once to 0; state 1 by action 1 to
# state 2, where the log is cut.
STEPS = [
    (0, 0, 1, 1.0, False),
    (0, 0, 1, 2.0, False),
    (0, 0, 1, 6.0, True),
    (0, 1, 0, -1.0, False),
    (1, 1, 2, 4.0, False),
]
# np.unique puts (0, 0, 1) first, (1, 0, 0) last.
OF = [2, 1, 0]


def test_counts_and_model_by_hand() -> None:
    counts = counts_of(STEPS)
    assert torch.equal(counts.observations[OF], torch.eye(3))
    assert counts.pairs[OF].tolist() == [[3.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
    assert counts.rewards[OF].tolist() == [[3.0, -1.0], [0.0, 4.0], [0.0, 0.0]]
    # What terminates goes nowhere; what is cut does not terminate.
    expected = torch.zeros(3, 2, 3, dtype=torch.float64)
    expected[0, 0, 1], expected[0, 1, 0], expected[1, 1, 2] = 2.0 / 3.0, 1.0, 1.0
    torch.testing.assert_close(counts.transitions[OF][:, :, OF], expected)
    torch.testing.assert_close(
        counts.behaviour[OF],
        torch.tensor([[0.75, 0.25], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64),
    )
    assert [OF.index(s) for s in counts.states.tolist()] == [0, 0, 0, 0, 1]


def test_the_least_difference_of_observations_makes_another_state() -> None:
    batch = steps_of(STEPS)
    nudged = torch.nextafter(batch.observations[0], torch.full((3,), 2.0))
    observations = torch.cat([nudged[None], batch.observations[1:]])
    counts = Counts.of(log_of(batch._replace(observations=observations)), "spibb")
    assert sorted(counts.pairs.sum(1).tolist()) == [0.0, 1.0, 1.0, 3.0]


def test_a_policy_is_evaluated_by_hand() -> None:
    """V(1) = 4, Q(0, 0) = 3 + .5 (2/3) 4, Q(0, 1) = -1 + .5 V(0), V(0) = .5 of each."""
    counts = counts_of(STEPS)
    policy = torch.zeros(3, 2, dtype=torch.float64)
    policy[OF] = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    value, q = values_of(counts, policy, 0.5)
    left = 3.0 + 4.0 / 3.0
    v0 = 0.5 * (left - 1.0) / (1.0 - 0.25)
    assert value[OF].tolist() == pytest.approx([v0, 4.0, 0.0])
    assert q[OF][0].tolist() == pytest.approx([left, -1.0 + 0.5 * v0])


def test_the_model_discounts_once_bootstraps_at_a_cut_and_not_at_an_end() -> None:
    """0 -> 1 -> end with reward 1: .7 and 1; state 2 pays 1 for ever, cut after every step: 3.3."""
    rows = [(0, 0, 1, 0.0, False), (1, 0, 1, 1.0, True), (2, 0, 2, 1.0, False)]
    counts = counts_of(rows, actions=1)
    value, _ = values_of(counts, counts.behaviour, 0.7)
    assert value[OF].tolist() == pytest.approx([0.7, 1.0, 1.0 / 0.3])


def test_a_state_keeps_its_policy_where_a_step_would_make_it_worse() -> None:
    """The step takes action 1 everywhere: better in state 1, worse in state 0."""
    rows = [(s, a, 2, float(a == s), True) for s in (0, 1) for a in (0, 1)]
    counts = counts_of(rows)
    policy, _ = iterate(counts, 0.9, lambda q, _: torch.eye(2).double()[torch.ones(3).long()])
    assert policy[OF][:2].tolist() == [[0.5, 0.5], [0.0, 1.0]]


@pytest.mark.parametrize("name", ["spibb", "soft_spibb"])
def test_too_many_observations_are_refused_in_one_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tabular, "MOST_STATES", 2)
    setup = setup_of(Networks(3, 2, NetworkConfig((), (), 2), seeded(), CATEGORICAL), seeded())
    setup = setup._replace(dataset=log_of(steps_of(STEPS)))
    words = rf"^The log has 3 different observations, but {name} keeps .* of 2 at most: .* Take"
    with pytest.raises(DataError, match=words):
        AGENTS[name](setup, AGENTS[name].Config())
    monkeypatch.setattr(tabular, "MOST_STATES", 3)
    AGENTS[name](setup, AGENTS[name].Config())


# --- how a policy may differ from the behaviour ---


def one_state(counts: list[float]) -> Counts:
    """Of one state, each action logged so often."""
    pairs = torch.tensor([counts], dtype=torch.float64)
    zeros = torch.zeros_like(pairs)
    behaviour = pairs / pairs.sum()
    nowhere = zeros.unsqueeze(-1)
    return Counts(torch.zeros(1, 1), pairs, nowhere, zeros, behaviour, torch.zeros(1).long())


HERE = torch.zeros(1, dtype=torch.long)


def improved(improve: Improve, values: list[float]) -> list[float]:
    (found,) = improve(torch.tensor([values], dtype=torch.float64), HERE).tolist()
    return list(found)


def test_spibb_leaves_what_was_seen_n_wedge_times_to_the_behaviour() -> None:
    """Of 100 steps 10, 11, 60, 19: the first keeps .1 at n_wedge 10, though it is the best."""
    counts = one_state([10.0, 11.0, 60.0, 19.0])
    values = [9.0, 3.0, 2.0, 1.0]
    assert improved(bootstrapped(counts, 10), values) == pytest.approx([0.1, 0.9, 0.0, 0.0])
    assert improved(bootstrapped(counts, 9), values) == pytest.approx([1.0, 0.0, 0.0, 0.0])
    assert improved(bootstrapped(counts, 11), values) == pytest.approx([0.1, 0.11, 0.79, 0.0])
    kept = [0.1, 0.11, 0.6, 0.19]
    assert improved(bootstrapped(counts, 60), values) == pytest.approx(kept)


def test_errors_by_hand() -> None:
    """2 S A / delta = 2 x 3 / .5 = 12."""
    found = errors(one_state([2.0, 8.0, 0.0]), 0.5)[0].tolist()
    once = math.sqrt(math.log(12.0))
    assert found == pytest.approx([once, once / 2.0, math.inf])


def soft(
    values: list[float], behaviour: list[float], e: list[float], epsilon: float
) -> list[float]:
    rows = [torch.tensor([x], dtype=torch.float64) for x in (values, behaviour, e)]
    (found,) = transferred(rows[0], rows[1], rows[2], epsilon).tolist()
    return list(found)


def test_transfers_by_hand() -> None:
    """Action 0, the worst, gains 4 / 2 a unit by action 2 and 1 / .25 by action 1, so to that.

    .3 / (2 x .5) = .3 may leave it, .3 / (2 x .25) = .6 arrive: .3 goes, at .3 x .75 = .225. Of
    .075 action 2 may take .075 / (2 x 2) = .01875, at .01875 x 2.5 = .046875. Of .028125 it may
    take .028125 / 4 = .00703125 from action 1.
    """
    found = soft([0.0, 1.0, 4.0], [0.5, 0.4, 0.1], [0.5, 0.25, 2.0], 0.3)
    last = 0.00703125
    assert found == pytest.approx([0.5 - 0.3 - 0.01875, 0.7 - last, 0.1 + 0.01875 + last])


def test_what_was_never_logged_gets_nothing() -> None:
    assert soft([0.0, 1.0, 9.0], [0.5, 0.5, 0.0], [0.1, 0.1, math.inf], 9.0) == [0.0, 1.0, 0.0]
    assert soft([0.0, 9.0], [0.5, 0.5], [math.inf, math.inf], 9.0) == [0.5, 0.5]


def test_transfers_stay_within_epsilon_and_gain() -> None:
    g = seeded(1)
    values, e = torch.rand(500, 5, generator=g).double(), torch.rand(500, 5, generator=g).double()
    behaviour = torch.softmax(torch.randn(500, 5, generator=g).double(), 1)
    policy = behaviour
    for epsilon in (0.0, 0.05, 0.3, 9.0):
        policy = transferred(values, behaviour, e, epsilon)
        assert bool((policy >= 0.0).all())
        torch.testing.assert_close(policy.sum(1), torch.ones(500).double())
        spent = (e * (policy - behaviour).abs()).sum(1)
        assert bool((spent <= epsilon + 1e-9).all())
        gains = ((policy - behaviour) * values).sum(1)
        assert bool((gains >= -1e-9).all())
        assert (gains.mean().item() > 0.02) == (epsilon > 0.0)
    # With plenty of it, it is greedy.
    assert torch.equal(policy.argmax(1), values.argmax(1))
    assert bool((policy.amax(1) > 0.999).all())


# --- what they promise, by the exact values of HazardGrid's dynamics ---

DISCOUNT = 0.95
TABLE = grid.transition_table()
ALIVE = (grid.KIND != "#") & (grid.KIND != "G")
CELLS = torch.from_numpy(np.stack([grid.observe(c) for c in range(grid.CELLS)]))


def exact_value(policy: Floats) -> float:
    """Exact discounted return of a policy [48, 4] from the start cells, without time limit."""
    moves = grid.under(policy) * ALIVE[:, None]
    paid = moves @ (grid.KIND == "G") - grid.TIME_COST * ALIVE
    value = np.linalg.solve(np.eye(grid.CELLS) - DISCOUNT * moves * ALIVE, paid)
    return float(value[grid.STARTS].mean())


def grid_log(policy: Floats, episodes: int, seed: int) -> Dataset:
    """Episodes of 40 steps at most."""
    rng = np.random.default_rng(seed)
    cell, steps = rng.choice(grid.STARTS, episodes), []
    for _ in range(40):
        action = (rng.random((len(cell), 1)) > policy[cell].cumsum(1)).sum(1).clip(0, 3)
        chances = TABLE[action, cell].cumsum(1)
        following = (rng.random((len(cell), 1)) > chances).sum(1).clip(0, grid.CELLS - 1)
        steps.append((cell, action, following))
        cell = following[ALIVE[following]]
    state, action, following = (np.concatenate(part) for part in zip(*steps, strict=True))
    rewards = torch.from_numpy((grid.KIND[following] == "G") - grid.TIME_COST).float()
    over = torch.from_numpy(~ALIVE[following]).float()
    actions = one_hot(torch.from_numpy(action), 4)
    return log_of(transitions(CELLS[state], actions, rewards, CELLS[following], over))


def test_they_are_hardly_ever_worse_than_the_behaviour_where_greed_often_is() -> None:
    """A good behaviour that errs at times, 40 episodes: what it seldom tried seems good by luck.

    In cells that the log has not seen everybody does as the behaviour.
    """
    behaviour = 0.9 * grid.as_probabilities(grid.plan(0.0)) + 0.1 / 4.0
    at_least = exact_value(behaviour)
    gains: dict[str, list[float]] = {"greedy": [], "spibb": [], "soft_spibb": []}
    for seed in range(EVERY_LOG):
        counts = Counts.of(grid_log(behaviour, 40, seed), "spibb")
        seen, e = [grid.cell_of(o) for o in counts.observations.numpy()], errors(counts, 1.0)

        def softly(values: Tensor, states: Tensor, c: Counts = counts, e: Tensor = e) -> Tensor:
            return transferred(values, c.behaviour[states], e[states], 1.0)

        plans = {"greedy": bootstrapped(counts, 0), "spibb": bootstrapped(counts, 5)}
        for name, improve in {**plans, "soft_spibb": softly}.items():
            policy = behaviour.copy()
            policy[seen] = iterate(counts, DISCOUNT, improve)[0].numpy()
            gains[name].append(exact_value(policy) - at_least)
    # pi_b too is estimated: by itself that errs by as much.
    assert min(gains["spibb"]) > -0.06
    assert min(gains["soft_spibb"]) > 0.0
    assert float(np.mean(gains["soft_spibb"])) > 0.04
    assert min(gains["greedy"]) < -0.3
    assert sum(gain < -0.06 for gain in gains["greedy"]) > 20


def test_on_a_bandit_losses_stay_within_the_bound_and_greed_s_do_not() -> None:
    """pi_b takes arm 0, which pays .7, in 92 % of 100 steps, and 4 others that pay .2.

    With discount 0 Soft-SPIBB's bound is epsilon times the largest return, 1, with a probability of
    1 - delta. An arm tried twice that paid twice is better in the log, and .5 worse in truth.
    """
    chances, pays = torch.tensor([0.92, 0.02, 0.02, 0.02, 0.02]), torch.tensor([0.7] + [0.2] * 4)
    epsilon, delta = 0.1, 0.05
    losses: dict[str, list[float]] = {"greedy": [], "soft_spibb": []}
    for seed in range(EVERY_LOG):
        g, here = seeded(seed), torch.zeros(100, 1)
        arms = torch.multinomial(chances, 100, replacement=True, generator=g)
        paid = (torch.rand(100, generator=g) < pays[arms]).float()
        log = log_of(transitions(here, one_hot(arms, 5), paid, here, torch.ones(100)))
        counts = Counts.of(log, "soft_spibb")
        e = errors(counts, delta)
        policies = {
            "greedy": bootstrapped(counts, 0)(counts.rewards, HERE),
            "soft_spibb": transferred(counts.rewards, counts.behaviour, e, epsilon),
        }
        for name, policy in policies.items():
            losses[name].append(float((chances @ pays) - policy[0].float() @ pays))
    assert sum(loss > epsilon for loss in losses["soft_spibb"]) <= delta * EVERY_LOG
    assert sum(loss > epsilon for loss in losses["greedy"]) > 2.0 * delta * EVERY_LOG


def test_policy_iteration_finds_the_best_plan_where_all_is_known() -> None:
    """From uniform behaviour over many steps: the greedy plan is nearly as good as the best."""
    uniform = np.full((grid.CELLS, 4), 0.25)
    counts = Counts.of(grid_log(uniform, 3000, 0), "spibb")
    policy = uniform.copy()
    seen = [grid.cell_of(o) for o in counts.observations.numpy()]
    policy[seen] = iterate(counts, DISCOUNT, bootstrapped(counts, 10))[0].numpy()
    best = exact_value(grid.as_probabilities(grid.plan(0.0)))
    assert exact_value(policy) == pytest.approx(best, abs=0.02)


# --- the actor that imitates ---


def imitator(
    agent: type[Any], config: Any, rows: list[tuple[int, int, int, float, bool]], actions: int
) -> tuple[Any, Networks]:
    networks = Networks(3, actions, NetworkConfig((16,), (), 2), seeded(), CATEGORICAL)
    setup = setup_of(networks, seeded())
    dataset = log_of(steps_of(rows, actions=actions))
    return agent(setup._replace(dataset=dataset), config), networks


def bandit(counts: tuple[int, int, int], rewards: tuple[float, float, float]) -> Any:
    return [(0, a, 0, rewards[a], True) for a in range(3) for _ in range(counts[a])]


RISKY = Penalty(lambda o, t, a: a[:, 0], torch.tensor(2.0))
# 40, 40 and 20 of 100: the third is the best by far, but not known by more than n_wedge.
LOGGED, PAID = (40, 40, 20), (1.0, 0.8, 5.0)


@pytest.mark.parametrize(
    ("penalties", "expected"), [((), [0.8, 0.0, 0.2]), ((RISKY,), [0.0, 0.8, 0.2])]
)
def test_spibb_takes_the_best_known_way_and_with_a_risk_on_it_the_other(
    penalties: tuple[Penalty, ...], expected: list[float]
) -> None:
    """|Q| is .8 x 1 + .2 x 5 = 1.8: Q/|Q| - 2 risk is -1.44 and .44."""
    config = SPIBBConfig(learning_rate=1e-2, n_wedge=20)
    agent, networks = imitator(SPIBB, config, bandit(LOGGED, PAID), 3)
    batch = steps_of(bandit(LOGGED, PAID), actions=3)
    target = agent.imitation.target(batch, HERE.expand(100), Steering(penalties))
    torch.testing.assert_close(target, torch.tensor(expected).expand(100, 3))
    for _ in range(400):
        agent.update(batch, Steering(penalties))
    found = probabilities_of(networks.actor, torch.eye(3)[:1])[0]
    torch.testing.assert_close(found, torch.tensor(expected), atol=0.03, rtol=0.0)


def test_how_much_a_limit_asks_is_in_mean_magnitudes_of_q() -> None:
    """Q/|Q| of the ways is .556 and .444: a risk that costs less than .111 changes nothing."""
    agent, _ = imitator(SPIBB, SPIBBConfig(n_wedge=20), bandit(LOGGED, PAID), 3)
    batch = steps_of(bandit(LOGGED, PAID), actions=3)
    for multiplier, best in ((0.10, 0), (0.12, 1)):
        steering = Steering((RISKY._replace(multiplier=torch.tensor(multiplier)),))
        target = agent.imitation.target(batch, HERE.expand(100), steering)
        assert target.argmax(1).tolist() == [best] * 100


def test_soft_spibb_imitates_its_transfers_and_with_a_risk_other_ones() -> None:
    """e of 40 and 20 steps, of 2 x 3 / 1 = 6: .5 may be spent, on both ends alike."""
    config = SoftSPIBBConfig(learning_rate=1e-2, epsilon=0.5, delta=1.0)
    agent, networks = imitator(SoftSPIBB, config, bandit(LOGGED, PAID), 3)
    batch = steps_of(bandit(LOGGED, PAID), actions=3)
    often, seldom = (math.sqrt(2.0 * math.log(6.0) / n) for n in (40.0, 20.0))
    assert agent.imitation.policy.shape == (1, 3)
    expected = soft([1.0, 0.8, 5.0], [0.4, 0.4, 0.2], [often, often, seldom], 0.5)
    assert expected[1] < expected[0] < 0.4 < expected[2]  # the worst gives first
    assert agent.imitation.policy[0].tolist() == pytest.approx(expected)
    careful = agent.imitation.target(batch, HERE.expand(100), Steering((RISKY,)))[0]
    assert careful[0] < 0.4 - 0.1
    for _ in range(400):
        agent.update(batch, NOTHING_ELSE)
    found = probabilities_of(networks.actor, torch.eye(3)[:1])[0]
    torch.testing.assert_close(found, torch.tensor(expected), atol=0.03, rtol=0.0)


def test_a_risk_is_seen_at_the_time_of_its_transition() -> None:
    """Late, action 0 is risky; what is imitated at each step of the log is of that step."""
    late = Penalty(lambda o, t, a: a[:, 0] * (t < 0.5), torch.tensor(2.0))
    agent, _ = imitator(SPIBB, SPIBBConfig(n_wedge=20), bandit(LOGGED, PAID), 3)
    batch = steps_of(bandit(LOGGED, PAID), actions=3)
    time_to_go = torch.linspace(0.0, 1.0, 100)
    target = agent.imitation.target(
        batch._replace(time_to_go=time_to_go), HERE.expand(100), Steering((late,))
    )
    assert target.argmax(1).tolist() == [1] * 50 + [0] * 50


def test_what_is_drawn_of_the_log_is_what_a_risk_sees() -> None:
    """Not the batch that it is given, of another state at another time."""
    seen: list[Tensor] = []

    def risk(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
        seen.append(torch.cat([observations, time_to_go[:, None]], 1))
        return actions[:, 0]

    agent, _ = imitator(SPIBB, SPIBBConfig(n_wedge=20), bandit(LOGGED, PAID), 3)
    batch = steps_of(bandit(LOGGED, PAID), actions=3)
    batch = batch._replace(observations=batch.observations + 7.0, time_to_go=batch.time_to_go * 0.3)
    agent.update(batch, Steering((Penalty(risk, torch.tensor(1.0)),)))
    assert torch.equal(torch.cat(seen), torch.tensor([[1.0, 0.0, 0.0, 1.0]]).expand(300, -1))


def test_imitation_is_of_states_of_the_log_and_by_cross_entropy() -> None:
    """In state 0 it does one thing, in state 1 the other; the loss by hand at (.5, .5)."""
    rows = [(0, 0, 1, 1.0, True)] * 30 + [(1, 1, 0, 1.0, True)] * 30
    agent, networks = imitator(SPIBB, SPIBBConfig(learning_rate=1e-2), rows, 2)
    with torch.no_grad():
        for parameter in networks.actor.parameters():
            parameter.mul_(0.0)
    (loss,) = agent.imitation.loss(torch.eye(3)[:2], torch.tensor([[0.7, 0.3], [1.0, 0.0]]))
    assert loss.item() == pytest.approx(math.log(2.0))
    torch.nn.init.normal_(networks.actor.layers[0].weight, generator=seeded())  # type: ignore[index]
    torch.nn.init.normal_(networks.actor.layers[2].weight, generator=seeded())  # type: ignore[index]
    for _ in range(200):
        agent.update(steps_of(rows, actions=2), NOTHING_ELSE)
    found = probabilities_of(networks.actor, torch.eye(3)[:2])
    torch.testing.assert_close(found, torch.eye(2), atol=0.05, rtol=0.0)
