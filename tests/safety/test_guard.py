"""The guard by hand: what is affordable, who acts where going on is not, and what a file keeps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from safe_offrl.errors import ConfigError
from safe_offrl.limits import Limit
from safe_offrl.policies.gaussian import GAUSSIAN
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import Actor, StackedMLP
from safe_offrl.policies.protocol import Vector
from safe_offrl.safety.critic import SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.guard import Guard, GuardConfig, Watch
from safe_offrl.safety.outlook import AccidentAhead, CostAhead

LEFT, RIGHT = -0.5, 0.5  # what the two fallbacks do
STEEP = 80.0  # weight of an action: of LEFT 1e-17 of the odds at 0, so next to nothing
COST = Limit("cost", 0.25, 100.0)  # 25 of 100
ACCIDENT = Limit("accident", 0.1, 1.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fallback(action: float) -> Actor:
    """A policy whose mean action is this, everywhere."""
    actor = Actor(1, 1, (), seeded())
    with torch.no_grad():
        weight, bias = actor.parameters()
        weight.zero_()
        bias.copy_(torch.tensor([math.atanh(action), 0.0]))
    return actor


def logit(p: float) -> float:
    return math.log(p / (1.0 - p))


def net_of(
    *bases: float, action: float = 0.0, observation: float = 0.0, time: float = 0.0
) -> StackedMLP:
    """A member sigmoid(base + observation o + time t + action a) for each base."""
    net = StackedMLP(len(bases), 3, (), layer_norm=True, generator=seeded()).requires_grad_(False)
    net.output.weight[:] = torch.tensor([observation, time, action])[:, None]
    net.output.bias[:] = torch.tensor(bases)[:, None, None]
    return net


def through(left: float, right: float) -> StackedMLP:
    """Of these values at the actions LEFT and RIGHT."""
    slope = (logit(right) - logit(left)) / (RIGHT - LEFT)
    return net_of(logit(left) - slope * LEFT, action=slope)


def watching_cost(net: StackedMLP, limit: float = 25.0, ahead: float = 20.0) -> Watch:
    return Watch("cost", limit, net, ahead, spends=True)


def watching_accidents(net: StackedMLP, limit: float = 0.1) -> Watch:
    return Watch("accident", limit, net, 1.0, spends=False)


def guard_of(*watches: Watch, caution: float = 1.0, until_end: bool = False) -> Guard:
    return Guard([fallback(LEFT), fallback(RIGHT)], watches, caution, until_end=until_end)


def v(value: float) -> Vector:
    return np.array([value], dtype=np.float32)


def instead(
    guard: Guard, spent: float = 0.0, *, action: float = 0.0, at: float = 0.0, left: float = 0.5
) -> float | None:
    """What the guard does instead of an action, None if it lets it pass."""
    taken = guard.take_over(v(at), left, v(action), {"cost": spent})
    if taken is None:
        return None
    assert taken.dtype == np.float32
    assert taken.shape == (1,)
    return round(float(taken[0]), 6)


# --- what is affordable ---


def test_what_is_spent_and_what_is_ahead_stay_strictly_below_the_limit() -> None:
    guard = guard_of(watching_cost(net_of(0.0), limit=16.0))  # half of 20 is ahead
    assert instead(guard, 5.99) is None
    assert instead(guard, 6.0) == LEFT
    assert instead(guard, 6.01) == LEFT


def test_of_an_accident_nothing_is_spent() -> None:
    """A half is ahead of the action, nothing of the fallback's."""
    net = net_of(0.0, action=STEEP)
    for spent in (0.0, 1000.0, math.inf, math.nan):
        assert instead(guard_of(watching_accidents(net, limit=0.51)), spent) is None
        assert instead(guard_of(watching_accidents(net, limit=0.5)), spent) == LEFT
        assert instead(guard_of(watching_accidents(net, limit=0.49)), spent) == LEFT


def test_of_an_accident_it_is_how_much_safer_the_fallback_is() -> None:
    """.4 is ahead of this action, .2 of the fallback's."""
    net = through(0.2, 0.4)
    assert instead(guard_of(watching_accidents(net, limit=0.19)), action=RIGHT) == LEFT
    assert instead(guard_of(watching_accidents(net, limit=0.21)), action=RIGHT) is None
    assert instead(guard_of(watching_accidents(net, limit=0.41)), action=RIGHT) is None


