"""Behaviours: smooth noise of the stated size, and random actions that cover the space."""

import numpy as np
import pytest

from safe_offrl.collect import behaviours as module
from safe_offrl.collect.behaviours import random_behaviour, scripted_behaviours
from safe_offrl.collect.mixture import log_episodes
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.make import make_env
from safe_offrl.spec import SafetySpec

SPEC = SafetySpec()


def test_random_behaviour_is_smooth_and_uniform() -> None:
    act = random_behaviour(2).factory(np.random.default_rng(0))
    actions = np.array([act(np.zeros(1, np.float32)) for _ in range(20_000)])
    assert actions.dtype == np.float32
    assert np.abs(actions).max() <= 1.0
    assert np.allclose(actions.mean(0), 0.0, atol=0.1)  # about 500 independent draws
    assert np.allclose(actions.std(0), np.sqrt(1 / 3), atol=0.05)
    assert np.abs(np.diff(actions, axis=0)).mean() < 0.2  # independent draws: 2/3


def test_scripted_behaviours_of_the_default_environment() -> None:
    env = make_env("PointHazard-v0", SPEC)
    behaviours = scripted_behaviours(env)
    assert len(behaviours) >= 3
    assert scripted_behaviours(make_env("Pendulum-v1", SafetySpec(accident="terminated"))) == []
    arrays = log_episodes(
        env, behaviours=behaviours, shares=[1 / len(behaviours)] * len(behaviours),
        transitions=2000, seed=0,
    )  # fmt: skip
    # Noise takes the actions off the controllers' own values, everywhere in the range.
    counts, _ = np.histogram(arrays["actions"][:, 1], bins=10, range=(-1, 1))
    assert counts.min() > 20


def test_noise_is_correlated_and_of_the_stated_levels() -> None:
    noisy = module._with_noise(lambda rng: lambda observation: np.zeros(2, np.float32))
    levels, correlations = [], []
    for k in range(60):
        act = noisy(np.random.default_rng(k))
        actions = np.array([act(np.zeros(1, np.float32)) for _ in range(2000)])
        levels.append(actions.std())
        if levels[-1] > 0:
            correlations.append(np.corrcoef(actions[:-1, 0], actions[1:, 0])[0, 1])
    nearest = np.abs(np.subtract.outer(levels, module.NOISE_LEVELS)).argmin(1)
    assert np.allclose(levels, np.array(module.NOISE_LEVELS)[nearest], rtol=0.15)
    assert set(nearest) == {0, 1, 2}
    assert np.mean(correlations) == pytest.approx(module.NOISE_CORRELATION, abs=0.02)


# --- discrete actions ---


@pytest.fixture(scope="module")
def grid() -> AccidentEnv:
    return make_env("HazardGrid-v0", SPEC)


def test_scripted_controllers_of_discrete_actions_take_random_ones_at_the_stated_rates(
    grid: AccidentEnv,
) -> None:
    up = module._with_chance(lambda rng: lambda observation: 0, grid)
    rates = []
    for k in range(60):
        act = up(np.random.default_rng(k))
        actions = np.array([act(np.zeros(1, np.float32)) for _ in range(500)])
        assert (actions.sum(1) == 1.0).all()
        rates.append(1.0 - actions[:, 0].mean())
    # One in four of the random ones is the same action again.
    levels = 0.75 * np.array(module.NOISE_LEVELS)
    nearest = np.abs(np.subtract.outer(rates, levels)).argmin(1)
    assert np.allclose(rates, levels[nearest], atol=0.06)
    assert set(nearest) == {0, 1, 2}


def test_discrete_behaviours_are_logged_as_the_one_hot_rows_that_acted(grid: AccidentEnv) -> None:
    behaviours = [*scripted_behaviours(grid), random_behaviour(grid.action_size)]
    assert [b.name for b in behaviours] == ["hurried", "moderate", "cautious", "random"]
    arrays = log_episodes(grid, behaviours=behaviours, shares=[0.25] * 4, transitions=3000, seed=0)
    actions = arrays["actions"]
    assert actions.dtype == np.float32
    assert set(np.unique(actions)) == {0.0, 1.0}
    assert (actions.sum(1) == 1.0).all()
    # Every action is chosen equally often at random.
    only = log_episodes(grid, behaviours=behaviours[3:], shares=[1.0], transitions=4000, seed=0)
    np.testing.assert_allclose(only["actions"].mean(0), 0.25, atol=0.08)
