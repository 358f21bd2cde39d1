"""Collection: deterministic, whole episodes, the stated mixture, one default dataset."""

from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest
import torch

from safe_offrl.collect import build as module
from safe_offrl.collect import mixture
from safe_offrl.collect import sb3 as learners
from safe_offrl.collect.behaviours import Behaviour, random_behaviour
from safe_offrl.collect.build import behaviour_table, build_dataset, default_dataset
from safe_offrl.collect.log_plan import CollectConfig
from safe_offrl.collect.mixture import log_episodes, unsafe_mixture
from safe_offrl.collect.sb3 import LearnersConfig, PPOConfig, SACConfig
from safe_offrl.config import load_config
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.env.adapter import AccidentEnv, episode_seed
from safe_offrl.errors import ConfigError, DataError, EnvError, UserError
from safe_offrl.spec import SafetySpec

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
    arrays = log_episodes(env, behaviours=behaviours, shares=[0.5, 0.5], transitions=9, seed=3)
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


def test_signals_are_logged_beside_all_else() -> None:
    class Signalling(Walk):
        def step(self, action: Any) -> Any:
            *rest, info = super().step(action)
            return (*rest, {**info, "far": {"right": max(0.0, self.x)}, "left": self.x < 0.0})

    spec = SafetySpec(horizon=5, signals={"right": "far.right", "left": "left"})
    env = AccidentEnv(Signalling(), spec, env_id="Walk-v0")
    settings: Any = {"shares": [0.5, 0.5], "transitions": 9, "seed": 3}
    behaviours = [constant("right", 1.0), constant("left", -2.0)]
    arrays = log_episodes(env, behaviours=behaviours, **settings)
    plain = log_episodes(walk(), behaviours=behaviours, **settings)
    assert set(arrays) - set(plain) == {"costs_left", "costs_right"}
    for name, values in plain.items():
        np.testing.assert_array_equal(arrays[name], values, err_msg=name)
    x = arrays["next_observations"][:, 0]
    np.testing.assert_array_equal(arrays["costs_right"], np.maximum(x, 0.0))
    np.testing.assert_array_equal(arrays["costs_left"], (x < 0.0).astype(np.float32))
    assert arrays["costs_left"].dtype == arrays["costs_right"].dtype == np.float32


def test_an_episode_whose_signal_fails_is_left_out_whole() -> None:
    class Sometimes(Walk):
        episodes = steps = 0

        def reset(self, **options: Any) -> Any:
            self.episodes, self.steps = self.episodes + 1, 0
            return super().reset(**options)

        def step(self, action: Any) -> Any:
            *rest, info = super().step(action)
            self.steps += 1
            broken = self.episodes == 2 and self.steps == 3
            return (*rest, {**info, "way": -1.0 if broken else float(self.steps)})

    env = AccidentEnv(Sometimes(), SafetySpec(horizon=5, signals={"way": "way"}))
    log = mixture.Log()
    arrays = log_episodes(
        env, behaviours=[constant("right", 1.0)], shares=[1.0], transitions=10, seed=0, log=log
    )
    assert arrays["costs_way"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0] * 2
    assert len(arrays["rewards"]) == 10
    assert log.dropped.count == 1
    assert 'gave the signal "way" (way) as -1 at step 3' in log.dropped.last


def test_episodes_are_complete_and_limits_hold() -> None:
    behaviours = [random_behaviour(1)]
    arrays = log_episodes(walk(), behaviours=behaviours, shares=[1.0], transitions=23, seed=0)
    assert len(arrays["rewards"]) == 25  # the fifth episode is finished
    limited = log_episodes(
        walk(), behaviours=behaviours, shares=[1.0], transitions=10**9, episodes=3, seed=0
    )
    assert len(limited["episode_behaviours"]) == 3


def test_every_prefix_of_the_log_has_the_mixture() -> None:
    behaviours = [constant(str(k), 0.0) for k in range(3)]
    shares = np.array([0.6, 0.3, 0.1])
    arrays = log_episodes(walk(1), behaviours=behaviours, shares=shares, transitions=100, seed=0)
    index = arrays["episode_behaviours"]
    for n in range(1, 101):
        counts = np.bincount(index[:n], minlength=3)
        assert np.abs(counts - n * shares).max() < 1.5
    assert np.bincount(index).tolist() == [60, 30, 10]


def test_wrong_action_shape_names_the_behaviour() -> None:
    with pytest.raises(EnvError, match='behaviour "odd"'):
        log_episodes(
            walk(), behaviours=[constant("odd", 0, 0)], shares=[1.0], transitions=1, seed=0
        )


