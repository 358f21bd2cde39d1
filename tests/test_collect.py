"""Collection: deterministic, complete episodes, the stated mixture, PPO isolated and exact."""

import random
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from safe_offrl import collect as module
from safe_offrl.collect import (
    Behaviour,
    accident_mixture,
    build_dataset,
    collect,
    default_dataset,
    ppo_behaviours,
    random_behaviour,
    scripted_behaviours,
)
from safe_offrl.data.hdf5 import load_dataset
from safe_offrl.env import AccidentEnv, episode_seed, make_env
from safe_offrl.errors import ConfigError, EnvError, UserError
from safe_offrl.safety import SafetySpec

SPEC = SafetySpec()


class Walk(gymnasium.Env[Any, Any]):
    """Moves by the action; an accident (not a termination) beyond .6; no controllers offered."""

    observation_space = gymnasium.spaces.Box(-10.0, 10.0, (1,))
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(-0.1, 0.1))
        return np.array([self.x], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.x += 0.2 * float(action[0])
        observation = np.array([self.x], np.float32)
        return observation, self.x, self.x < -0.9, False, {"cost": float(self.x > 0.6)}


def walk(horizon: int = 5) -> AccidentEnv:
    return AccidentEnv(Walk(), SafetySpec(horizon=horizon), env_id="Walk-v0")


def constant(name: str, *action: float) -> Behaviour:
    return Behaviour(name, lambda rng: lambda observation: np.array(action, np.float32))


def test_log_by_hand() -> None:
    env = walk()
    behaviours = [constant("right", 1.0), constant("left", -2.0)]
    arrays = collect(env, behaviours=behaviours, shares=[0.5, 0.5], transitions=9, seed=3)
    # Behaviours alternate. Right: 5 steps of +.2 from |x| < .1 passes .6 at step 3 or 4 and goes on
    # to the limit. Left: the action is clipped to -1, stored so, and -.9 is passed at step 5.
    assert arrays["episode_behaviours"].tolist() == [0, 1]
    assert arrays["timeouts"].tolist() == [False] * 4 + [True] + [False] * 5
    assert arrays["terminals"].tolist()[:5] == [False] * 5
    assert arrays["actions"][:, 0].tolist() == [1.0] * 5 + [-1.0] * 5
    assert arrays["accidents"].tolist() == (arrays["next_observations"][:, 0] > 0.6).tolist()
    assert arrays["costs"].tolist() == arrays["accidents"].astype(float).tolist()
    start, _ = env.reset(seed=episode_seed(3, 0, "collect"))
    assert arrays["observations"][0] == start
    assert np.array_equal(arrays["next_observations"][:4], arrays["observations"][1:5])
    assert np.allclose(arrays["rewards"], arrays["next_observations"][:, 0])


def test_episodes_are_complete_and_limits_hold() -> None:
    behaviours = [random_behaviour(1)]
    arrays = collect(walk(), behaviours=behaviours, shares=[1.0], transitions=23, seed=0)
    assert len(arrays["rewards"]) == 25  # the fifth episode is finished
    limited = collect(
        walk(), behaviours=behaviours, shares=[1.0], transitions=10**9, episodes=3, seed=0
    )
    assert len(limited["episode_behaviours"]) == 3


def test_every_prefix_of_the_log_has_the_mixture() -> None:
    behaviours = [constant(str(k), 0.0) for k in range(3)]
    shares = np.array([0.6, 0.3, 0.1])
    arrays = collect(walk(1), behaviours=behaviours, shares=shares, transitions=100, seed=0)
    index = arrays["episode_behaviours"]
    for n in range(1, 101):
        counts = np.bincount(index[:n], minlength=3)
        assert np.abs(counts - n * shares).max() < 1.5
    assert np.bincount(index).tolist() == [60, 30, 10]


def test_wrong_action_shape_names_the_behaviour() -> None:
    with pytest.raises(EnvError, match='behaviour "odd"'):
        collect(walk(), behaviours=[constant("odd", 0, 0)], shares=[1.0], transitions=1, seed=0)


def test_accident_mixture() -> None:
    p = [0.02, 0.1, 0.5]
    for target in (0.1, 0.15, 0.3):
        shares = accident_mixture(p, target)
        assert shares.sum() == pytest.approx(1.0)
        assert shares @ np.array(p) == pytest.approx(target, abs=1e-6)
        assert shares.min() >= module.MIN_SHARE / 3
    # The equal mixture has .62 / 3 and is left alone.
    assert np.allclose(accident_mixture(p, 0.62 / 3), 1 / 3, atol=1e-6)
    # Out of reach: all but the floor of .1 / 3 goes to the nearest behaviour.
    assert np.allclose(accident_mixture(p, 0.9), [0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3])
    assert np.allclose(accident_mixture(p, 0.0), [0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3])
    assert np.allclose(accident_mixture([0.2, 0.2], 0.1), 0.5)


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
    assert scripted_behaviours(walk()) == []
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

    env = walk()
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
            x = rng.normal(size=1).astype(np.float32)
            expected = model.predict(x, deterministic=True)[0]
            assert np.allclose(deterministic(rng)(x), expected, atol=1e-5)
        zero = np.zeros(1, np.float32)
        samples = np.array([wide(rng)(zero) for _ in range(4000)])
        assert samples.std() == pytest.approx(0.5, rel=0.05)
        # A snapshot: training on must not move it.
        before = frozen(np.random.default_rng(1))(zero)
        model.learn(64)
        assert np.array_equal(before, frozen(np.random.default_rng(1))(zero))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PILOT_EPISODES", 20)
    monkeypatch.setattr(module, "PARALLEL_ENVS", 2)


@pytest.mark.usefixtures("small")
def test_build_is_deterministic_and_says_what_it_did(tmp_path: Path) -> None:
    def build(name: str, seed: int) -> str:
        path = build_dataset(
            "PointHazard-v0",
            SPEC,
            path=tmp_path / name,
            transitions=3000,
            seed=seed,
            training_steps=600,
            progress=messages.append,
        )
        return load_dataset(path, discount=0.99, spec=SPEC).sha256

    messages: list[str] = []
    torch.manual_seed(1)
    first = build("a.hdf5", 0)
    torch.manual_seed(2)
    np.random.default_rng().random()
    assert build("b.hdf5", 0) == first
    assert build("c.hdf5", 1) != first
    dataset = load_dataset(tmp_path / "a.hdf5", discount=0.99, spec=SPEC)
    metadata = dataset.metadata
    assert len(dataset.rows) >= 3000
    assert metadata["env_id"] == "PointHazard-v0"
    assert metadata["horizon"] == 100
    assert metadata["seed"] == 0
    assert (metadata["action_low"], metadata["action_high"]) == (-1.0, 1.0)
    assert metadata["accident_share"] == pytest.approx(dataset.episode_accidents.mean())
    assert metadata["training"] == {"algorithm": "PPO", "steps": 600, "logged": False}
    assert {"torch", "gymnasium", "numpy", "stable-baselines3"} <= set(metadata["versions"])
    names = [b["name"] for b in metadata["behaviours"]]
    assert "random" in names
    assert sum(name.startswith("ppo-") for name in names) == 3
    assert sum(b["episodes"] for b in metadata["behaviours"]) == dataset.episodes
    assert any(m.startswith("training PPO") for m in messages)
    assert messages[-1].startswith("logged 3,0")


@pytest.mark.usefixtures("small")
def test_target_out_of_reach_is_said(tmp_path: Path) -> None:
    messages: list[str] = []
    path = build_dataset(
        "PointHazard-v0",
        SPEC,
        path=tmp_path / "a.hdf5",
        transitions=1500,
        target_accident_share=1.0,
        training_steps=0,
        progress=messages.append,
    )
    warning = load_dataset(path, discount=0.99, spec=SPEC).metadata["warning"]
    assert "not the 100% aimed at" in warning
    assert f"warning: {warning}" in messages


def test_bad_settings() -> None:
    for bad in (
        {"transitions": 0},
        {"training_steps": -1},
        {"target_accident_share": 1.5},
        {"target_accident_share": float("nan")},
    ):
        with pytest.raises(ConfigError):
            build_dataset("PointHazard-v0", SPEC, path="unused.hdf5", **bad)


def test_default_dataset_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def fake(env_id: str, spec: SafetySpec, *, path: Path, progress: Any) -> Path:
        built.append(path)
        path.write_bytes(b"data")
        return path

    monkeypatch.setattr(module, "build_dataset", fake)
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path / "cache"))
    first = default_dataset()
    assert first.parent == tmp_path / "cache"
    assert default_dataset(spec=SafetySpec(epsilon=0.3)) == first  # not what the log depends on
    assert built == [first]
    assert default_dataset(spec=SafetySpec(cost_threshold=0.5)) != first
    assert default_dataset("HazardLine-v0") != first
    assert len(built) == 3


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="SAFE_OFFRL_CACHE"):
        default_dataset()


@pytest.mark.slow
def test_default_dataset_as_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path))
    dataset = load_dataset(default_dataset(), discount=0.99, spec=SPEC)
    assert len(dataset.rows) >= 100_000
    assert 0.10 <= dataset.episode_accidents.mean() <= 0.20
    assert all(b["episodes"] >= 20 for b in dataset.metadata["behaviours"])