@pytest.mark.parametrize("action", [LEFT, 0.0, RIGHT, 1.0])
def test_where_the_fallback_is_in_as_much_danger_the_policy_acts(action: float) -> None:
    """.9 is ahead, nine times the limit, whatever is done; and where the fallback is worse."""
    assert instead(guard_of(watching_accidents(net_of(logit(0.9)))), action=action) is None
    worse = Guard([fallback(LEFT)], [watching_accidents(through(0.9, 0.5))])
    assert instead(worse, action=action) is None
    dear = watching_cost(net_of(logit(0.9)), limit=17.0)  # a cost is counted, whoever causes it
    assert instead(guard_of(dear), action=action) == LEFT


def test_it_is_compared_with_what_the_fallback_does() -> None:
    """RIGHT would be safer by .29 - .1, but is not what the fallback does."""
    accident = watching_accidents(through(0.6, 0.1))
    assert instead(guard_of(accident)) == RIGHT
    # LEFT costs .1 and is a danger of 6 limits, RIGHT costs 20 limits; 0 costs 9.9, of 25.
    cost = watching_cost(through(0.0001, 0.5), ahead=1000.0)
    assert instead(guard_of(cost, accident)) is None
    assert instead(guard_of(accident, cost)) is None
    assert instead(guard_of(cost, accident), 16.0) == LEFT  # that is too much


def test_until_the_end_what_counts_is_what_is_ahead_of_the_action() -> None:
    """Of accidents too, though the fallback's action is no safer."""
    for limit, taken in ((0.51, None), (0.5, LEFT), (0.49, LEFT)):
        watch = watching_accidents(net_of(0.0), limit)
        assert instead(guard_of(watch, until_end=True)) == taken
        assert instead(guard_of(watch)) is None


def test_caution_counts_what_is_ahead_of_a_cost_and_no_probability() -> None:
    cost = watching_cost(net_of(0.0), limit=26.0)  # 2 x 10 are ahead
    assert instead(guard_of(cost, caution=2.0), 5.99) is None
    assert instead(guard_of(cost, caution=2.0), 6.0) == LEFT
    assert instead(guard_of(cost), 15.99) is None
    accident = watching_accidents(net_of(0.0, action=STEEP), limit=0.51)
    assert instead(guard_of(accident, caution=2.0)) is None


def test_it_is_the_action_that_is_judged() -> None:
    guard = guard_of(watching_cost(net_of(0.0, action=1.0), limit=20.0))
    dear = 20.0 / (1.0 + math.exp(-0.8))  # 13.8 of 20
    assert instead(guard, 19.9 - dear, action=0.8) is None
    assert instead(guard, 20.1 - dear, action=0.8) is not None
    assert instead(guard, 20.1 - dear, action=-0.8) is None


def test_where_it_is_and_how_much_time_is_left_count() -> None:
    net = net_of(-10.0, observation=3.0, time=20.0, action=STEEP)
    guard = guard_of(watching_accidents(net, limit=0.5))
    assert instead(guard, at=1.0, left=0.34) is None  # -10 + 3 + 6.8 is below 0
    assert instead(guard, at=1.0, left=0.36) == LEFT
    assert instead(guard, at=-1.0, left=0.36) is None


def test_the_members_are_averaged_as_probabilities() -> None:
    """Of .1 and .9 the mean is .5; of their logits too, but not of .1 and .7."""
    net = net_of(logit(0.1), logit(0.7), action=STEEP)
    assert instead(guard_of(watching_accidents(net, limit=0.401))) is None
    assert instead(guard_of(watching_accidents(net, limit=0.399))) == LEFT


def test_one_limit_that_is_not_affordable_is_enough() -> None:
    cheap, safe = watching_cost(net_of(-9.0)), watching_accidents(net_of(-9.0))
    dear = watching_cost(net_of(9.0), limit=9.0)
    deadly = watching_accidents(net_of(9.0, action=STEEP))
    assert instead(guard_of(cheap, safe)) is None
    assert instead(guard_of(dear, safe)) == LEFT
    assert instead(guard_of(cheap, deadly)) == LEFT
    assert instead(guard_of(deadly, cheap)) == LEFT


