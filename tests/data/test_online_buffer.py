"""Whole episodes in the order they were played; state round trip bitwise."""

import pytest
import torch

from safe_offrl.data.online_buffer import OnlineBuffer
from safe_offrl.data.sampling import Reach, StratifiedSampler, n_step_costs
from safe_offrl.errors import DataError
from safe_offrl.types import Layout

LAYOUT = Layout(observation_size=2, action_size=1)  # D = 2*2 + 1 + 6 = 11


def numbered(*values: int) -> torch.Tensor:
    """Rows [n, D] whose every column holds the row's number."""
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1).expand(-1, LAYOUT.width).clone()


def stored(buffer: OnlineBuffer) -> list[int]:
    return [int(v) for v in buffer.rows[:, 0]]


def test_rows_stay_in_their_order_up_to_the_capacity() -> None:
    buffer = OnlineBuffer(LAYOUT, 4)
    assert buffer.size == 0
    assert buffer.rows.shape == (0, LAYOUT.width)
    buffer.append(numbered(0, 1, 2))
    buffer.append(numbered(3))
    assert stored(buffer) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="5 rows are more than the capacity of 4"):
        buffer.append(numbered(4))
    assert stored(buffer) == [0, 1, 2, 3]


def episodes(*lengths: int) -> list[torch.Tensor]:
    """Rows of episodes, random but for their times and accidents."""
    generator, found = torch.Generator().manual_seed(0), []
    for n in lengths:
        found.append(torch.rand(n, LAYOUT.width, generator=generator))
        batch = LAYOUT.unpack(found[-1])
        batch.time_to_go[:] = 1.0 - torch.arange(n) / 20
        batch.accidents.round_()
    return found


def test_what_is_derived_as_episodes_come_is_what_all_of_them_at_once_give() -> None:
    one, other = (OnlineBuffer(LAYOUT, 50, reaches=[Reach(3, 0.9)]) for _ in range(2))
    played = episodes(7, 1, 1, 12, 3)
    for episode in played:
        one.append(episode)
    other.append(torch.cat(played))
    firsts = torch.stack([LAYOUT.unpack(episode).observations[0] for episode in played])
    for buffer in (one, other):
        assert torch.equal(buffer.start_observations, firsts)
        assert buffer.mean_episode_length(50) == 24 / 5
        assert [buffer.steps_of_recent(n) for n in (1, 2, 4, 5, 9)] == [3, 15, 17, 24, 24]
        generator = torch.Generator().manual_seed(1)
        batch, weights, spans = buffer.risk_sampler().draw(40, 0.25, generator)
        # The rule by which they were derived from all rows after every episode.
        starts = torch.tensor([0, 7, 8, 9, 21, 24])
        every = LAYOUT.unpack(buffer.rows)
        index, expected = StratifiedSampler(every.accidents).draw(
            40, 0.25, torch.Generator().manual_seed(1)
        )
        costs, lengths = n_step_costs(every.costs, starts, 3, 0.9)
        assert torch.equal(batch.costs, costs[index])
        assert torch.equal(spans, lengths[index])
        assert torch.equal(weights, expected)


def test_signals_are_kept_and_drawn_with_their_rows() -> None:
    layout = Layout(2, 1, ("hazards", "vases"))
    buffer = OnlineBuffer(layout, 8, reaches=[Reach(2, 0.5)])
    rows = torch.zeros(3, layout.width)
    batch = layout.unpack(rows)
    assert batch.signals is not None
    batch.signals[:] = torch.tensor([[1.0, 0.0], [2.0, 8.0], [4.0, 0.0]])
    batch.time_to_go[:] = torch.tensor([1.0, 0.9, 0.8])
    batch.observations[:] = torch.arange(3.0).unsqueeze(1)
    buffer.append(rows)
    drawn, _, _ = buffer.risk_sampler().draw(50, 0.0, torch.Generator().manual_seed(0))
    assert drawn.signals is not None
    # 1 + 2/2, 2 + 4/2, 4; 0 + 8/2, 8, 0.
    expected = torch.tensor([[2.0, 4.0], [4.0, 8.0], [4.0, 0.0]])
    assert torch.equal(drawn.signals, expected[drawn.observations[:, 0].long()])
    again = OnlineBuffer(layout, 8, reaches=[Reach(2, 0.5)])
    again.load_state_dict(buffer.state_dict())
    assert torch.equal(again.rows, rows)
    with pytest.raises(DataError, match="does not fit"):
        OnlineBuffer(LAYOUT, 8).load_state_dict(buffer.state_dict())


