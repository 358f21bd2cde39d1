"""What a log takes: by hand, never more than was said, and said before anything begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from safe_offrl import commands
from safe_offrl.collect import log_plan
from safe_offrl.collect import sb3 as learners
from safe_offrl.collect.behaviours import scripted_behaviours
from safe_offrl.collect.build import build_dataset
from safe_offrl.collect.log_plan import (
    CollectConfig,
    bounded,
    duration,
    fitted,
    plan_log,
    spelt_out,
    steps_per_second,
)
from safe_offrl.collect.sb3 import LearnersConfig, PPOConfig, SACConfig, resolved, training_steps
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, EnvError
from safe_offrl.spec import SafetySpec

SPEC = SafetySpec()
taken: list[int] = []  # one entry for each step that was ever taken in Counted-v0


class Counted(gymnasium.Env[Any, Any]):
    """A walk of 30 steps that counts them; right of 1 is the accident."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space: gymnasium.spaces.Space[Any] = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    discrete = False

    def __init__(self, **_: Any) -> None:
        pass

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.x = 0.0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        taken.append(1)
        push = float(int(action) - 1) if self.discrete else float(action[0])
        self.x += 0.1 * push + 0.1 * float(self.np_random.standard_normal())
        over = self.x > 1.0
        return np.array([self.x], np.float32), self.x, over, False, {"cost": float(over)}


class CountedDiscrete(Counted):
    action_space = gymnasium.spaces.Discrete(3)
    discrete = True


gymnasium.register("Counted-v0", Counted, max_episode_steps=30)
gymnasium.register("CountedDiscrete-v0", CountedDiscrete, max_episode_steps=30)


@pytest.mark.parametrize(
    ("steps", "rollout", "expected"),
    [
        # Eight environments, 128 steps each: 1,024. Stages at 16,000, 40,000 and 80,000:
        # 16 rollouts are 16,384; 40 are 40,960; 79 are 80,896.
        (80_000, 128, 80_896),
        (1_000, 128, 3_072),  # one rollout a stage
        (3_072, 128, 3_072),
        (800, 16, 896),  # 160 is 2 rollouts of 128, 400 is 4, 800 is 7
    ],
)
def test_steps_of_a_training_by_hand(steps: int, rollout: int, expected: int) -> None:
    assert training_steps(PPOConfig(rollout=rollout), steps) == expected
    assert training_steps(SACConfig(), 100) == 104  # 24 of 20, 56 of 50, 104 of 100


def test_what_is_counted_is_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "PARALLEL_ENVS", 2)
    ppo = PPOConfig(steps=700, penalised_steps=300, rollout=32)
    config = LearnersConfig(ppo=ppo, sac=SACConfig(steps=90))
    config = resolved(config, SPEC, scripted=False, discrete=False)
    taken.clear()
    behaviours = learners.learnt_behaviours("Counted-v0", SPEC, config, seed=0)
    expected = learners.trainings(config, discrete=False)
    assert len(taken) == sum(expected)
    assert len(behaviours) == 3 * len(expected)


def test_a_plan_by_hand() -> None:
    config = CollectConfig(transitions=10_000, learners=LearnersConfig(cost_limits=(0.1, 0.2)))
    with make_env("Counted-v0", SPEC) as env:
        plan = plan_log(spelt_out(config, env, SPEC, 0), env, 0)
    # A plain training and two limited ones; of ten behaviours each has a pilot of 1,000 steps,
    # whose last episode may go on for 29, as may the log's.
    assert plan[:3] == (3 * 80_896, 10 * 1_029, 10_029)
    assert plan.total == sum(plan[:3]) + 100  # of the trial
    with make_env("Counted-v0", SPEC) as env:
        short = CollectConfig(transitions=10**7, learners=LearnersConfig(ppo=PPOConfig(steps=0)))
        assert plan_log(spelt_out(short, env, SPEC, 2), env, 2).pilot == 3 * 250 * 30


def test_discrete_actions_are_not_learnt_by_sac() -> None:
    config = CollectConfig(learners=LearnersConfig(sac=SACConfig(steps=5_000)))
    with make_env("CountedDiscrete-v0", SPEC) as env:
        whole = spelt_out(config, env, SPEC, 0)
        assert plan_log(whole, env, 0).trainings == 2 * 80_896
        assert whole.learners.ppo.epochs == 20
    with make_env("Counted-v0", SPEC) as env:
        assert plan_log(spelt_out(config, env, SPEC, 0), env, 0).trainings > 2 * 80_896
        assert spelt_out(config, env, SPEC, 0).learners.ppo.epochs == 5
        given = CollectConfig(learners=LearnersConfig(ppo=PPOConfig(epochs=3)))
        assert spelt_out(given, env, SPEC, 0).learners.ppo.epochs == 3


@pytest.mark.parametrize("steps", [250, 900, 3_000, 20_000, 100_000, 250_000])
def test_a_bound_is_kept_and_used(steps: int) -> None:
    config = CollectConfig(
        learners=LearnersConfig(sac=SACConfig(steps=20_000, penalised_steps=9_000))
    )
    with make_env("Counted-v0", SPEC) as env:
        whole = spelt_out(config, env, SPEC, 0)
        fitting = bounded(whole, env, 0, steps)
        total = plan_log(fitting, env, 0).total
    assert total <= steps
    # What is given is used, but for whole rollouts and for trainings that would be too short.
    assert total >= 0.55 * steps
    ppo = fitting.learners.ppo
    assert ppo.steps == 0 or ppo.steps >= 3 * 8 * 16
    assert fitting.transitions < whole.transitions
    if steps >= 100_000:  # one factor for all
        factor = fitting.transitions / whole.transitions
        assert ppo.steps == pytest.approx(factor * 80_000, abs=1)
        assert ppo.penalised_steps == pytest.approx(factor * 80_000, abs=1)


