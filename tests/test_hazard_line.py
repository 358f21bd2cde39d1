import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from safe_offrl.envs.hazard_line import (
    HazardLineEnv,
    Policy,
    accident_probability,
    accident_table,
    always,
)


def test_gymnasium_accepts_it() -> None:
    env = gymnasium.make("safe_offrl.envs:HazardLine-v0")
    check_env(env.unwrapped)
    assert env.spec is not None
    assert env.spec.max_episode_steps == 20


def test_dynamic_programming_by_hand_on_three_inner_positions() -> None:
    # Positions 0 (hazard) 1 2 3 4 (goal); action .625 moves right with (1 + .8 * .625) / 2 = 3/4.
    #   from 2 the hazard takes two moves left:     1/4 * 1/4               = 1/16    (steps 2, 3)
    #   or back at 2 after two steps, and then so:  (2 * 1/4 * 3/4) * 1/16  = 3/128   (step 4)
    #   from 1: at once 1/4; or right, left, left:  3/4 * 1/4 * 1/4         = 3/64    (step 3)
    #   from 3: three moves left:                   1/64                             (step 3)
    table = accident_table(always(0.625), horizon=4, size=5)
    expected: list[list[float]] = [
        [1, 0, 0, 0, 0],
        [1, 1 / 4, 0, 0, 0],
        [1, 1 / 4, 1 / 16, 0, 0],
        [1, 1 / 4 + 3 / 64, 1 / 16, 1 / 64, 0],
        [1, 1 / 4 + 3 / 64, 1 / 16 + 3 / 128, 1 / 64, 0],
    ]
    np.testing.assert_allclose(table, expected, atol=1e-12)
    mean = (1 / 4 + 3 / 64 + 1 / 16 + 1 / 64) / 3
    assert accident_probability(always(0.625), horizon=3, size=5) == pytest.approx(mean)


def test_only_the_mean_action_of_a_stochastic_policy_matters() -> None:
    mixed: Policy = lambda _: [(1.0, 0.6), (-0.25, 0.4)]  # noqa: E731  (mean .5)
    assert accident_probability(mixed, 20) == pytest.approx(accident_probability(always(0.5), 20))
    with pytest.raises(ValueError, match="do not sum to 1"):
        accident_probability(lambda _: [(1.0, 0.6)], 20)


def test_without_time_limit_it_is_gamblers_ruin() -> None:
    # P(ruin from x of n) = (r^x - r^n) / (1 - r^n), r = q / p; here p = .58, n = 6.
    r = 0.42 / 0.58
    ruin = [(r**x - r**6) / (1 - r**6) for x in (2, 3, 4)]
    assert accident_probability(always(0.2), horizon=2000) == pytest.approx(np.mean(ruin))


@pytest.mark.parametrize("action", [0.6, 0.2, -0.2])
def test_the_environment_agrees_with_dynamic_programming(action: float) -> None:
    env = HazardLineEnv()
    env.reset(seed=0)
    accidents, episodes, horizon = 0, 4000, 20
    for _ in range(episodes):
        env.reset()
        for _ in range(horizon):
            *_, terminated, _, info = env.step(np.array([action], dtype=np.float32))
            accidents += info["cost"] > 0
            if terminated:
                break
    exact = accident_probability(always(action), horizon)
    deviation = np.sqrt(exact * (1 - exact) / episodes)
    assert abs(accidents / episodes - exact) < 4 * deviation


def test_the_policy_may_depend_on_the_position() -> None:
    careful: Policy = lambda x: [(1.0 if x <= 2 else -1.0, 1.0)]  # noqa: E731
    # From 1 with P(right) = .9 everywhere below 3: one step, P(left) = .1.
    assert accident_table(careful, 1)[1].tolist() == pytest.approx([1, 0.1, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("size", [3, 6])
def test_sizes_without_a_middle_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="odd number"):
        HazardLineEnv(size=size)