def test_each_reach_has_its_own_sums() -> None:
    buffer = OnlineBuffer(LAYOUT, 8, reaches=[Reach(), Reach(2, 0.5)])
    rows = torch.zeros(3, LAYOUT.width)
    batch = LAYOUT.unpack(rows)
    batch.costs[:] = torch.tensor([1.0, 2.0, 4.0])
    batch.time_to_go[:] = torch.tensor([1.0, 0.9, 0.8])
    batch.observations[:] = torch.arange(3.0).unsqueeze(1)
    buffer.append(rows)
    # One step: 1, 2, 4. Two: 1 + 2/2, 2 + 4/2, 4 (of one step, the last).
    for k, (costs, spans) in enumerate(
        (([1.0, 2.0, 4.0], [1, 1, 1]), ([2.0, 4.0, 4.0], [2, 2, 1]))
    ):
        drawn, _, found = buffer.risk_sampler(k).draw(50, 0.0, torch.Generator().manual_seed(0))
        at = drawn.observations[:, 0].long()
        assert torch.equal(drawn.costs, torch.tensor(costs)[at])
        assert torch.equal(found, torch.tensor(spans)[at])


def handed(*rows: int, of: int) -> torch.Tensor:
    flags = torch.zeros(of, dtype=torch.bool)
    flags[list(rows)] = True
    return flags


def two_episodes() -> torch.Tensor:
    """Rows of four steps and of three, which cost 1, 2, 4, 8 and 16, 32, 64."""
    rows = torch.zeros(7, LAYOUT.width)
    batch = LAYOUT.unpack(rows)
    batch.costs[:] = 2.0 ** torch.arange(7)
    batch.time_to_go[:] = torch.tensor([1.0, 0.9, 0.8, 0.7, 1.0, 0.9, 0.8])
    batch.observations[:] = torch.arange(7.0).unsqueeze(1)
    return rows


def spanned(buffer: OnlineBuffer, reach: int = 0) -> tuple[list[float], list[float]]:
    """Costs and spans of each row, as they are drawn."""
    batch, _, spans = buffer.risk_sampler(reach).draw(300, 0.0, torch.Generator().manual_seed(0))
    at = batch.observations[:, 0].long().tolist()
    costs = dict(zip(at, batch.costs.tolist(), strict=True))
    lengths = dict(zip(at, spans.tolist(), strict=True))
    rows = range(buffer.size)
    return [costs[row] for row in rows], [lengths[row] for row in rows]


def test_no_sum_of_costs_reaches_into_what_a_fallback_did() -> None:
    """Of three steps, not discounted; a row of the fallback's begins with its own cost."""
    buffer = OnlineBuffer(LAYOUT, 8, reaches=[Reach(3, 1.0), Reach()])
    buffer.append(two_episodes(), handed(2, 3, 5, of=7))
    # 1 + 2 | 4 | 8 || 16 | 32 + 64: the rows that follow a hand-over are the policy's again.
    assert spanned(buffer) == ([3, 2, 4, 8, 16, 96, 64], [2, 1, 1, 1, 1, 2, 1])
    # Of one step nothing is left out.
    assert spanned(buffer, 1) == ([1, 2, 4, 8, 16, 32, 64], [1] * 7)


def test_without_a_hand_over_sums_reach_as_far_as_ever() -> None:
    for flags in (None, handed(of=7)):
        buffer = OnlineBuffer(LAYOUT, 8, reaches=[Reach(3, 1.0)])
        buffer.append(two_episodes(), flags)
        assert spanned(buffer) == ([7, 14, 12, 8, 112, 96, 64], [3, 3, 2, 1, 3, 2, 1])
        assert list(buffer.state_dict()) == ["rows", "cursor", "starts"]


def test_an_episode_that_begins_with_a_hand_over() -> None:
    buffer = OnlineBuffer(LAYOUT, 8, reaches=[Reach(3, 1.0)])
    buffer.append(two_episodes(), handed(0, 4, of=7))
    assert spanned(buffer) == ([7, 14, 12, 8, 112, 96, 64], [3, 3, 2, 1, 3, 2, 1])


def test_who_acted_is_kept_and_comes_back() -> None:
    flags = handed(2, 3, 5, of=7)
    buffer = OnlineBuffer(LAYOUT, 9, reaches=[Reach(3, 1.0)])
    buffer.append(two_episodes()[:4], flags[:4])
    buffer.append(two_episodes()[4:], flags[4:])
    assert buffer.recent_hand_overs(4) == [True, False, True, False]
    assert buffer.recent_hand_overs(99) == flags.tolist()
    state = buffer.state_dict()
    assert torch.equal(state["handed_over"], flags)
    again = OnlineBuffer(LAYOUT, 9, reaches=[Reach(3, 1.0)])
    again.load_state_dict(state)
    more = torch.zeros(1, LAYOUT.width)
    LAYOUT.unpack(more).observations[:] = 7.0
    for one in (buffer, again):
        one.append(more)
        assert spanned(one)[1] == [2, 1, 1, 1, 1, 2, 1, 1]
    assert again.state_dict().keys() == buffer.state_dict().keys()
    assert torch.equal(again.state_dict()["handed_over"], handed(2, 3, 5, of=8))
    assert state["handed_over"].data_ptr() != buffer._handed_over.data_ptr()  # a copy


