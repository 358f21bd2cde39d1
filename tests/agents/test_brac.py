"""BRAC: losses by hand, which KL it is, and whose critics pay for it."""

import math
from typing import Any

import pytest
import torch

from safe_offrl.agents.brac import BRAC, BRACConfig, BRACValue
from safe_offrl.agents.steering import Penalty
from safe_offrl.compute.state import seeded
from tests.agents.setups import setup_of
from tests.agents.small_problems import bandit, drawn_from, trained
from tests.agents.test_agents import (
    MEMBERS,
    NO_NOISE,
    TableNetworks,
    discrete_batch,
    discrete_networks,
)

POLICY, BEHAVIOUR = (0.5, 0.3, 0.2), (0.2, 0.2, 0.6)
REVERSE = sum(p * math.log(p / b) for p, b in zip(POLICY, BEHAVIOUR, strict=True))  # .360
FORWARD = sum(b * math.log(b / p) for p, b in zip(POLICY, BEHAVIOUR, strict=True))  # .395


def tables(agent: type[BRAC] | type[BRACValue], **settings: Any) -> tuple[BRAC, TableNetworks]:
    """Three actions: Q = (1, -2, 4), the least target (1, 2, 3), of which E_pi is 1.7."""
    networks = discrete_networks(POLICY, (1.0, -2.0, 4.0), [(1.0, 5.0, 3.0), (4.0, 2.0, 9.0)])
    found = agent(setup_of(networks, seeded(0)), BRACConfig(discount=0.5, **settings))
    brac = found.brac if isinstance(found, BRACValue) else found
    with torch.no_grad():
        for parameter in brac.behaviour.model.network.parameters():
            parameter.zero_()
        parameter.copy_(torch.tensor(BEHAVIOUR).log())
    return brac, networks


@pytest.mark.parametrize("agent", [BRAC, BRACValue])
def test_the_actor_s_loss_by_hand(agent: type[BRAC] | type[BRACValue]) -> None:
    """E|Q| = .5 + .6 + .8, E Q = .7, E risk = .05 + .18, and the KL is the reverse one."""
    assert abs(REVERSE - FORWARD) > 0.03
    brac, _ = tables(agent, actor_weight=0.5, critic_weight=9.0)
    penalty = Penalty(lambda o, t, a: a @ torch.tensor([0.1, 0.0, 0.9]), torch.tensor(2.0))
    loss, divergence = brac.actor_loss(discrete_batch(1), NO_NOISE, (penalty,))
    assert loss.item() == pytest.approx(-0.7 / 1.9 + 2.0 * 0.23 + 0.5 * REVERSE, rel=1e-5)
    assert divergence.item() == pytest.approx(REVERSE, rel=1e-5)
    plain, _ = brac.actor_loss(discrete_batch(1), NO_NOISE, ())
    assert plain.item() == pytest.approx(-0.7 / 1.9 + 0.5 * REVERSE, rel=1e-5)


@pytest.mark.parametrize(("agent", "pays"), [(BRAC, 0.0), (BRACValue, 0.4)])
def test_the_critics_of_v_alone_pay_for_the_kl(
    agent: type[BRAC] | type[BRACValue], pays: float
) -> None:
    """The target is 1 + .5 (1.7 - .4 KL); Q of the logged action 1 is -2."""
    brac, _ = tables(agent, actor_weight=9.0, critic_weight=0.4)
    (loss,) = brac.values.critic_loss(discrete_batch(1), NO_NOISE)
    target = 1.0 + 0.5 * (1.7 - pays * REVERSE)
    assert loss.item() == pytest.approx(MEMBERS * (-2.0 - target) ** 2, rel=1e-5)


def test_the_behaviour_is_of_every_logged_action_alike() -> None:
    """-log of .2 and of .6, whatever is paid for them."""
    brac, _ = tables(BRAC)
    batches = [discrete_batch(action) for action in (0, 2)]
    both = type(batches[0])(
        *(torch.cat(pair) for pair in zip(*(b.tensors for b in batches), strict=True))
    )
    (loss,) = brac.behaviour.loss(both._replace(rewards=torch.tensor([100.0, -100.0])))
    assert loss.item() == pytest.approx(-(math.log(0.2) + math.log(0.6)) / 2.0, rel=1e-5)


def test_who_learns_what() -> None:
    brac, _ = tables(BRACValue, learning_rate=1e-2)
    modules = brac.behaviour.model.network, brac.actor
    batch = discrete_batch(0)

    def moved(step: Any, *arguments: object) -> list[bool]:
        before = [[p.detach().clone() for p in module.parameters()] for module in modules]
        step(*arguments)
        pairs = zip(before, modules, strict=True)
        return [not all(map(torch.equal, old, new.parameters())) for old, new in pairs]

    assert moved(brac._descend_actor, batch, NO_NOISE, ()) == [False, True]
    assert moved(brac.behaviour.update, batch) == [True, False]


@pytest.mark.parametrize("name", ["brac_p", "brac_v"])
def test_of_two_ways_it_takes_one(name: str) -> None:
    """The reverse KL seeks a mode; the forward one would cover both, and what is between them."""
    sides = torch.tensor([[-0.8], [0.8]]).repeat(100, 1)
    sides = sides + 0.05 * torch.randn(200, 1, generator=seeded(2))
    given, settings = bandit(sides, torch.ones(200)), {"actor_weight": 1.0, "learning_rate": 5e-3}
    networks, metrics = trained(name, given, 900, q=lambda a: 1.0 + 0.0 * a[:, 0], **settings)
    drawn = drawn_from(networks)
    assert abs(drawn.mean().item()) == pytest.approx(0.8, abs=0.1)
    assert drawn.std().item() < 0.2
    # One of two equal modes is log 2 away.
    assert metrics["actor/kl_to_log"] == pytest.approx(math.log(2.0), abs=0.3)


def test_discrete_actions_too() -> None:
    """pi* ~ pi_b exp(Q / |Q| / weight): the gradient is zero there alone."""
    q = (1.0, 1.0, -1.0)  # |Q| is 1 under any policy
    best = torch.tensor(BEHAVIOUR) * (torch.tensor(q) / 0.5).exp()

    def slope_at(policy: torch.Tensor) -> float:
        networks = discrete_networks(tuple(policy.tolist()), q, [])
        brac = BRAC(setup_of(networks, seeded(0)), BRACConfig(actor_weight=0.5))
        with torch.no_grad():
            for parameter in brac.behaviour.model.network.parameters():
                parameter.zero_()
            parameter.copy_(torch.tensor(BEHAVIOUR).log())
        loss, _ = brac.actor_loss(discrete_batch(0), NO_NOISE, ())
        *_, bias = networks.actor.parameters()
        return torch.autograd.grad(loss, bias)[0].abs().max().item()

    assert slope_at(best / best.sum()) < 1e-6
    assert slope_at(torch.tensor([0.3, 0.3, 0.4])) > 0.01