@pytest.mark.parametrize("watch", [watching_cost, watching_accidents])
def test_what_is_not_a_number_is_not_affordable(watch: Any) -> None:
    guard = guard_of(watch(net_of(-9.0, action=0.1)))
    assert instead(guard) is None
    assert instead(guard, action=math.nan) == LEFT
    assert instead(guard_of(watch(net_of(math.nan)))) == LEFT


@pytest.mark.parametrize("spent", [math.inf, math.nan])
def test_nothing_is_affordable_where_infinitely_much_was_spent(spent: float) -> None:
    assert instead(guard_of(watching_cost(net_of(-9.0))), spent) == LEFT
    both = guard_of(watching_accidents(net_of(-9.0)), watching_cost(net_of(-9.0)))
    assert instead(both, spent) == LEFT


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_critic_that_is_very_sure_is_no_error(sign: float) -> None:
    """exp(200) is no float32."""
    assert (instead(guard_of(watching_cost(net_of(200.0 * sign), limit=19.0))) is None) == (
        sign < 0.0
    )


# --- who acts where going on is not affordable ---


@pytest.mark.parametrize(("values", "taken"), [((0.2, 0.4), LEFT), ((0.4, 0.2), RIGHT)], ids=str)
def test_the_fallback_that_leads_to_less(values: tuple[float, float], taken: float) -> None:
    assert instead(guard_of(watching_cost(through(*values))), 100.0) == taken
    guard = guard_of(watching_accidents(through(*values)))
    assert instead(guard, action=-taken) == taken  # .4 - .2 of .1
    assert guard.fallback_action(v(0.0), 0.5).tolist() == pytest.approx([taken])


def test_a_fallback_that_is_no_number_is_never_the_better_one() -> None:
    for order in (1, -1):
        guard = Guard([fallback(LEFT), fallback(math.nan)][::order], [watching_cost(net_of(0.0))])
        assert instead(guard, 100.0) == LEFT


def test_where_both_lead_to_the_same_the_first_acts() -> None:
    assert instead(guard_of(watching_cost(net_of(0.0))), 100.0) == LEFT


def test_they_are_compared_by_the_sum_of_their_shares_of_the_limits() -> None:
    """Of a cost of 20 ahead .2 or .4, of an accident .3 or .1."""

    def taken(cost_limit: float, accident_limit: float, caution: float = 1.0) -> float:
        cost = watching_cost(through(0.2, 0.4), cost_limit)
        accident = watching_accidents(through(0.3, 0.1), accident_limit)
        found = instead(guard_of(cost, accident, caution=caution), 100.0)
        assert found is not None
        return found

    # .2 + .3 is .4 + .1, so at an accident limit of 1 it is a draw.
    assert taken(20.0, 0.99) == RIGHT
    assert taken(20.0, 1.01) == LEFT
    # 2 (.2) + .6 is 2 (.4) + .2, at one of .5.
    assert taken(20.0, 0.49, caution=2.0) == RIGHT
    assert taken(20.0, 0.51, caution=2.0) == LEFT
    # So it is where the cost limit is half as high.
    assert taken(10.0, 0.49) == RIGHT
    assert taken(10.0, 0.51) == LEFT


def test_what_was_spent_does_not_choose_between_them() -> None:
    guard = guard_of(watching_cost(through(0.4, 0.2)), watching_accidents(net_of(-9.0)))
    for spent in (100.0, 1e9, math.inf):
        assert instead(guard, spent) == RIGHT


def test_the_most_probable_of_discrete_actions_is_taken() -> None:
    def choosing(*probabilities: float) -> Actor:
        actor = Actor(1, 3, (), seeded(), kind_for(discrete=True))
        with torch.no_grad():
            weight, bias = actor.parameters()
            weight.zero_()
            bias.copy_(torch.tensor(probabilities).log())
        return actor

    net = StackedMLP(1, 5, (), layer_norm=True, generator=seeded()).requires_grad_(False)
    net.output.weight[:] = torch.tensor([0.0, 0.0, 2.0, 1.0, 0.0])[:, None]  # 0 costs most
    net.output.bias[:] = 0.0
    guard = Guard([choosing(0.6, 0.3, 0.1), choosing(0.3, 0.6, 0.1)], [watching_cost(net)])
    dearest = np.array([1.0, 0.0, 0.0], np.float32)
    taken = guard.take_over(v(0.0), 0.5, dearest, {"cost": 25.0})
    assert taken is not None
    assert taken.tolist() == [0.0, 1.0, 0.0]
    assert guard.take_over(v(0.0), 0.5, dearest, {"cost": 7.0}) is None  # 20 sigmoid(2) is 17.6
    assert guard.take_over(v(0.0), 0.5, dearest, {"cost": 8.0}) is not None


