"""Ends of episodes from the flags of a file, each rule with an answer derived by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from safe_offrl.data_formats.flags import Ends, settled_ends
from safe_offrl.errors import DataError


def flags(text: str) -> NDArray[np.bool_]:
    return np.array([mark == "1" for mark in text])


def shown(array: NDArray[np.bool_]) -> str:
    return "".join("01"[int(mark)] for mark in array)


def settled(horizon: int | None = None, breaks: str | None = None, **given: str) -> Ends:
    arrays = {key: flags(text) for key, text in given.items()}
    return settled_ends(arrays, None if breaks is None else flags(breaks), horizon)


def test_flags_that_say_all_are_taken_without_a_word() -> None:
    ends = settled(terminals="0100000", timeouts="0000100")
    assert (shown(ends.terminals), shown(ends.timeouts)) == ("0100000", "0000100")
    assert (ends.remarks, ends.unsure) == ([], "")


def test_an_end_that_is_marked_nowhere_is_a_cut_and_unsure() -> None:
    ends = settled(terminals="0100000", timeouts="0000001", breaks="0001000")
    assert shown(ends.timeouts) == "0001001"
    assert ends.remarks == [f"{ends.unsure}. Such an episode is taken to be cut there."]
    assert "1 end of episodes is marked neither in terminals nor in timeouts: row 3" in ends.unsure


def test_without_timeouts_breaks_or_the_horizon_say_where_an_episode_ends() -> None:
    ends = settled(terminals="010000000", breaks="000010000", horizon=3)
    assert shown(ends.timeouts) == "000010010"  # a break, and the third step after it
    ends = settled(terminals="01000000", breaks="00001000", horizon=9)
    assert shown(ends.timeouts) == "00001000"
    ends = settled(terminals="01000000", breaks="00001000")  # which need no horizon
    assert shown(ends.timeouts) == "00001000"
    ends = settled(terminals="01000000", horizon=3)
    assert shown(ends.timeouts) == "00001001"
    assert "no timeouts: an episode is taken to end after 3 steps" in ends.remarks[0]
    with pytest.raises(DataError, match="cut by a time limit"):
        settled(terminals="01000000")


def test_dones_stand_for_what_is_missing() -> None:
    ends = settled(dones="0010101", horizon=3)  # lengths 3, 2, 2
    assert (shown(ends.terminals), shown(ends.timeouts)) == ("0000101", "0010000")
    ends = settled(dones="0010101", terminals="0000100")
    assert (shown(ends.terminals), shown(ends.timeouts)) == ("0000100", "0010001")
    ends = settled(dones="0010101", timeouts="0010000")
    assert (shown(ends.terminals), shown(ends.timeouts)) == ("0000101", "0010000")
    ends = settled(dones="0010101", terminals="0000101", timeouts="0010000")
    assert (shown(ends.terminals), shown(ends.timeouts)) == ("0000101", "0010000")
    ends = settled(dones="0000101", terminals="0000101", horizon=3)  # old Gym's other meaning
    assert (shown(ends.terminals), shown(ends.timeouts)) == ("0000101", "0010000")


@pytest.mark.parametrize(
    "given",
    [
        {"dones": "0010001", "terminals": "0000101", "timeouts": "0010000"},
        {"dones": "0010001", "terminals": "0000101"},
    ],
)
def test_dones_that_contradict_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(DataError, match="contradict"):
        settled_ends({key: flags(text) for key, text in given.items()}, None, None)


def test_both_flags_are_a_time_limit_where_every_longest_episode_has_both() -> None:
    ends = settled(terminals="001001010", timeouts="001001000")  # lengths 3, 3, 2, 1 cut
    assert (shown(ends.terminals), shown(ends.timeouts)) == ("000000010", "001001000")
    assert (
        "2 rows are marked both in terminals and in timeouts, all of them on step 3"
        in (ends.remarks[0])
    )
    # Of one of several: a termination on the limit's very step, as Gymnasium marks it.
    ends = settled(terminals="001000010", timeouts="001001000")
    assert (shown(ends.terminals), shown(ends.timeouts)) == ("001000010", "000001000")
    assert ends.remarks == []
    # Before the limit it is neither.
    ends = settled(terminals="0100000", timeouts="0100001")
    assert (shown(ends.terminals), shown(ends.timeouts)) == ("0100000", "0000001")
    (said,) = ends.remarks
    assert said == "1 row is marked both in terminals and in timeouts: taken for terminated."


def test_terminations_that_are_a_time_limits_are_unsure() -> None:
    ends = settled(terminals="001001010", timeouts="000000000", horizon=3)
    assert ends.unsure.startswith("terminals mark the end of all 2 episodes of 3 steps")
    assert ends.remarks == [f"{ends.unsure}."]
    # The horizon says that there may be longer ones; a cut one of that length, that it is chance;
    # and an episode of one step has no time limit.
    assert settled(terminals="001001010", timeouts="000000000", horizon=4).unsure == ""
    many = "001" * 5  # which say it themselves where no horizon does
    assert settled(terminals=many, timeouts="0" * 15).unsure != ""
    assert settled(terminals=many, timeouts="0" * 15, horizon=4).unsure == ""
    assert settled(terminals="001000010", timeouts="000001000", horizon=3).unsure == ""
    assert settled(terminals="111111111", timeouts="000000000", horizon=1).unsure == ""


def test_dones_that_share_a_step_other_than_the_horizon_are_unsure() -> None:
    three = "001" * 3 + "01"
    assert settled(dones=three, horizon=9).unsure.startswith("terminals mark the end of all 3")
    assert settled(dones=three, horizon=3).unsure == ""  # there they are timeouts
    assert settled(dones="001001" + "01", horizon=9).unsure == ""  # two may be chance
