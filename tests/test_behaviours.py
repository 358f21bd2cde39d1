"""Behaviours: smooth noise of the stated size, PPO isolated from the caller and copied exactly."""

import random

import numpy as np
import pytest
import torch

from safe_offrl import behaviours as module
from safe_offrl.behaviours import ppo_behaviours, random_behaviour, scripted_behaviours
from safe_offrl.collect import collect
from safe_offrl.env import make_env
from safe_offrl.safety import SafetySpec

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
    arrays = collect(
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


def test_ppo_leaves_the_global_state_alone() -> None:
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    numpy_before = np.random.get_state()[1].copy()  # type: ignore[index] # noqa: NPY002
    behaviours = ppo_behaviours("PointHazard-v0", SPEC, steps=10, seed=0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), torch.get_num_threads())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # type: ignore[index] # noqa: NPY002
    assert [b.name for b in behaviours] == ["ppo-1024", "ppo-2048", "ppo-3072"]  # whole rollouts


def test_frozen_ppo_policy_equals_the_model() -> None:
    from stable_baselines3 import PPO

    env = make_env("PointHazard-v0", SPEC)
    with module._isolated_torch():
        model = PPO("MlpPolicy", env, n_steps=64, seed=0, device="cpu")
        frozen = module._frozen(model.policy)
        with torch.no_grad():
            model.policy.log_std.fill_(-30.0)  # the mean alone
            deterministic = module._frozen(model.policy)
            model.policy.log_std.fill_(np.log(0.5))
            wide = module._frozen(model.policy)
        rng = np.random.default_rng(0)
        for _ in range(20):
            x = rng.normal(size=env.observation_size).astype(np.float32)
            expected = model.predict(x, deterministic=True)[0]
            assert np.allclose(deterministic(rng)(x), expected, atol=1e-5)
        zero = np.zeros(env.observation_size, np.float32)
        samples = np.array([wide(rng)(zero) for _ in range(4000)])
        assert samples.std() == pytest.approx(0.5, rel=0.05)
        # A snapshot: training on must not move it.
        before = frozen(np.random.default_rng(1))(zero)
        model.learn(64)
        assert np.array_equal(before, frozen(np.random.default_rng(1))(zero))