# --- what it is made of ---


def critic_of(outlook: AccidentAhead | CostAhead) -> SafetyCritic:
    """Of the action 0: two plain members .5 and three that are pushed to about 1; of LEFT 0."""
    critic = SafetyCritic(1, 1, outlook, SafetyCriticConfig(hidden=()), seeded())
    with torch.no_grad():
        critic.net.output.weight.zero_()
        critic.net.output.weight[:, -1] = STEEP
        critic.net.output.bias[: critic.config.reference] = 0.0
        critic.net.output.bias[critic.config.reference :] = 20.0
    return critic


def test_a_watch_of_a_cost_counts_in_its_unit() -> None:
    watch = Watch.from_critic(COST, critic_of(CostAhead(200, 3.0, 0.9, 5)))
    assert (watch.constraint, watch.limit, watch.spends) == ("cost", 25.0, True)
    assert watch.ahead_at_one == pytest.approx(30.0)  # 3 in each of 1 / (1 - .9) steps
    assert instead(guard_of(watch), 9.9) is None  # 15 are ahead
    assert instead(guard_of(watch), 10.1) == LEFT


def test_a_watch_of_accidents_counts_probabilities() -> None:
    watch = Watch.from_critic(ACCIDENT._replace(share=0.51), critic_of(AccidentAhead(200)))
    assert (watch.constraint, watch.limit, watch.spends) == ("accident", 0.51, False)
    assert watch.ahead_at_one == 1.0
    assert instead(guard_of(watch)) is None
    assert instead(guard_of(watch._replace(limit=0.49))) == LEFT


def test_the_plain_members_have_the_say_unless_the_pushed_are_asked() -> None:
    critic = critic_of(AccidentAhead(200))
    limit = ACCIDENT._replace(share=0.6)
    assert instead(guard_of(Watch.from_critic(limit, critic))) is None
    assert instead(guard_of(Watch.from_critic(limit, critic, pushed=True))) == LEFT


def test_the_critic_is_frozen_when_the_watch_is_made() -> None:
    critic = critic_of(AccidentAhead(200))
    watch = Watch.from_critic(ACCIDENT._replace(share=0.51), critic)
    with torch.no_grad():
        critic.net.output.bias.fill_(20.0)
    assert instead(guard_of(watch)) is None
    assert not any(p.requires_grad for p in watch.net.parameters())
    assert all(p.requires_grad for p in critic.net.parameters())


def test_it_must_be_told_the_cost_where_a_limit_spends() -> None:
    cost, accident = watching_cost(net_of(0.0)), watching_accidents(net_of(0.0))
    assert guard_of(cost).spends
    assert guard_of(accident, cost).spends
    assert not guard_of(accident).spends


def test_held_to_other_limits_it_watches_those_that_it_watched() -> None:
    guard = guard_of(watching_cost(net_of(0.0)), watching_accidents(net_of(-9.0)))
    both = guard.held_to([ACCIDENT._replace(share=0.2), COST._replace(share=0.26)], GuardConfig())
    assert [(w.constraint, w.limit) for w in both.watches] == [("cost", 26.0), ("accident", 0.2)]
    assert both.fallbacks == guard.fallbacks
    assert both.caution == GuardConfig().caution == 2.0
    assert instead(both, 5.99) is None  # twice 10 are ahead
    assert instead(both, 6.0) == LEFT
    alone = guard.held_to([ACCIDENT], GuardConfig())
    assert [w.constraint for w in alone.watches] == ["accident"]
    assert instead(alone, 1e9) is None
    unwatched = guard_of(watching_accidents(net_of(-9.0))).held_to([COST, ACCIDENT], GuardConfig())
    assert [w.constraint for w in unwatched.watches] == ["accident"]
    assert [w.limit for w in guard.watches] == [25.0, 0.1]  # it stays as it was


