"""TD3+BC and ReBRAC: objective and target by hand, a deviation that never moves, logged actions."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.agents.td3bc import RegularisedTD3, constant_deviation_
from safe_offrl.compute.state import seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import Following
from safe_offrl.errors import ConfigError
from safe_offrl.policies.gaussian import Gaussian
from safe_offrl.policies.networks import Actor, NetworkConfig
from tests.agents.small_problems import agent_of, bandit, log_of, trained

LINEAR = NetworkConfig((), (4,), 2)
NOTHING_ELSE = Steering()


def log(actions: list[list[float]]) -> Dataset:
    given = torch.tensor(actions)
    return bandit(given, torch.zeros(len(given)))


def means_(actor: Actor, means: list[float]) -> None:
    """Make a network of one linear layer say these means before tanh, whatever it sees."""
    *_, layer = actor.layers.modules()
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias[: len(means)] = torch.tensor(means)


def made(name: str, given: Dataset, **settings: Any) -> RegularisedTD3:
    agent, _ = agent_of(name, given, sizes=LINEAR, **settings)
    td3 = agent.td3
    assert isinstance(td3, RegularisedTD3)
    return td3


# --- by hand ---


@pytest.mark.parametrize(
    ("name", "settings", "weight"),
    # 1 / (2.5 * 2): a mean over two dimensions, and the critics 2.5 times as much as it.
    [("td3bc", {"alpha": 2.5}, 0.2), ("rebrac", {"actor_weight": 0.7}, 0.7)],
)
def test_the_actor_s_loss_by_hand(
    name: str, settings: dict[str, Any], weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least Q = s + 4 a_1 in states 0 and -5, Q_C = a_2^2, lambda 3."""
    given = log([[0.1, 0.2], [-0.6, 0.9]])
    td3 = made(name, given, **settings)
    means_(td3.actor, [0.4, -0.3])

    def q(observations: Tensor, actions: Tensor) -> Tensor:
        least = observations[:, 0] + 4.0 * actions[:, 0]
        return torch.stack([least + 1.0, least])

    monkeypatch.setattr(td3.networks, "q", q)
    penalty = Penalty(lambda o, t, a: a[:, 1].square(), torch.tensor(3.0))
    batch = given.transitions._replace(observations=torch.tensor([[0.0], [-5.0]]))
    x, y = math.tanh(0.4), math.tanh(-0.3)
    size = (abs(4.0 * x) + abs(4.0 * x - 5.0)) / 2.0
    distances = (x - 0.1) ** 2 + (y - 0.2) ** 2, (x + 0.6) ** 2 + (y - 0.9) ** 2
    distance = sum(distances) / 2.0
    by_hand = -(4.0 * x - 2.5) / size + 3.0 * y**2 + weight * distance
    loss, found = td3.actor_loss(batch, (penalty,))
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert found.item() == pytest.approx(distance, rel=1e-5)
    plain, _ = td3.actor_loss(batch, ())
    assert plain.item() == pytest.approx(by_hand - 3.0 * y**2, rel=1e-5)


