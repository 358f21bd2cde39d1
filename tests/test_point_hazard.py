import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from safe_offrl.envs.point_hazard import (
    ACCELERATION,
    GOAL,
    HAZARDS,
    PointHazardEnv,
    scripted_behaviours,
)


def test_gymnasium_accepts_it() -> None:
    env = gymnasium.make("safe_offrl.envs:PointHazard-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    assert env.spec is not None
    assert env.spec.max_episode_steps == 100


def placed(x: float, y: float) -> PointHazardEnv:
    """The environment with the point at rest at (x, y)."""
    env = PointHazardEnv()
    env.reset(seed=0)
    env._x, env._y, env._vx, env._vy = x, y, 0.0, 0.0
    return env


@pytest.mark.parametrize(("x", "y", "radius"), HAZARDS)
def test_touching_a_hazard_is_an_accident_and_ends_the_episode(
    x: float, y: float, radius: float
) -> None:
    still = np.zeros(2, dtype=np.float32)
    # Process noise (.006) moves a point at rest by much less than .03 in one step.
    *_, terminated, truncated, info = placed(x - radius + 0.03, y).step(still)
    assert (terminated, truncated, info["cost"]) == (True, False, 1.0)
    *_, terminated, truncated, info = placed(x - radius - 0.03, y).step(still)
    assert (terminated, truncated, info["cost"]) == (False, False, 0.0)


def test_arriving_ends_the_episode_without_accident() -> None:
    *_, terminated, _, info = placed(*GOAL).step(np.zeros(2, dtype=np.float32))
    assert (terminated, info["cost"], info["is_success"]) == (True, 0.0, True)


def test_the_reward_is_the_progress_made_less_the_time_it_took() -> None:
    env = placed(-0.85, 0.5)
    rewards = [env.step(np.array([1.0, 0.0], dtype=np.float32))[1] for _ in range(10)]
    before, after = np.hypot(GOAL[0] + 0.85, 0.5), np.hypot(GOAL[0] - env._x, GOAL[1] - env._y)
    assert sum(rewards) == pytest.approx(before - after - 10 * 0.01)
    assert sum(rewards) > 0.0
    assert env._vx == pytest.approx(ACCELERATION * sum(0.88**i for i in range(10)), abs=0.05)


def test_the_same_seed_gives_the_same_episode() -> None:
    def episode(seed: int) -> list[float]:
        env = PointHazardEnv()
        env.reset(seed=seed)
        rng = np.random.default_rng(0)
        numbers: list[float] = []
        for _ in range(30):
            observation, reward, terminated, _, _ = env.step(rng.uniform(-1, 1, 2).astype("f4"))
            numbers += [*observation.tolist(), reward]
            if terminated:
                break
        return numbers

    assert episode(3) == episode(3)
    assert episode(3) != episode(4)


def test_rendering_is_an_image() -> None:
    env = PointHazardEnv(render_mode="rgb_array")
    env.reset(seed=0)
    image = env.render()
    assert image is not None
    assert (image.ndim, image.shape[2], image.dtype) == (3, 3, np.uint8)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) == 4  # ground, hazards, goal, point
    assert PointHazardEnv().render() is None


@pytest.mark.parametrize("name", list(scripted_behaviours()))
def test_scripted_behaviours_act_within_bounds_and_get_somewhere(name: str) -> None:
    factory = scripted_behaviours()[name]
    env = PointHazardEnv()
    returns = []
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        controller = factory(np.random.default_rng(seed))
        total = 0.0
        for _ in range(100):
            action = controller(observation)
            assert env.action_space.contains(action)
            observation, reward, terminated, _, _ = env.step(action)
            total += reward
            if terminated:
                break
        returns.append(total)
    assert np.mean(returns) > 0.2
