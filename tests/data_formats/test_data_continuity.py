"""Ends of episodes held against how observations move: what is certain, and what chance may do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from safe_offrl.data.derived import find_episodes
from safe_offrl.data_formats.complete import complete
from safe_offrl.data_formats.continuity import _ranks, _shifted, _stray_starts
from safe_offrl.data_formats.motion import copies_of_episodes, measure_motion
from safe_offrl.data_formats.names import ENDS
from safe_offrl.data_formats.stored import Raw
from safe_offrl.errors import DataError

Arrays = dict[str, NDArray[Any]]
EPISODES, LENGTH = 40, 15


def walks(seed: int = 0, *, linked: bool = True, start: float = 1.0) -> Arrays:
    """Random walks in the plane that begin anywhere in a square, cut after LENGTH steps."""
    rng = np.random.default_rng(seed)
    n = EPISODES * LENGTH
    first = start * rng.uniform(-1, 1, (EPISODES, 1, 2))
    steps = 0.05 * rng.standard_normal((EPISODES, LENGTH, 2))
    places = first + np.concatenate([0 * first, steps.cumsum(axis=1)], axis=1)
    arrays: Arrays = {
        "observations": places[:, :-1].reshape(n, 2).astype(np.float32),
        "next_observations": places[:, 1:].reshape(n, 2).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 1)).astype(np.float32),
        "rewards": rng.standard_normal(n).astype(np.float32),
        "costs": np.zeros(n, np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.arange(n) % LENGTH == LENGTH - 1,
    }
    if not linked:
        del arrays["next_observations"]
    return arrays


def settled(arrays: Arrays, **metadata: Any) -> Raw:
    return complete(arrays, metadata, horizon=LENGTH)


def episodes(raw: Raw) -> int:
    return len(find_episodes(raw.arrays).lengths)


@pytest.mark.parametrize("linked", [True, False])
def test_a_log_whose_ends_are_ends_passes_without_a_remark(linked: bool) -> None:
    """20 logs of 40 episodes: a false alarm in one of 10,000 would be seen in one of 500 runs."""
    for seed in range(20):
        raw = settled(walks(seed, linked=linked))
        assert raw.remarks == ()
        assert episodes(raw) == EPISODES


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("held", [3, LENGTH])
def test_a_flag_that_is_held_is_refused(linked: bool, held: int) -> None:
    arrays = walks(linked=linked)
    arrays["terminals"] = np.arange(len(arrays["rewards"])) % LENGTH >= LENGTH - held
    arrays["timeouts"][:] = False
    with pytest.raises(DataError, match=r"ends of episodes .terminals.*as if a flag were held"):
        settled(arrays)


def test_one_end_that_leads_on_is_certain_where_others_do_not() -> None:
    arrays = walks()
    arrays["timeouts"][7] = True
    with pytest.raises(DataError, match=r"1 of 40 ends .*timeouts; the first in row 7"):
        settled(arrays)
    raw = settled(arrays, ends="as marked")
    assert episodes(raw) == EPISODES + 1
    assert "as marked" in raw.remarks[0]
    with pytest.raises(DataError, match='only "as marked"'):
        settled(arrays, ends="believe me")


@pytest.mark.parametrize("linked", [True, False])
def test_a_plant_that_is_never_reset_says_so(linked: bool) -> None:
    """Days of one process: each begins where the one before ended."""
    arrays = walks(linked=linked)
    rng = np.random.default_rng(1)
    path = np.concatenate([[[0.0, 0.0]], 0.05 * rng.standard_normal((len(arrays["rewards"]), 2))])
    path = path.cumsum(axis=0).astype(np.float32)
    arrays["observations"] = path[:-1]
    if linked:
        arrays["next_observations"] = path[1:]
    with pytest.raises(DataError, match=r"goes on where they stop.*as if the log were cut"):
        settled(arrays)
    assert episodes(settled(arrays, ends="as marked")) == EPISODES


@pytest.mark.parametrize(("shift", "word"), [(1, "late"), (-1, "early")])
def test_shifted_flags_are_refused(shift: int, word: str) -> None:
    arrays = walks(linked=False)
    arrays["timeouts"] = np.roll(arrays["timeouts"], shift)
    with pytest.raises(DataError, match=f"a row {word}|goes on where they stop"):
        settled(arrays)
    linked = walks()
    linked["timeouts"] = np.roll(linked["timeouts"], shift)
    with pytest.raises(DataError, match="ends of episodes"):
        settled(linked)


def test_ends_that_are_not_marked_are_found_where_next_observations_are() -> None:
    arrays = walks() | {"episode_behaviours": np.arange(EPISODES // 2)}
    last = np.flatnonzero(arrays["timeouts"])
    arrays["timeouts"][last[::2]] = False
    raw = complete(arrays, {}, horizon=2 * LENGTH)
    assert episodes(raw) == EPISODES
    assert "20 ends of episodes are marked neither" in raw.remarks[0]
    assert raw.unsure
    # Each of the two pieces was logged by who logged the whole.
    assert raw.arrays["episode_behaviours"].tolist() == [k // 2 for k in range(EPISODES)]


def test_without_next_observations_missing_ends_are_certain_where_all_begin_at_one_place() -> None:
    arrays = walks(linked=False, start=0.0)
    arrays["observations"] += (
        np.linspace(0, 3, LENGTH)
        .astype(np.float32)
        .repeat(2)
        .reshape(LENGTH, 2)[np.arange(len(arrays["rewards"])) % LENGTH]
    )
    assert settled(arrays).remarks == ()
    arrays["timeouts"][np.flatnonzero(arrays["timeouts"])[::2]] = False
    with pytest.raises(DataError, match="as if terminals or timeouts were missing"):
        complete(arrays, {}, horizon=2 * LENGTH)


def test_rows_out_of_order_are_refused() -> None:
    arrays = walks()
    order = np.random.default_rng(0).permutation(len(arrays["rewards"]))
    with pytest.raises(DataError, match="not in order of time"):
        settled({key: array[order] for key, array in arrays.items()})
    # Two environments in turn.
    n = len(arrays["rewards"])
    turns = np.arange(n).reshape(2, n // 2).T.ravel()
    with pytest.raises(DataError, match="several environments in turn"):
        settled({key: array[turns] for key, array in arrays.items()})


def test_rows_in_reverse_are_refused_although_each_is_near_the_next() -> None:
    arrays = {key: array[::-1] for key, array in walks().items() if key != "timeouts"}
    with pytest.raises(DataError, match="in reverse order of time"):
        settled(arrays)


@pytest.mark.parametrize("linked", [True, False])
def test_a_first_row_that_goes_nowhere_is_remarked(linked: bool) -> None:
    arrays = walks(linked=linked)
    twice = np.sort(np.append(np.arange(EPISODES * LENGTH), np.arange(EPISODES) * LENGTH))
    added = {key: array[twice].copy() for key, array in arrays.items()}
    if linked:
        starts = np.arange(EPISODES) * (LENGTH + 1)
        added["next_observations"][starts] = added["observations"][starts]
    (said,) = complete(added, {}, horizon=LENGTH + 1).remarks
    assert said.startswith("the first row of 40 episodes leads to the same observation again")


def test_a_held_flag_shows_where_a_third_of_the_starts_share_one_place() -> None:
    """All 40 begin at 0; a flag on each last three rows makes 80 starts of their own."""
    arrays = walks(linked=False, start=0.0)
    arrays["observations"] += np.linspace(0, 3, LENGTH)[
        np.arange(len(arrays["rewards"])) % LENGTH, None
    ].astype(np.float32)
    step = np.arange(len(arrays["rewards"])) % LENGTH
    held = step >= LENGTH - 3
    motion = measure_motion(arrays)
    assert motion is not None
    off = np.zeros_like(held)
    (doubt,) = _stray_starts(arrays, motion, held, off)
    assert doubt.certain
    assert doubt.sentence.startswith("80 of 119 ends of episodes (terminals")
    assert _stray_starts(arrays, motion, step == LENGTH - 1, off) == []
    # Episodes that begin anywhere, far from where the one before ended, are no doubt.
    far = arrays["observations"].copy()
    far[np.flatnonzero(held)[:-1] + 1] += np.float32(9.0) * np.random.default_rng(0).choice(
        [-1, 1], (int(held.sum()) - 1, 2)
    )
    far[step == 0] = 0.0
    motion = measure_motion({"observations": far})
    assert motion is not None
    assert _stray_starts({"observations": far}, motion, held, off) == []


def test_starts_of_their_own_tell_also_where_no_end_leads_on() -> None:
    """A flag held into every second episode; what follows flagged rows is their own reading."""
    arrays = walks(start=0.0)
    row = np.arange(len(arrays["rewards"]))
    arrays["timeouts"] |= row % (2 * LENGTH) == 0
    flagged = arrays["timeouts"]
    arrays["next_observations"][flagged] = arrays["observations"][flagged]
    with pytest.raises(DataError, match=r"20 of 59 ends .*timeouts; the first in row 0"):
        settled(arrays)


def test_missing_rows_are_no_ends() -> None:
    arrays = {key: np.delete(array, [20, 200], axis=0) for key, array in walks().items()}
    raw = settled(arrays)
    assert episodes(raw) == EPISODES
    assert "2 rows within episodes (the first is row 19) lead near" in raw.remarks[0]


def test_next_observations_of_the_next_episode_are_replaced() -> None:
    arrays = walks()
    own = arrays["next_observations"].copy()
    arrays["next_observations"] = np.roll(arrays["observations"], -1, axis=0)
    raw = settled(arrays)
    last = np.flatnonzero(arrays["timeouts"])[:-1]
    np.testing.assert_array_equal(
        raw.arrays["next_observations"][last], arrays["observations"][last]
    )
    inner = np.setdiff1d(np.arange(len(own) - 1), last)
    np.testing.assert_array_equal(raw.arrays["next_observations"][inner], own[inner])
    assert "next_observations of 39 timeouts are those of the next" in raw.remarks[0]


def test_ranks_by_hand() -> None:
    """Ends at 0, starts at 1, 2, 3, 3: nearer are none, one, and two with half of a tie, twice."""
    starts = np.array([[1.0], [2.0], [3.0], [3.0]])
    ranks = _ranks(np.zeros((4, 1)), starts, rounding=1e-9)
    np.testing.assert_allclose(ranks, [0.0, 1 / 3, 2.5 / 3, 2.5 / 3])


def test_copies_of_episodes_are_counted_and_many_are_refused() -> None:
    arrays = walks()
    starts = np.arange(0, EPISODES + 1) * LENGTH
    assert copies_of_episodes(arrays, starts) == (0, 0)
    rows = np.append(np.arange(EPISODES * LENGTH), np.arange(2 * LENGTH))  # two of them again
    more = {key: array[rows] for key, array in arrays.items()}
    assert copies_of_episodes(more, np.append(starts, starts[1:3] + starts[-1])) == (2, 2)
    assert "2 of 42 episodes are copies of others" in settled(more).remarks[0]
    with pytest.raises(DataError, match="40 of 80 episodes are copies"):
        settled({key: np.concatenate([array, array]) for key, array in arrays.items()})


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_units_make_no_difference(unit: float) -> None:
    arrays = walks()
    motion = measure_motion(arrays)
    scaled = measure_motion(
        arrays | {key: unit * arrays[key] for key in ("observations", "next_observations")}
    )
    assert motion is not None
    assert scaled is not None
    np.testing.assert_allclose(scaled.jump, motion.jump, rtol=1e-4)
    assert scaled.apart == pytest.approx(motion.apart, rel=1e-4)


def test_what_never_changes_tells_nothing() -> None:
    arrays = walks()
    arrays["observations"][:] = arrays["next_observations"][:] = 7.0
    assert measure_motion(arrays) is None
    arrays["terminals"][:] = True
    assert not any("goes on" in text for text in settled(arrays).remarks)
    assert set(ENDS) == {"terminals", "timeouts", "dones"}


@pytest.mark.parametrize(("shift", "word"), [(1, "before"), (-1, "after")])
def test_flags_beside_the_jumps_are_remarked_where_all_begin_at_one_place(
    shift: int, word: str
) -> None:
    """Starts at one place are equally near to every end, so only the jumps tell."""
    arrays = walks(linked=False, start=0.0)
    along = np.linspace(0, 3, LENGTH)[np.arange(len(arrays["rewards"])) % LENGTH]
    arrays["observations"] += along.astype(np.float32)[:, None]
    arrays["timeouts"] = np.roll(arrays["timeouts"], shift)
    motion = measure_motion(arrays)
    assert motion is not None
    (doubt,) = _shifted(arrays, motion, arrays["timeouts"], "timeouts")
    late = "late" if shift > 0 else "early"
    assert doubt.certain == (shift > 0)  # the flags then stand where the log begins
    assert f"jumps a row {word} where timeouts mark ends" in doubt.sentence
    assert doubt.sentence.endswith(f"as if they were a row {late}")
    assert _shifted(arrays, motion, np.roll(arrays["timeouts"], -shift), "timeouts") == []


def test_a_horizon_that_no_episode_reaches_is_remarked() -> None:
    (said,) = complete(walks(), {}, horizon=2 * LENGTH).remarks
    assert said.startswith(f"timeouts cut 40 episodes after {LENGTH} steps and none is longer")
    assert complete(walks(), {}, horizon=LENGTH).remarks == ()


@pytest.mark.parametrize("following", ["true", "own", "of the row before"])
def test_where_every_row_is_an_end_next_observations_tell_nothing(following: str) -> None:
    arrays = walks()
    arrays["terminals"][:] = True
    if following != "true":
        own = arrays["observations"]
        arrays["next_observations"] = own if following == "own" else np.roll(own, 1, axis=0)
    with pytest.raises(DataError, match="set on all of them"):
        settled(arrays)
    order = np.random.default_rng(0).permutation(len(own := arrays["observations"]))
    arrays["observations"] = own[order]  # visits of a bandit
    assert settled(arrays).remarks == ()
