"""Which version is handed over: chosen by what episodes did, by hand."""

import json

import pytest
import torch

from safe_offrl.compute.state import collect_state, restore_state
from safe_offrl.errors import ConfigError
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import Actor
from safe_offrl.safety.selection import Selection, SelectionConfig
from safe_offrl.safety.shield import Shield

COST = Limit("cost", 0.25, 100.0)  # 25 of at most 100
ACCIDENT = Limit("accident", 0.5, 1.0)


def actor_of(version: int) -> Actor:
    """A network that can be told from another version's."""
    return Actor(2, 1, [3], torch.Generator().manual_seed(version))


def selection(neighbours: int = 1, kept: int = 8, limits: tuple[Limit, ...] = (COST,)) -> Selection:
    return Selection(SelectionConfig(neighbours=neighbours, kept=kept), limits)


def acts(
    chosen: Selection, version: int, *episodes: tuple[float, float], testing: bool = False
) -> None:
    """Episodes of a version, (return, cost); under two limits every cost is an accident."""
    for episode_return, cost in episodes:
        outcomes = [limit.outcome(cost > 0.0, cost) for limit in chosen._limits]
        chosen.see(
            version,
            actor_of(version),
            Shield.abstaining(),
            episode_return,
            outcomes,
            testing=testing,
        )


def version_of(chosen: Selection, *, last: bool = False, exceeded: bool = False) -> int | None:
    found = chosen.choose(last=last, exceeded=exceeded)
    if found is None:
        return None
    assert all(map(torch.equal, found.actor.parameters(), actor_of(found.version).parameters()))
    return found.version


def test_evidence_is_pooled_over_neighbours() -> None:
    """Versions 0, 1, 2, 3 with one, two, one, one episode; neighbours are one place away."""
    chosen = selection()
    for version, played in enumerate([[(1, 10)], [(2, 20), (4, 0)], [(8, 40)], [(16, 80)]]):
        if version:
            chosen.moved(back=False)
        acts(chosen, version, *played)
    expected = {0: (3, 7, 30), 1: (4, 15, 70), 2: (4, 30, 140), 3: (2, 24, 120)}
    for place, (episodes, returns, cost) in expected.items():
        found = chosen.around(place)
        assert found.returns[:2] == (episodes, returns)
        assert [sums.mean for sums in found.outcomes] == pytest.approx([cost / 100 / episodes])


def test_the_highest_return_that_keeps_the_limit_is_chosen() -> None:
    chosen = selection(neighbours=0)
    acts(chosen, 0, *[(5, 0)] * 3)
    chosen.moved(back=False)
    acts(chosen, 1, *[(9, 25)] * 3)  # at the limit, which it keeps
    chosen.moved(back=False)
    acts(chosen, 2, *[(20, 26)] * 3)  # beyond it
    chosen.moved(back=False)
    acts(chosen, 3, (30, 0), (30, 0))  # two episodes say nothing
    assert version_of(chosen) == 1
    assert version_of(chosen) is None  # it acts already
    assert chosen.words() == (
        "version 1: return 9, cost per episode 25 (limit 25) over 3 episodes of it and its "
        "neighbours"
    )


def test_an_episode_whose_end_nobody_saw_has_no_return() -> None:
    """It counts for the limits, as what it may have cost."""
    chosen = selection(neighbours=0)
    acts(chosen, 0, *[(-5, 0)] * 3)
    chosen.see(0, actor_of(0), Shield.abstaining(), None, [0.2], testing=False)
    found = chosen.around(0)
    assert (found.returns.mean, found.returns.episodes) == (-5.0, 3)
    assert (found.outcomes[0].mean, found.outcomes[0].episodes) == (0.05, 4)
    # Four of them say nothing of what a version is worth.
    chosen.moved(back=False)
    for _ in range(4):
        chosen.see(1, actor_of(1), Shield.abstaining(), None, [0.0], testing=False)
    assert version_of(chosen) == 0


def test_where_nobody_keeps_the_limit_the_nearest_to_it_is_chosen() -> None:
    chosen = selection(neighbours=0, limits=(COST, ACCIDENT))
    acts(chosen, 0, (1, 10), (4, 0), (7, 0), (4, 0))  # 5 and 25 %, with standard errors 50
    assert list(chosen._rank(0)) == pytest.approx([True, 4.0 - 1.5**0.5])
    acts(chosen, 0, (4, 10))  # 40 % and its standard error of 24 are beyond the limit
    assert list(chosen._rank(0)) == pytest.approx([False, 1.0 - 0.64495 / 0.5], rel=1e-4)
    chosen = selection(neighbours=0, limits=(COST, ACCIDENT))
    acts(chosen, 0, *[(90, 80)] * 3)  # 80 and 100 %: 2.2 limits too much
    chosen.moved(back=False)
    acts(chosen, 1, *[(9, 60)] * 3)  # 60 and 100 %: 1.4
    chosen.moved(back=False)
    acts(chosen, 2, *[(95, 10)] * 3)  # 10 and 100 %: one limit too much, though it keeps one
    assert version_of(chosen) is None
    chosen.moved(back=False)
    # 12 and, with a standard error of 16, 56 %: the nearest.
    acts(chosen, 3, *[(1, 30)] * 4, *[(1, 0)] * 6)
    assert version_of(chosen) is None


