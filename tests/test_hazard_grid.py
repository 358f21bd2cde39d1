"""The grid is what its dynamic programming says: by hand, and by playing it."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from safe_offrl.envs import hazard_grid as grid
from safe_offrl.envs.hazard_grid import HazardGridEnv

UP, RIGHT, DOWN, LEFT = range(4)


def cell(row: int, column: int) -> int:
    return row * grid.WIDTH + column


def always(action: int) -> np.ndarray:
    return grid.as_probabilities(np.full(grid.CELLS, action))


def test_gymnasium_accepts_it() -> None:
    env = gymnasium.make("safe_offrl.envs:HazardGrid-v0")
    check_env(env.unwrapped)
    assert env.spec is not None
    assert env.spec.max_episode_steps == 40


def test_an_observation_is_its_cell() -> None:
    assert [grid.cell_of(grid.observe(c)) for c in range(grid.CELLS)] == list(range(grid.CELLS))
    assert grid.observe(cell(2, 3)).nonzero()[0].tolist() == [2, grid.HEIGHT + 3]


def test_a_step_slips_to_either_side_and_walls_stop_it() -> None:
    table = grid.transition_table()
    np.testing.assert_allclose(table.sum(-1), 1.0)
    # From the lower left corner upwards: .8 up; .1 to the right; .1 to the left, into the wall.
    corner = table[UP, cell(5, 0)]
    assert corner[cell(4, 0)] == pytest.approx(0.8)
    assert corner[cell(5, 1)] == pytest.approx(0.1)
    assert corner[cell(5, 0)] == pytest.approx(0.1)
    # Nothing leaves a pit or the goal.
    for end in (cell(1, 2), cell(2, 7)):
        assert table[:, end, end].tolist() == [1.0] * 4


def test_dynamic_programming_by_hand() -> None:
    # Between the pits at (2, 2) and always right: (1, 2) above and (3, 2) below, .1 each a step.
    #   t = 1: .2
    #   t = 2: .2 + .8 * .2 (the same at (2, 3))          = .36
    #   t = 3: at (2, 4) only the pit above is left, .1:    .2 + .8 (.2 + .8 * .1) = .424
    table = grid.accident_table(always(RIGHT), 3)
    assert table[:, cell(2, 2)].tolist() == pytest.approx([0.0, 0.2, 0.36, 0.424])
    assert table[:, cell(1, 3)].tolist() == [1.0] * 4  # a pit
    assert table[:, cell(2, 7)].tolist() == [0.0] * 4  # the goal
    # A policy that stays away: up and down at random along the left wall can still slip to (3, 1),
    # but no pit is within one step of it.
    assert table[1, [cell(2, 0), cell(3, 0), cell(4, 0)]].tolist() == [0.0, 0.0, 0.0]


def test_return_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Along the left wall nothing happens but time: 7 steps cost .42.
    assert grid.expected_return(always(LEFT), 7) == pytest.approx(-0.42)
    # From (2, 6) to the right: .8 arrive at once, .74; .1 each slip to (1, 6) and (3, 6), -.06;
    # a second step costs those .2 another .06, and leads nowhere near the goal.
    monkeypatch.setattr(grid, "STARTS", np.array([cell(2, 6)]))
    assert grid.expected_return(always(RIGHT), 1) == pytest.approx(0.74)
    assert grid.expected_return(always(RIGHT), 2) == pytest.approx(0.74 - 0.2 * 0.06)


def test_a_table_that_is_no_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="do not sum to 1"):
        grid.accident_probability(0.5 * always(UP), 3)


def test_caution_costs_return() -> None:
    """The tension that makes it an example: less accidents, less return, epsilon in between."""
    results = [
        (grid.accident_probability(policy, 40), grid.expected_return(policy, 40))
        for policy in (grid.as_probabilities(grid.plan(a)) for a in (0.0, 0.25, 0.5, 1.0, 2.0))
    ]
    risks, returns = zip(*results, strict=True)
    assert list(risks) == sorted(risks, reverse=True)
    assert list(returns) == sorted(returns, reverse=True)
    assert risks[0] > 0.2
    assert risks[-1] < 0.001
    assert 0.0 < returns[-1] < 0.5 * returns[0]


@pytest.mark.parametrize("aversion", [0.0, 0.5])
def test_the_environment_agrees_with_dynamic_programming(aversion: float) -> None:
    env, episodes, horizon = HazardGridEnv(), 3000, 40
    policy = 0.9 * grid.as_probabilities(grid.plan(aversion)) + 0.1 / 4
    rng = np.random.default_rng(1)
    env.reset(seed=0)
    accidents, returns = 0, np.zeros(episodes)
    for k in range(episodes):
        observation, _ = env.reset()
        for _ in range(horizon):
            action = rng.choice(4, p=policy[grid.cell_of(observation)])
            observation, reward, terminated, _, info = env.step(action)
            accidents += info["cost"] > 0
            returns[k] += reward
            if terminated:
                break
    exact = grid.accident_probability(policy, horizon)
    assert abs(accidents / episodes - exact) < 4 * np.sqrt(exact * (1 - exact) / episodes)
    error = returns.std() / np.sqrt(episodes)
    assert abs(returns.mean() - grid.expected_return(policy, horizon)) < 4 * error


def test_the_scripted_behaviours_follow_their_plans() -> None:
    behaviours = grid.scripted_behaviours()
    controller = behaviours["hurried"](np.random.default_rng(0))
    assert controller(grid.observe(cell(2, 0))) == RIGHT
    cautious = behaviours["cautious"](np.random.default_rng(0))
    assert cautious(grid.observe(cell(2, 1))) == LEFT  # not into the gap