def test_what_a_fallback_did_is_no_visit_of_the_policy() -> None:
    """Rows 2, 3 and 5 of 7, two episodes of 4 and 3: rows 0, 1, 4 and 6 are the policy's own."""
    buffer = OnlineBuffer(LAYOUT, 9)
    buffer.append(two_episodes(), handed(2, 3, 5, of=7))
    own = {float(buffer.rows[row].sum()) for row in (4, 6)}
    assert len(own) == 2
    drawn = LAYOUT.pack(buffer.draw_recent(4, 200, torch.Generator().manual_seed(0)))
    assert {float(row.sum()) for row in drawn} == own
    seen = buffer.recent_visits(5, until_accident=False)
    assert seen.counted.tolist() == [0.0, 0.0, 1.0, 0.0, 1.0]
    assert seen.per_episode == 3.0  # of the second, which begins there, hand-overs included
    # Another episode has other rows.
    buffer.append(numbered(7, 8))
    assert buffer.recent_visits(5, until_accident=False).counted.tolist() == [
        1.0,
        0.0,
        1.0,
        1.0,
        1.0,
    ]
    drawn = LAYOUT.pack(buffer.draw_recent(4, 200, torch.Generator().manual_seed(0)))
    assert {float(row.sum()) for row in drawn} == {float(buffer.rows[i].sum()) for i in (6, 7, 8)}
    # Where a fallback acted in all, there is nothing else.
    other = OnlineBuffer(LAYOUT, 9)
    other.append(two_episodes(), handed(*range(7), of=7))
    assert other.recent_visits(5, until_accident=False).counted.tolist() == [1.0] * 5
    assert len(LAYOUT.pack(other.draw_recent(4, 20, torch.Generator().manual_seed(0)))) == 20


def test_a_state_without_hand_overs_leaves_none_behind() -> None:
    buffer, other = (OnlineBuffer(LAYOUT, 8, reaches=[Reach(3, 1.0)]) for _ in range(2))
    buffer.append(two_episodes(), handed(2, 3, 5, of=7))
    other.append(two_episodes())
    buffer.load_state_dict(other.state_dict())
    assert spanned(buffer) == spanned(other)
    assert buffer.recent_hand_overs(7) == [False] * 7
    assert buffer.state_dict().keys() == other.state_dict().keys()


def test_rows_is_a_view() -> None:
    buffer = OnlineBuffer(LAYOUT, 4)
    buffer.append(numbered(1, 2))
    assert buffer.rows.data_ptr() == buffer._store.data_ptr()


def test_state_round_trip_continues_identically() -> None:
    original, copy = OnlineBuffer(LAYOUT, 5), OnlineBuffer(LAYOUT, 5)
    original.append(numbered(0, 1))
    state = original.state_dict()
    copy.load_state_dict(state)
    for buffer in (original, copy):
        buffer.append(numbered(20, 21, 22))
    assert all(torch.equal(x, copy.state_dict()[k]) for k, x in original.state_dict().items())
    original.rows.zero_()
    assert state["rows"][:, 0].tolist() == [0.0, 1.0]  # a copy, not a view


def test_state_round_trip_when_partly_filled_and_when_empty() -> None:
    for n in (0, 2):
        original, copy = OnlineBuffer(LAYOUT, 5), OnlineBuffer(LAYOUT, 5)
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
        (torch.zeros(2, LAYOUT.width), 1),  # cursor inside the rows
        (torch.zeros(5, LAYOUT.width), 5),  # cursor outside
        (torch.zeros(5, LAYOUT.width), -1),
    ],
)
def test_foreign_state_is_refused(rows: torch.Tensor, cursor: int) -> None:
    with pytest.raises(DataError):
        OnlineBuffer(LAYOUT, 5).load_state_dict({"rows": rows, "cursor": torch.tensor(cursor)})


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        OnlineBuffer(LAYOUT, 0)
    with pytest.raises(ValueError, match="expected"):
        OnlineBuffer(LAYOUT, 2).append(torch.zeros(LAYOUT.width))
