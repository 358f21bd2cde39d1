"""What held-out episodes must show before the guard may hand over, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from safe_offrl.compute.state import seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import Actor
from safe_offrl.safety.critic import RiskEstimate, SafetyCritic, SafetyCriticConfig
from safe_offrl.safety.guard_evidence import guard_refusals, price_of_distance
from safe_offrl.safety.outlook import CostAhead
from safe_offrl.types import Batch, Layout

DISCOUNT = 0.9
LIMIT = Limit("cost", 0.25, 100.0)  # 25 of 100


def dataset(
    lengths: list[int],
    actions: list[float],
    costs: list[float],
    observations: torch.Tensor | None = None,
) -> Dataset:
    n = sum(lengths)
    zeros = torch.zeros(n)
    batch = Batch(
        observations=torch.zeros(n, 1) if observations is None else observations,
        actions=torch.tensor(actions).unsqueeze(1),
        rewards=zeros,
        accidents=torch.tensor(costs),
        costs=torch.tensor(costs),
        next_observations=torch.zeros(n, 1),
        terminated=zeros,
        time_to_go=zeros + 0.5,
        return_to_go=zeros,
    )
    layout = Layout(1, 1)
    starts = np.cumsum([0, *lengths])
    return Dataset(layout.pack(batch), layout, starts, np.zeros(n, dtype=bool), 10, "test")


def critic(weight: float = 0.0) -> SafetyCritic:
    """Next to no cost ahead of anything, or sigmoid(weight a) of it."""
    config = SafetyCriticConfig(members=3, reference=1, hidden=())
    made = SafetyCritic(1, 1, CostAhead(10, 1.0, DISCOUNT, 1), config, seeded(0))
    with torch.no_grad():
        made.net.output.weight.zero_()
        made.net.output.weight[:, -1] = weight
    made.start_from(0.0 if weight else -30.0)
    return made


def standing_still() -> Actor:
    actor = Actor(1, 1, (), seeded(0))
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.zero_()
    return actor


def test_what_acting_otherwise_costs() -> None:
    """Whose action was 0, as the fallback's, cost nothing; whose action was 1 cost 1."""
    log = dataset([1, 1, 1, 1], [0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0])
    price = price_of_distance(critic(), standing_still(), log)
    assert price.slope == pytest.approx(1.0 - DISCOUNT)
    assert price.error == pytest.approx(0.0, abs=1e-9)
    assert price.shown(0.95)


def test_a_fallback_that_leads_the_wrong_way_has_the_opposite_sign() -> None:
    log = dataset([1, 1, 1, 1], [0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0])
    price = price_of_distance(critic(), standing_still(), log)
    assert price.slope == pytest.approx(DISCOUNT - 1.0)
    assert not price.shown(0.95)


def test_the_error_by_hand() -> None:
    """x -.5 .5 -.5 .5, y -.75 .25 .25 .25: slope .5, residuals -.5 0 .5 0, scores .25 0 -.25 0."""
    columns = [0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]
    price = price_of_distance(critic(), standing_still(), dataset([1, 1, 1, 1], *columns))
    assert price.slope == pytest.approx(0.5 * (1.0 - DISCOUNT))
    assert price.error == pytest.approx(math.sqrt(2 * 0.25**2) * (1.0 - DISCOUNT))
    assert not price.shown(0.95)  # 1.41 standard errors
    assert price.shown(0.9)


def test_the_steps_of_an_episode_are_one_observation() -> None:
    # In one episode the scores of both residuals cancel; in two they do not.
    order = [0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]
    together = price_of_distance(critic(), standing_still(), dataset([2, 1, 1], *order))
    assert together.error == pytest.approx(0.0, abs=1e-7)
    apart = price_of_distance(critic(), standing_still(), dataset([1, 1, 1, 1], *order))
    assert apart.error > 0.03


def test_nothing_is_shown_where_nobody_acted_otherwise() -> None:
    log = dataset([1, 1], [0.0, 0.0], [0.0, 1.0])
    price = price_of_distance(critic(), standing_still(), log)
    assert math.isnan(price.slope)
    assert not price.shown(0.95)


def test_what_the_state_itself_costs_is_no_price() -> None:
    """V rises with the observation, and so does the distance; .02 a unit of it is the price."""
    n = 40
    values = torch.linspace(0.01, 0.05, n)
    observations = (values.logit() + 30.0).unsqueeze(1)
    ranked = critic()
    with torch.no_grad():
        ranked.net.output.weight[:, 0] = 1.0  # V is sigmoid(observation - 30)
    distance = torch.linspace(0.0, 1.0, n)
    costs = ((values + 0.02 * distance) / (1.0 - DISCOUNT)).tolist()
    log = dataset([1] * n, distance.sqrt().tolist(), costs, observations)
    price = price_of_distance(ranked, standing_still(), log)
    assert price.slope == pytest.approx(0.02, rel=1e-3)


def refusals(
    *, episodes: int = 12, costly: float = 1.0, upper: float = 0.1, ranks: float = 8.0
) -> tuple[str, ...]:
    """Half of the episodes act and pay ``costly``, the others stand still and pay the rest."""
    actions = [0.0, 1.0] * episodes
    costs = [1.0 - costly, costly] * episodes
    log = dataset([1] * (2 * episodes), actions, costs)
    estimate = RiskEstimate(upper, upper, upper)
    return guard_refusals(critic(ranks), standing_still(), log, estimate, LIMIT, 100, 0.95)


def test_it_may_watch_where_everything_is_shown() -> None:
    assert refusals() == ()


def test_each_demand_is_named_where_it_is_not_met() -> None:
    (few,) = refusals(episodes=6)
    assert "6 held-out accident episodes, 10 needed" in few
    (ranking,) = refusals(ranks=-8.0)
    assert "AUROC 0.00" in ranking
    (high,) = refusals(upper=2.6)  # 2.6 x 10 ahead of a value of 1
    assert "estimated at 26.0 from the start, below 25 needed" in high
    assert refusals(upper=2.4) == ()
    wrong = refusals(costly=0.0, ranks=-8.0)
    assert any("not shown to lower what follows (by -" in text for text in wrong)