def test_what_fits_is_left_alone_and_what_never_fits_is_refused() -> None:
    with make_env("Counted-v0", SPEC) as env:
        whole = spelt_out(CollectConfig(), env, SPEC, 0)
        total = plan_log(whole, env, 0).total
        assert bounded(whole, env, 0, total) == whole
        assert bounded(whole, env, 0, total - 1) != whole
        # One episode of the random behaviour's pilot, one of the log, and the trial.
        assert plan_log(bounded(whole, env, 0, 160), env, 0).total == 160
        with pytest.raises(ConfigError, match=r"159 steps are too few.*may take 160"):
            bounded(whole, env, 0, 159)


@pytest.mark.parametrize("env_id", ["Counted-v0", "CountedDiscrete-v0"])
@pytest.mark.parametrize("steps", [400, 4_000])
def test_a_bounded_log_takes_no_more_and_says_so(tmp_path: Path, env_id: str, steps: int) -> None:
    said: list[str] = []
    taken.clear()
    path = build_dataset(
        env_id,
        SPEC,
        path=tmp_path / "log.hdf5",
        config=CollectConfig(workers=1),
        steps=steps,
        progress=said.append,
    )
    assert 0.4 * steps <= len(taken) <= steps
    assert said[0].startswith("plan: ")
    assert "steps a second, learning apart" in said[0]
    assert said[1].startswith(f"bounded to {steps:,} steps: ")
    assert "instead of 100,000" in said[1]
    assert len(load_dataset(path, discount=0.99, spec=SPEC).rows) > steps / 20


def test_minutes_are_steps_at_the_measured_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_plan, "steps_per_second", lambda env: 50.0)
    said: list[str] = []
    taken.clear()
    commands.collect_run(
        env="Counted-v0", out=tmp_path / "log.hdf5", minutes=0.5, workers=1, say=said.append
    )
    assert said[1].startswith("bounded to 1,500 steps: ")  # 30 seconds, 50 a second
    assert len(taken) <= 1_500
    # The whole: 2 x 80,896 of trainings, 7 x (14,286 + 29) steps of the pilot, but at most 250
    # episodes of 30 each, 100,029 of the log and 100 of the trial: 314,421 at 50 a second.
    assert said[1].endswith("which take 314,421 steps in all, 1 h 45 min")


@pytest.mark.parametrize(("rate", "told"), [(5.0, True), (5000.0, False)])
def test_a_log_that_takes_long_says_how_to_bound_it(
    monkeypatch: pytest.MonkeyPatch, rate: float, told: bool
) -> None:
    monkeypatch.setattr(log_plan, "steps_per_second", lambda env: rate)
    said: list[str] = []
    config = CollectConfig(transitions=5_000, learners=LearnersConfig(ppo=PPOConfig(steps=0)))
    with make_env("Counted-v0", SPEC) as env:
        assert fitted(env, SPEC, config, 0, None, None, said.append).transitions == 5_000
    # 5,029 of the pilot, as many of the log, 100 of the trial: 34 minutes at 5 a second, or 2 s.
    assert ("; 34 min at 5 steps" if told else "; 2 s at 5,000 steps") in said[0]
    assert any("--minutes 30 --out FILE" in text for text in said) == told


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 900, "minutes": 1.0}, "--steps or --minutes"),
        ({"minutes": 0.0}, "above 0"),
        ({"minutes": float("nan")}, "above 0"),
        ({"steps": 10}, "too few"),
        ({"minutes": 1e-6}, "too few"),
    ],
)
def test_bounds_that_mean_nothing(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        commands.collect_run(env="Counted-v0", out=tmp_path / "log.hdf5", **given)
    assert not list(tmp_path.iterdir())


def test_the_default_dataset_has_no_bound() -> None:
    for given in ({"steps": 900}, {"minutes": 3.0}):
        with pytest.raises(ConfigError, match="Give --out"):
            commands.collect_run(env="Counted-v0", **given)


def test_speed_counts_resets_and_bears_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(
        "safe_offrl.collect.log_plan.time.perf_counter", lambda: next(clock) * 0.011
    )
    with make_env("Counted-v0", SPEC) as env:
        # A look at the clock a step; 2 seconds are over after 182 of them, but 100 steps before.
        # The first look is at the start, the last one at the end: 101 later, 100 / 1.111.
        assert steps_per_second(env) == pytest.approx(100 / (101 * 0.011), rel=0.02)

    class Broken(Counted):
        def step(self, action: Any) -> Any:
            raise ConnectionError("no simulator")

    with pytest.raises(EnvError, match=r"10 episodes in a row.*no simulator"):
        steps_per_second(AccidentEnv(Broken(), SafetySpec(horizon=9)))


def test_durations() -> None:
    assert [duration(x) for x in (0.2, 1.4, 59.6, 599.0, 3_599.0, 360_000.0)] == [
        *("less than a second", "1 s", "1 min 0 s", "9 min 59 s", "1 h 0 min", "100 h 0 min"),
    ]


def test_check_env_says_what_the_default_log_takes() -> None:
    said: list[str] = []
    found = commands.check_env_run("PointHazard-v0", episodes=3, say=said.append)
    with make_env("PointHazard-v0", SPEC) as env:
        scripted = len(scripted_behaviours(env))
        plan = plan_log(spelt_out(CollectConfig(), env, SPEC, scripted), env, scripted)
    assert found["log_steps"] == plan.total
    assert 0.0 < found["log_seconds"] < 600.0
    assert "default log" in said[0]
    assert f"up to {plan.total:,} steps" in said[0]
