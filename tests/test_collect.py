"""Collection: deterministic, complete episodes, the stated mixture, one default dataset."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from safe_offrl import behaviours as behaviours_module
from safe_offrl import collect as module
from safe_offrl.behaviours import Behaviour, random_behaviour
from safe_offrl.collect import accident_mixture, build_dataset, collect, default_dataset
from safe_offrl.data.hdf5 import load_dataset
from safe_offrl.env import AccidentEnv, episode_seed
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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PILOT_EPISODES", 20)
    monkeypatch.setattr(behaviours_module, "PARALLEL_ENVS", 2)


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
    # A change of either source file builds a new log.
    read = Path.read_bytes
    for name in ("behaviours.py", "collect.py"):

        def changed(path: Path, name: str = name) -> bytes:
            return read(path) + b"#" * (path.name == name)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", changed)
            default_dataset()
    assert len(built) == len(set(built)) == 5


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
