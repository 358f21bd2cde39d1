"""The ring: every slot reachable, wrapping exact, state round trip bitwise."""

import numpy as np
import pytest
import torch

from safe_offrl.data.storage import TransitionBuffer
from safe_offrl.errors import DataError
from safe_offrl.types import Layout

LAYOUT = Layout(observation_size=2, action_size=1)  # D = 2*2 + 1 + 6 = 11


def numbered(*values: int) -> torch.Tensor:
    """Rows [n, D] whose every column holds the row's number."""
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1).expand(-1, LAYOUT.width).clone()


def stored(buffer: TransitionBuffer) -> list[int]:
    return [int(v) for v in buffer.rows[:, 0]]


def test_rows_grow_then_the_oldest_are_overwritten() -> None:
    buffer = TransitionBuffer(LAYOUT, 4)
    assert buffer.size == 0
    assert buffer.rows.shape == (0, LAYOUT.width)
    buffer.append(numbered(0, 1, 2))
    assert stored(buffer) == [0, 1, 2]
    buffer.append(numbered(3, 4, 5))  # 3 fills the last slot; 4, 5 replace 0, 1
    assert stored(buffer) == [4, 5, 2, 3]
    assert buffer.size == 4


def test_exactly_full_wraps_to_the_first_slot() -> None:
    buffer = TransitionBuffer(LAYOUT, 3)
    buffer.append(numbered(0, 1, 2))
    buffer.append(numbered(3))
    assert stored(buffer) == [3, 1, 2]


def test_more_rows_than_capacity_keep_the_last() -> None:
    buffer = TransitionBuffer(LAYOUT, 3)
    buffer.append(numbered(9))
    buffer.append(numbered(0, 1, 2, 3, 4))
    assert sorted(stored(buffer)) == [2, 3, 4]
    buffer.append(numbered(5))  # must replace the oldest, 2
    assert sorted(stored(buffer)) == [3, 4, 5]


@pytest.mark.parametrize("capacity", [1, 2, 5, 7])
def test_any_sequence_of_appends_keeps_the_most_recent(capacity: int) -> None:
    generator = np.random.default_rng(capacity)
    buffer, written = TransitionBuffer(LAYOUT, capacity), 0
    for _ in range(60):
        n = int(generator.integers(0, 2 * capacity + 2))
        buffer.append(numbered(*range(written, written + n)))
        written += n
        expected = list(range(max(0, written - capacity), written))
        assert sorted(stored(buffer)) == expected


def test_rows_is_a_view() -> None:
    buffer = TransitionBuffer(LAYOUT, 4)
    buffer.append(numbered(1, 2))
    assert buffer.rows.data_ptr() == buffer._store.data_ptr()


def test_state_round_trip_continues_identically() -> None:
    original = TransitionBuffer(LAYOUT, 5)
    original.append(numbered(*range(7)))
    state = original.state_dict()
    copy = TransitionBuffer(LAYOUT, 5)
    copy.load_state_dict(state)
    for buffer in (original, copy):
        buffer.append(numbered(20, 21, 22))
    assert torch.equal(original.rows, copy.rows)
    assert stored(original) != [int(v) for v in state["rows"][:, 0]]  # a copy, not a view


def test_state_round_trip_when_partly_filled_and_when_empty() -> None:
    for n in (0, 2):
        original, copy = TransitionBuffer(LAYOUT, 5), TransitionBuffer(LAYOUT, 5)
        original.append(numbered(*range(n)))
        copy.append(numbered(90, 91, 92, 93))
        copy.load_state_dict(original.state_dict())
        assert copy.size == n
        original.append(numbered(7))
        copy.append(numbered(7))
        assert torch.equal(original.rows, copy.rows)


@pytest.mark.parametrize(
    ("rows", "cursor"),
    [
        (torch.zeros(6, LAYOUT.width), 0),  # too many rows
        (torch.zeros(2, LAYOUT.width + 1), 2),  # another layout
        (torch.zeros(2, LAYOUT.width), 1),  # cursor inside a part-filled ring
        (torch.zeros(5, LAYOUT.width), 5),  # cursor outside
        (torch.zeros(5, LAYOUT.width), -1),
    ],
)
def test_foreign_state_is_refused(rows: torch.Tensor, cursor: int) -> None:
    with pytest.raises(DataError):
        TransitionBuffer(LAYOUT, 5).load_state_dict({"rows": rows, "cursor": torch.tensor(cursor)})


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        TransitionBuffer(LAYOUT, 0)
    with pytest.raises(ValueError, match="expected"):
        TransitionBuffer(LAYOUT, 2).append(torch.zeros(LAYOUT.width))
