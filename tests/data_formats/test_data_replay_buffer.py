"""A real Stable-Baselines3 buffer: several environments, a full ring, time limits, no costs."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer

from safe_offrl.data_formats.hdf5 import write_dataset
from safe_offrl.data_formats.loading import assemble
from safe_offrl.data_formats.replay_buffer import from_replay_buffer
from safe_offrl.data_formats.stored import Raw
from safe_offrl.errors import DataError
from safe_offrl.spec import SafetySpec

BOX = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)


def filled(
    steps: int,
    size: int = 10,
    n_envs: int = 1,
    actions: gymnasium.Space[Any] = BOX,
    *,
    compact: bool = False,
) -> tuple[ReplayBuffer, np.ndarray]:
    """Each environment k counts 100 k + step; episodes of 3 are cut, but every second terminates.

    Returns the buffer and costs in its slots: the number of the step.
    """
    buffer = ReplayBuffer(
        size * n_envs,
        gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32),
        actions,
        n_envs=n_envs,
        optimize_memory_usage=compact,
        handle_timeout_termination=not compact,
    )
    costs = np.zeros((size, n_envs))
    base = 100.0 * np.arange(n_envs)[:, None]
    for t in range(steps):
        done = t % 3 == 2 or t % 6 == 4  # lengths 3 (cut), 2 (terminated), 1 (cut: step 5)
        cut = t % 3 == 2
        costs[buffer.pos] = t
        buffer.add(
            base + t,
            base + t + (0.5 if done else 1.0),  # the final observation is no step's first one
            np.full((n_envs, 1), t % 2),
            np.full(n_envs, float(t)),
            np.full(n_envs, done),
            [{"TimeLimit.truncated": cut}] * n_envs,
        )
    return buffer, costs


def test_one_environment_by_hand() -> None:
    buffer, costs = filled(7)
    arrays, metadata = from_replay_buffer(buffer, costs=costs, env_id="Count-v0", horizon=3)
    assert arrays["observations"][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert arrays["next_observations"][:, 0].tolist() == [1, 2, 2.5, 4, 4.5, 5.5, 7]
    assert arrays["rewards"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert arrays["costs"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert arrays["terminals"].tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert arrays["timeouts"].tolist() == [0, 0, 1, 0, 0, 1, 1]  # the last step is unfinished
    assert metadata["env_id"] == "Count-v0"
    assert metadata["horizon"] == 3
    assert (metadata["action_low"], metadata["action_high"]) == (-1.0, 1.0)  # as SB3 stores them


def test_environments_follow_each_other_and_do_not_merge() -> None:
    buffer, costs = filled(4, n_envs=2)
    arrays, _ = from_replay_buffer(buffer, costs=costs)
    assert arrays["observations"][:, 0].tolist() == [0, 1, 2, 3, 100, 101, 102, 103]
    # Step 3 begins an episode that the buffer does not end; step 100 is another environment's.
    assert arrays["timeouts"].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert arrays["next_observations"][3, 0] == 4


def test_a_full_ring_begins_with_its_first_whole_episode() -> None:
    buffer, costs = filled(13)  # steps 3 to 12 are left; 3 may be the middle of anything
    arrays, _ = from_replay_buffer(buffer, costs=costs)
    assert arrays["observations"][:, 0].tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert arrays["costs"].tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert arrays["terminals"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert arrays["timeouts"].tolist() == [1, 0, 0, 1, 0, 0, 1, 1]


def test_exactly_full() -> None:
    buffer, costs = filled(10)
    assert buffer.full
    assert buffer.pos == 0
    arrays, _ = from_replay_buffer(buffer, costs=costs)
    assert arrays["observations"][:, 0].tolist() == [3, 4, 5, 6, 7, 8, 9]


def test_compact_buffers_forget_final_observations_and_time_limits() -> None:
    buffer, costs = filled(7, compact=True)
    arrays, metadata = from_replay_buffer(buffer, costs=costs, horizon=3)
    # 2 and 5 are followed by the next episode's first state: their own stands in. 6 is the newest.
    assert arrays["next_observations"][:, 0].tolist() == [1, 2, 2, 4, 4, 5, 7]
    # The cut after one step (5) cannot be told from a termination any more.
    assert arrays["terminals"].tolist() == [0, 0, 0, 0, 1, 1, 0]
    assert arrays["timeouts"].tolist() == [0, 0, 1, 0, 0, 0, 1]
    assert "1 truncated episodes is not known" in metadata["warning"]
    with pytest.raises(DataError, match="time limit"):
        from_replay_buffer(buffer, costs=costs)


def test_a_compact_full_ring_leaves_out_the_slot_that_was_overwritten() -> None:
    buffer, costs = filled(13, compact=True)
    arrays, _ = from_replay_buffer(buffer, costs=costs, horizon=3)
    assert arrays["observations"][:, 0].tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert arrays["next_observations"][-1, 0] == 13


def test_discrete_actions_become_one_hot() -> None:
    buffer, costs = filled(4, actions=gymnasium.spaces.Discrete(3))
    arrays, metadata = from_replay_buffer(buffer, costs=costs)
    assert arrays["actions"].tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]]
    assert metadata["action_count"] == 3
    assert "action_low" not in metadata


def test_costs_are_asked_for_by_name() -> None:
    buffer, costs = filled(4, n_envs=2)
    with pytest.raises(DataError, match=r"holds no costs.*`costs`, an array \[10, 2\]"):
        from_replay_buffer(buffer)
    with pytest.raises(DataError, match=r"`costs` is \[10, 1\]"):
        from_replay_buffer(buffer, costs=costs[:, 0])
    for wrong in (np.float32(1.0), np.zeros(0), np.zeros((10, 2, 1)), "x"):
        with pytest.raises(DataError, match="`costs` is"):
            from_replay_buffer(buffer, costs=wrong)  # type: ignore[arg-type]
    buffer.costs = costs  # type: ignore[attr-defined]
    assert len(from_replay_buffer(buffer)[0]["costs"]) == 8


def test_what_holds_no_episode_is_refused() -> None:
    buffer, costs = filled(0)
    with pytest.raises(DataError, match="no episode from its beginning"):
        from_replay_buffer(buffer, costs=costs)
    buffer, costs = filled(7, size=2)  # the ring is shorter than an episode
    buffer.dones[:] = 0
    with pytest.raises(DataError, match="no episode from its beginning"):
        from_replay_buffer(buffer, costs=costs)


def test_dict_observations_are_refused() -> None:
    space = gymnasium.spaces.Dict({"a": BOX})
    with pytest.raises(DataError, match="dict observations"):
        from_replay_buffer(DictReplayBuffer(10, space, BOX), costs=np.zeros(10))


def test_it_can_be_written_and_loaded(tmp_path: Any) -> None:
    buffer, costs = filled(7)
    arrays, metadata = from_replay_buffer(buffer, costs=costs, horizon=3)
    write_dataset(tmp_path / "log.hdf5", arrays, metadata)
    dataset = assemble(Raw(arrays, metadata), discount=1.0, spec=SafetySpec(cost_threshold=4.0))
    assert dataset.transitions.accidents.tolist() == [0, 0, 0, 0, 0, 1, 1]