def test_tests_change_the_choice_and_the_last_one_is_among_the_tested() -> None:
    chosen = selection(neighbours=0)
    acts(chosen, 0, *[(5, 0)] * 3)
    chosen.moved(back=False)
    acts(chosen, 1, *[(8, 0)] * 3)
    chosen.moved(back=False)
    acts(chosen, 2, *[(9, 0)] * 3)
    assert version_of(chosen) is None
    assert chosen.tested == 0
    acts(chosen, 2, (1, 0), testing=True)  # 28 of 4: 7
    assert chosen.tested == 1
    assert version_of(chosen, last=True) is None  # none of the others was tested
    assert version_of(chosen) == 1
    acts(chosen, 1, (0, 0), testing=True)  # 24 of 4: 6, still more than the 5 of version 0
    assert version_of(chosen, last=True) == 2


def test_what_an_alarm_speaks_of_is_not_chosen_again() -> None:
    chosen = selection(neighbours=0)
    acts(chosen, 0, *[(5, 0)] * 3)
    assert version_of(chosen, exceeded=True) is None  # there is no other one
    chosen.moved(back=False)
    acts(chosen, 1, *[(8, 0)] * 3)
    assert version_of(chosen, exceeded=True) == 0
    assert version_of(chosen) is None


def test_what_was_put_back_stands_apart() -> None:
    """What it left, and what comes after it, are no neighbours of each other."""
    chosen = selection(neighbours=1)
    acts(chosen, 0, (1, 0))
    chosen.moved(back=False)
    acts(chosen, 1, (1, 100))
    chosen.moved(back=True)
    acts(chosen, 2, (1, 0))
    chosen.moved(back=False)
    acts(chosen, 3, (1, 0))
    assert [chosen.around(place).returns.episodes for place in (0, 1, 3, 4)] == [2, 2, 2, 2]
    assert chosen.around(3).outcomes[0].mean == 0.0
    # So it is where the version that was put back did not act before another one came.
    chosen = selection(neighbours=1)
    acts(chosen, 0, (1, 100))
    chosen.moved(back=True)
    chosen.moved(back=False)
    acts(chosen, 2, (1, 0))
    assert chosen.around(3).returns.episodes == 1


def test_only_the_best_are_kept() -> None:
    """Of ten versions, each better than the one before up to the fifth, two and the neighbours."""
    chosen = selection(neighbours=1, kept=3)
    for version, value in enumerate([1, 2, 3, 4, 5, 4, 3, 2, 1, 0]):
        if version:
            chosen.moved(back=False)
        acts(chosen, version, *[(value, 0)] * 3)
        assert len(chosen._candidates) <= 3
    assert list(chosen._candidates) == [4, 8, 9]
    assert version_of(chosen) == 4
    acts(chosen, 4, (-90, 0), testing=True)  # the worst of all, but tested
    assert list(chosen._candidates) == [4, 8, 9]
    chosen = selection(neighbours=0, kept=2)
    acts(chosen, 0, *[(1, 0)] * 3, testing=True)
    for version in range(1, 5):
        chosen.moved(back=False)
        acts(chosen, version, *[(9, 0)] * 3)
    assert list(chosen._candidates) == [0, 4]


def test_a_resumed_choice_is_the_same() -> None:
    chosen = selection(neighbours=0, kept=3)
    for version, value in enumerate([1, 9, 3, 4]):
        if version:
            chosen.moved(back=False)
        acts(chosen, version, *[(value, 10)] * 3, testing=version == 3)
    resumed = selection(neighbours=0, kept=3)
    info = json.loads(json.dumps(chosen.info()))
    resumed.load(info, actor_of(77), Shield.abstaining())
    restore_state(resumed.parts(), collect_state(chosen.parts()))
    assert resumed.info() == chosen.info()
    assert resumed.tested == chosen.tested == 3
    assert version_of(resumed) == version_of(chosen) == 1


@pytest.mark.parametrize(
    "wrong", [{"share": 1.0}, {"share": -0.1}, {"neighbours": -1}, {"kept": 0}]
)
def test_a_selection_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="selection"):
        SelectionConfig(**wrong)  # type: ignore[arg-type]