@pytest.mark.parametrize("caution", [0.5, 0.99, -2.0, math.nan], ids=str)
def test_a_guard_that_hopes_for_the_best_is_refused(caution: float) -> None:
    with pytest.raises(ConfigError, match=r"guarding\.caution"):
        GuardConfig(caution=caution)
    assert GuardConfig(caution=1.0).caution == 1.0


# --- what a checkpoint keeps, and what it is known by ---


def deep(seed: int, *, members: int = 2, hidden: Sequence[int] = (8, 6)) -> StackedMLP:
    net = StackedMLP(members, 3 + 1 + 2, hidden, layer_norm=True, generator=seeded(seed))
    return net.requires_grad_(False)


def deep_guard(**changes: Any) -> Guard:
    """Of networks with hidden layers, of different sizes."""
    parts: dict[str, Any] = {
        "fallbacks": [Actor(3, 2, (7,), seeded(1)), Actor(3, 2, (5, 4), seeded(2))],
        "watches": [
            Watch("cost", 5.0, deep(3), 8.0, spends=True),
            Watch("accident", 0.6, deep(4, members=3, hidden=(5,)), 1.0, spends=False),
        ],
        "caution": 1.5,
        "until_end": False,
    }
    parts |= changes
    watches, caution = parts["watches"], parts["caution"]
    return Guard(parts["fallbacks"], watches, caution, until_end=parts["until_end"])


def restored(guard: Guard, **changes: Any) -> Guard:
    words = json.loads(json.dumps(guard.words())) | changes
    return Guard.restored(guard.tensors(), words, (3, 2), GAUSSIAN)


def taken(guard: Guard, steps: int = 200) -> list[list[float] | None]:
    """What it does instead of random actions, at random observations and costs."""
    rng, found = np.random.default_rng(0), []
    for _ in range(steps):
        observation, action = (rng.standard_normal(n, dtype=np.float32) for n in (3, 2))
        left, spent = rng.random(), {"cost": float(rng.uniform(-4.0, 3.0))}
        instead = guard.take_over(observation, left, np.tanh(action), spent)
        found.append(None if instead is None else instead.tolist())
    return found


def test_it_comes_back_from_a_checkpoint_as_it_was() -> None:
    guard = deep_guard()
    again = restored(guard)
    assert taken(again) == taken(guard)
    assert 40 < sum(action is None for action in taken(guard)) < 160
    assert len({tuple(action) for action in taken(guard) if action}) > 20
    assert again.words() == guard.words()
    assert again.sha256 == guard.sha256
    assert taken(restored(guard, caution=3.0)) != taken(guard)  # it is the words that are read


def test_its_tensors_are_its_own() -> None:
    guard = deep_guard()
    tensors = guard.tensors()
    assert all(name.startswith("guard/") for name in tensors)
    before = taken(guard)
    for tensor in tensors.values():
        tensor.zero_()
    assert taken(guard) == before


def test_whether_it_hands_back_is_kept() -> None:
    assert restored(deep_guard(until_end=True)).until_end
    assert not restored(deep_guard()).until_end


def test_the_hash_is_of_everything_that_it_does_anything_with() -> None:
    cost, accident = deep_guard().watches
    one, other = deep_guard().fallbacks
    others = {
        "caution": deep_guard(caution=1.6),
        "until the end": deep_guard(until_end=True),
        "limit": deep_guard(watches=[cost._replace(limit=5.1), accident]),
        "ahead": deep_guard(watches=[cost._replace(ahead_at_one=8.1), accident]),
        "spends": deep_guard(watches=[cost._replace(spends=False), accident]),
        "net": deep_guard(watches=[cost, accident._replace(net=deep(9, members=3, hidden=(5,)))]),
        "one watch": deep_guard(watches=[cost]),
        "fallback": deep_guard(fallbacks=[Actor(3, 2, (7,), seeded(9)), other]),
        "other fallback": deep_guard(fallbacks=[one, Actor(3, 2, (5, 4), seeded(9))]),
        "one fallback": deep_guard(fallbacks=[one]),
    }
    known = deep_guard().sha256
    assert deep_guard().sha256 == known
    hashes = {name: guard.sha256 for name, guard in others.items()}
    assert len({known, *hashes.values()}) == 1 + len(others), hashes