def test_unsafe_mixture() -> None:
    p = [0.02, 0.1, 0.5]
    for target in (0.1, 0.15, 0.3):
        shares = unsafe_mixture(p, target)
        assert shares.sum() == pytest.approx(1.0)
        assert shares @ np.array(p) == pytest.approx(target, abs=1e-6)
        assert shares.min() >= mixture.MIN_SHARE / 3
    # The equal mixture has .62 / 3 and is left alone.
    assert np.allclose(unsafe_mixture(p, 0.62 / 3), 1 / 3, atol=1e-6)
    # Out of reach: all but the floor of .1 / 3 goes to the nearest behaviour.
    assert np.allclose(unsafe_mixture(p, 0.9), [0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3])
    assert np.allclose(unsafe_mixture(p, 0.0), [0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3])
    assert np.allclose(unsafe_mixture([0.2, 0.2], 0.1), 0.5)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PILOT_EPISODES", 20)
    monkeypatch.setattr(learners, "PARALLEL_ENVS", 2)


def ppo(steps: int) -> LearnersConfig:
    return LearnersConfig(ppo=PPOConfig(steps=steps))


@pytest.mark.usefixtures("small")
def test_build_is_deterministic_and_says_what_it_did(tmp_path: Path) -> None:
    def build(name: str, seed: int) -> str:
        config = CollectConfig(transitions=3000, seed=seed, learners=ppo(600))
        path = build_dataset(
            "PointHazard-v0", SPEC, path=tmp_path / name, config=config, progress=messages.append
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
    assert metadata["unsafe_share"] == metadata["accident_share"]
    assert metadata["training"]["ppo"]["steps"] == 600
    assert metadata["training"]["cost_limits"] == []  # the environment offers cautious controllers
    assert metadata["training"]["logged"] is False
    assert {"torch", "gymnasium", "numpy", "stable-baselines3"} <= set(metadata["versions"])
    names = [b["name"] for b in metadata["behaviours"]]
    assert "random" in names
    assert sum(name.startswith("ppo-") for name in names) == 3
    assert sum(b["episodes"] for b in metadata["behaviours"]) == dataset.episodes
    assert any(m.startswith("training ppo: ") for m in messages)
    assert messages[-1].startswith("logged 3,0")
    # The table's figures are those of the log.
    index = names.index("moderate")
    mine = [k == index for k in h5py.File(tmp_path / "a.hdf5")["episode_behaviours"]]
    mean, cost = dataset.episode_returns[mine].mean(), dataset.episode_costs[mine].mean()
    row = behaviour_table(metadata["behaviours"]).splitlines()[index + 1].split()
    assert row[:4] == ["moderate", str(sum(mine)), f"{mean:.2f}", f"{cost:.2f}"]


@pytest.mark.usefixtures("small")
def test_all_learners_and_the_spread_of_episode_cost(tmp_path: Path) -> None:
    spec = SafetySpec(accident="terminated", constraint="cost", cost_limit=0.5)
    config = CollectConfig(
        transitions=2000,
        unsafe_share=0.4,
        workers=1,
        learners=LearnersConfig(
            penalties=(1.0,),
            cost_limits=(0.2,),
            ppo=PPOConfig(steps=300, penalised_steps=300),
            sac=SACConfig(steps=1300, penalised_steps=300, updates=0.05),
        ),
    )
    path = build_dataset("PointHazard-v0", spec, path=tmp_path / "a.hdf5", config=config)
    dataset = load_dataset(path, discount=0.99, spec=spec)
    behaviours = dataset.metadata["behaviours"]
    assert {b.get("algorithm") for b in behaviours} == {None, "PPO", "SAC"}
    assert {b.get("cost_limit") for b in behaviours} == {None, 0.2}
    # An episode that falls into a hazard costs 1, more than the limit.
    costs = dataset.episode_costs
    assert dataset.metadata["unsafe_share"] == pytest.approx(float((costs > 0.5).mean()))
    assert dataset.metadata["target_unsafe_share"] == 0.4
    weights = [b["episodes"] for b in behaviours if b["episodes"]]
    means = [b["mean_cost"] for b in behaviours if b["episodes"]]
    assert np.average(means, weights=weights) == pytest.approx(float(costs.mean()))


@pytest.mark.usefixtures("small")
def test_the_share_of_the_threshold_is_no_part_of_the_file(tmp_path: Path) -> None:
    spec = SafetySpec(accident="episode_cost", cost_threshold=0.5)
    config = CollectConfig(transitions=300, learners=ppo(0))
    path = build_dataset("PointHazard-v0", spec, path=tmp_path / "a.hdf5", config=config)
    plain, saute = (
        load_dataset(path, discount=0.99, spec=s).layout.observation_size for s in (SPEC, spec)
    )
    assert saute == plain + 1


@pytest.mark.usefixtures("small")
def test_the_name_of_the_file_says_the_format(tmp_path: Path) -> None:
    config = CollectConfig(transitions=300, learners=ppo(0))
    identities = set()
    for name in ("a.hdf5", "folder", "a.npz"):
        path = build_dataset("PointHazard-v0", SPEC, path=tmp_path / name, config=config)
        returns = load_dataset(path, discount=0.99, spec=SPEC).episode_returns
        identities.add(returns.tobytes())
    assert (tmp_path / "folder" / "data" / "main_data.hdf5").is_file()
    assert len(identities) == 1
    with pytest.raises(DataError, match="which format"):
        build_dataset("PointHazard-v0", SPEC, path=tmp_path / "a.txt", config=config)


@pytest.mark.usefixtures("small")
def test_target_out_of_reach_is_said(tmp_path: Path) -> None:
    messages: list[str] = []
    path = build_dataset(
        "PointHazard-v0",
        SPEC,
        path=tmp_path / "a.hdf5",
        config=CollectConfig(transitions=1500, unsafe_share=1.0, learners=ppo(0)),
        progress=messages.append,
    )
    warning = load_dataset(path, discount=0.99, spec=SPEC).metadata["warning"]
    assert "not the 100% aimed at" in warning
    assert f"warning: {warning}" in messages


# --- environments that fail ---


class Fragile(Walk):
    """Fails in its third step, or in reset(), in every ``period``-th episode."""

    period, where, episodes, until = 4, 3, 0, 10**9

    def reset(self, **options: Any) -> Any:
        self.episodes, self.clock = self.episodes + 1, 0
        if self.fails() and self.where == 0:
            raise RuntimeError("no start position")
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        self.clock += 1
        if self.fails() and self.clock == self.where:
            raise RuntimeError("solver did not converge")
        return super().step(action)

    def fails(self) -> bool:
        return self.episodes > self.until or self.episodes % self.period == 0


def fragile(**settings: Any) -> AccidentEnv:
    env = Fragile()
    for name, value in settings.items():
        setattr(env, name, value)
    return AccidentEnv(env, SafetySpec(horizon=5), env_id="Fragile-v0")


@pytest.mark.promise("R11")
@pytest.mark.parametrize("where", [0, 1, 3])
def test_a_failed_episode_is_left_out_and_no_other(where: int) -> None:
    """All others are those of an environment that never fails, row for row."""
    behaviours = [constant("right", 1.0), random_behaviour(1)]
    log = mixture.Log()
    settings: Any = {"behaviours": behaviours, "shares": [0.5, 0.5], "seed": 3}
    found = log_episodes(fragile(where=where), transitions=60, log=log, **settings)
    whole = log_episodes(walk(), transitions=80, **settings)  # 16 episodes of 5 steps
    kept = [k for k in range(16) if (k + 1) % 4]
    rows = np.concatenate([np.arange(5 * k, 5 * k + 5) for k in kept])
    assert len(found["rewards"]) == 60
    for name in found:
        index = kept if name == "episode_behaviours" else rows
        np.testing.assert_array_equal(found[name], whole[name][index], err_msg=name)
    assert log.dropped.count == 3  # the fourth, eighth and twelfth; the sixteenth is not begun


def registered(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str:
    """The id of a fragile environment that is made anew each time."""
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    cls: Any = type("Made", (Fragile,), settings)
    gymnasium.register("Fragile-v0", cls, max_episode_steps=5)
    return "Fragile-v0"


@pytest.mark.usefixtures("small")
def test_a_log_says_how_many_episodes_were_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    path = build_dataset(
        registered(monkeypatch),
        SPEC,
        path=tmp_path / "a.hdf5",
        config=CollectConfig(transitions=300, learners=ppo(0)),
        progress=said.append,
    )
    dataset = load_dataset(path, discount=0.99, spec=SPEC)
    dropped = dataset.metadata["dropped_episodes"]
    assert dropped in (19, 20, 21)  # one in four of all
    words = f"{dropped} of {dropped + dataset.episodes} episodes were left out"
    assert words in dataset.metadata["warning"]
    assert any(f"warning: {words}" in text and "did not converge" in text for text in said)


@pytest.mark.promise("R11")
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["a.hdf5", "a.npz", "folder"])
def test_what_was_logged_before_an_environment_broke_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # The trial has 20 episodes, the pilot of one behaviour 20, and of the log 60 come to an end.
    env_id = registered(monkeypatch, period=10**9, until=100)
    config = CollectConfig(transitions=3000, learners=ppo(0))
    for attempt in ("", "1"):
        with pytest.raises(EnvError, match=r"10 episodes in a row.*converge.*are kept") as caught:
            build_dataset(env_id, SPEC, path=tmp_path / name, config=config)
        stem, dot, suffix = name.partition(".")
        kept = tmp_path / f"{stem}-unfinished{attempt}{dot}{suffix}"
        assert f'The 300 transitions logged by then are kept: "{kept}"' in str(caught.value)
        assert load_dataset(kept, discount=0.99, spec=SPEC).episodes == 60
    assert not (tmp_path / name).exists()


@pytest.mark.usefixtures("small")
def test_ctrl_c_keeps_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Fragile):
        def step(self, action: Any) -> Any:
            if self.episodes == 50:
                raise KeyboardInterrupt
            return super().step(action)

    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    cls: Any = Interrupted
    gymnasium.register("Interrupted-v0", cls, max_episode_steps=5)
    monkeypatch.setattr(Fragile, "period", 10**9)
    config = CollectConfig(transitions=3000, learners=ppo(0))
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        build_dataset(
            "Interrupted-v0", SPEC, path=tmp_path / "a.hdf5", config=config, progress=said.append
        )
    kept = load_dataset(tmp_path / "a-unfinished.hdf5", discount=0.99, spec=SPEC)
    assert kept.episodes == 9  # 20 of the trial, 20 of the pilot, and the one that was cut off
    assert "broken off" in kept.metadata["warning"]
    assert "The 45 transitions logged by then are kept" in said[-1]