def target_parts(name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> RegularisedTD3:
    """With a target actor at tanh(.8), an actor elsewhere, and a least target Q of 2 a_1 + a_2."""
    td3 = made(name, log([[0.0, 0.0]] * 3), **settings)
    means_(td3.actor, [-1.0, -1.0])
    means_(td3.target_actor, [0.8, 0.8])

    def target_q(observations: Tensor, actions: Tensor) -> Tensor:
        least = 2.0 * actions[:, 0] + actions[:, 1]
        return torch.stack([least, least + 7.0])

    monkeypatch.setattr(td3.networks, "target_q", target_q)
    return td3


CENTRE = math.tanh(0.8)  # .664
NOISE = torch.tensor([[0.5, 0.0], [4.0, -9.0], [1.0, -1.0]])
# .2 of the noise, at most .5 of it, and no action beyond 1.
NEXT = [(CENTRE + 0.1, CENTRE), (1.0, CENTRE - 0.5), (CENTRE + 0.2, CENTRE - 0.2)]


def test_the_target_of_td3bc_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    td3 = target_parts("td3bc", monkeypatch)
    found = td3.next_value(log([[0.0, 0.0]] * 3).transitions, NOISE)
    assert found.tolist() == pytest.approx([2.0 * x + y for x, y in NEXT], rel=1e-5)


def test_the_target_of_rebrac_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third next action is not known: nothing is paid for it, whatever stands in its place."""
    td3 = target_parts("rebrac", monkeypatch, critic_weight=0.3)
    logged = [(0.2, -0.4), (-1.0, 1.0), (9.0, 9.0)]
    following = Following(torch.tensor(logged), torch.tensor([1.0, 1.0, 0.0]))
    found = td3.next_value(log([[0.0, 0.0]] * 3).transitions, NOISE, following)
    by_hand = [
        2.0 * x + y - 0.3 * known * ((x - a) ** 2 + (y - b) ** 2)
        for (x, y), (a, b), known in zip(NEXT, logged, (1.0, 1.0, 0.0), strict=True)
    ]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-5)


# --- the deviation that it is deployed with ---


@pytest.mark.parametrize("name", ["td3bc", "rebrac"])
@pytest.mark.parametrize("deviation", [0.1, 0.3])
def test_the_deployment_noise_is_the_same_everywhere_and_never_moves(
    name: str, deviation: float
) -> None:
    given = bandit(2.0 * torch.rand(50, 2, generator=seeded(0)) - 1.0, torch.rand(50))
    agent, networks = agent_of(name, given, deployment_noise=deviation)
    *_, last = networks.actor.layers.modules()
    assert isinstance(last, nn.Linear)

    def bits(rows: slice) -> bytes:
        both = torch.cat([last.weight[rows], last.bias[rows, None]], dim=1)
        return both.detach().numpy().tobytes()

    means, stds = bits(slice(2)), bits(slice(2, None))
    risk = Penalty(lambda o, t, a: torch.sigmoid(a.sum(-1)), torch.tensor(2.0))
    batch = given.transitions._replace(observations=torch.randn(50, 1, generator=seeded(1)))
    for _ in range(20):
        agent.update(batch, Steering((risk,)))
    assert bits(slice(2, None)) == stds
    assert bits(slice(2)) != means
    policy = networks.actor(100.0 * torch.randn(50, 1, generator=seeded(2)))
    assert isinstance(policy, Gaussian)
    torch.testing.assert_close(policy.log_std.exp(), torch.full((50, 2), deviation))


@pytest.mark.parametrize("deviation", [0.0, 0.005, 8.0])
def test_a_deviation_that_no_policy_can_have_is_refused(deviation: float) -> None:
    actor = Actor(1, 1, (4,), seeded(0))
    with pytest.raises(
        ConfigError, match=rf"is {deviation}, .* between 0\.00674 and 7\.39 .* 0\.1"
    ):
        constant_deviation_(actor, deviation)


# --- as TD3 learns ---


def test_actor_and_targets_learn_in_every_second_step() -> None:
    given = bandit(2.0 * torch.rand(9, 2, generator=seeded(0)) - 1.0, torch.rand(9))
    td3 = made("td3bc", given)
    networks = td3.networks
    modules = (networks.critics, td3.actor, networks.target_critics, td3.target_actor)
    for turn in (True, False, True, False):
        before = [[p.detach().clone() for p in module.parameters()] for module in modules]
        metrics = td3.update(given.transitions, NOTHING_ELSE)
        now = [list(module.parameters()) for module in modules]
        moved = [not all(map(torch.equal, *pair)) for pair in zip(before, now, strict=True)]
        assert moved == [True, turn, turn, turn]
        assert ("actor/loss" in metrics) == turn
        if turn:  # by tau, .05 here
            for old, new, online in zip(before[3], now[3], now[1], strict=True):
                torch.testing.assert_close(new, old + 0.05 * (online - old))


def test_td3bc_finds_what_lies_between_the_best_action_and_the_log_s_mean() -> None:
    """Q = 1 - 2 (a - .5)^2 on a log of mean 0: 2.5 Q / |Q| - a^2 is largest at .418.

    There Q is .9865, and 2.5 * 4 (.5 - a) / .9865 = 2 a.
    """
    given = bandit(torch.linspace(-0.95, 0.95, 500).unsqueeze(-1), torch.zeros(500))
    networks, _ = trained("td3bc", given, 400, q=lambda a: 1.0 - 2.0 * (a[:, 0] - 0.5).square())
    policy = networks.actor(torch.zeros(1, 1))
    assert isinstance(policy, Gaussian)
    assert torch.tanh(policy.mean).item() == pytest.approx(0.418, abs=0.02)


# --- ReBRAC's own batches ---


def test_rebrac_s_critics_pay_for_leaving_the_next_logged_action() -> None:
    """s0 -> s1 -> the end, for nothing; in s1 the log does .6, and so does the actor.

    What is paid is the variance of the smoothing, .2^2 of a normal clipped at 2.5: .0391. Hence
    Q(s0) = -.7 * 5 * .0391 = -.137. No step follows s1, nor the row before another episode's.
    """
    eye = torch.eye(2)
    state = torch.tensor([0, 1]).repeat(100)
    spread = 2.0 * torch.rand(200, 1, generator=seeded(1)) - 1.0
    actions = torch.where(state[:, None] == 1, torch.tensor(0.6), spread)
    ends = (state == 1).float()
    given = log_of(eye[state], actions, torch.zeros(200), eye[[1, 1] * 100], ends, length=2)
    settings: dict[str, Any] = {"discount": 0.7, "actor_weight": 30.0}
    for weight, value in ((5.0, -0.137), (0.0, 0.0)):
        networks, _ = trained("rebrac", given, 400, critic_weight=weight, **settings)
        with torch.no_grad():
            q = networks.q(eye[state], actions).mean(0)
        assert q[state == 0].mean().item() == pytest.approx(value, abs=0.03)
        assert q[state == 1].mean().item() == pytest.approx(0.0, abs=0.03)


def test_rebrac_draws_as_many_steps_of_the_log_as_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = bandit(torch.tensor([[0.3], [0.4]]), torch.zeros(2))
    agent, networks = agent_of("rebrac", given)
    sizes = []

    def spy(observations: Tensor, actions: Tensor) -> Tensor:
        sizes.append(len(actions))
        return torch.stack([actions[:, 0]] * 2)

    monkeypatch.setattr(networks, "target_q", spy)
    nothing = given.transitions._replace(rewards=torch.full((7,), math.nan))
    metrics = agent.update(nothing, NOTHING_ELSE)
    assert sizes == [7]
    assert all(math.isfinite(float(value)) for value in metrics.values())