@pytest.mark.usefixtures("small")
def test_an_environment_that_cannot_be_closed_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closes(_env: Any) -> None:
        raise RuntimeError("no connection to close")

    env_id = registered(monkeypatch, period=10**9, close=closes)
    config = CollectConfig(transitions=300, learners=ppo(100), workers=1)
    words = r'Closing "Fragile-v0" failed: RuntimeError: no connection.*Nothing is lost'
    with pytest.warns(UserWarning, match=words):
        path = build_dataset(env_id, SPEC, path=tmp_path / "a.hdf5", config=config)
    assert len(load_dataset(path, discount=0.99, spec=SPEC).rows) >= 300


@pytest.mark.usefixtures("small")
def test_an_environment_that_never_works_stops_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    env_id = registered(monkeypatch, period=1)
    with pytest.raises(EnvError, match="10 episodes in a row"):
        build_dataset(
            env_id,
            SPEC,
            path=tmp_path / "a.hdf5",
            config=CollectConfig(transitions=300, learners=ppo(600)),
            progress=said.append,
        )
    assert said == []
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small")
def test_an_unfinished_default_dataset_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path))
    env_id = registered(monkeypatch, period=10**9, until=100)
    config = CollectConfig(transitions=3000, learners=ppo(0))
    with pytest.raises(EnvError, match="are kept"):
        default_dataset(env_id, config=config)
    (kept,) = tmp_path.glob("*-unfinished.hdf5")
    spec = gymnasium.envs.registration.registry[env_id]
    spec.entry_point.until = 10**9  # type: ignore[union-attr]
    path = default_dataset(env_id, config=config)
    assert path != kept
    assert len(load_dataset(path, discount=0.99, spec=SPEC).rows) >= 3000


@pytest.mark.parametrize(
    "key",
    [
        "transitions=0",
        "workers=0",
        "unsafe_share=1.5",
        "unsafe_share=nan",
        "pilot_share=0",
        "learners.ppo.steps=-1",
        "learners.ppo.epochs=0",
        "training_steps=5",  # unknown
        "learners.ppo.epoch=5",
    ],
)
def test_bad_settings(key: str) -> None:
    with pytest.raises(ConfigError):
        load_config(CollectConfig, section="collect", env_id="", overrides=[key])


def test_default_dataset_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def fake(env_id: str, spec: SafetySpec, *, path: Path, config: Any, progress: Any) -> Path:
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
    assert default_dataset(config=CollectConfig(workers=1)) == first  # nor this
    assert default_dataset(config=CollectConfig(transitions=5)) != first
    assert len(built) == 4
    # A change of any source file builds a new log.
    read = Path.read_bytes
    for name in module.SOURCES:

        def changed(path: Path, name: str = name) -> bytes:
            return read(path) + b"#" * (path.name == name)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", changed)
            default_dataset()
    assert len(built) == len(set(built)) == 4 + len(module.SOURCES)


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
