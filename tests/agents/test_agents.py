"""Problems so small that the right answer is known, and losses by hand."""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safe_offrl.agents.aversion import Aversion
from safe_offrl.agents.cql import ConservativeCritics, CQLConfig
from safe_offrl.agents.extraction import Extraction, ExtractionConfig
from safe_offrl.agents.iql import IQLConfig, IQLValues
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.compute.state import collect_state
from safe_offrl.policies.categorical import Categorical
from safe_offrl.policies.gaussian import Gaussian
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import EVERY, Actor, Members, NetworkConfig, Networks
from safe_offrl.types import Batch, Layout
from tests.agents.setups import configs_with, learner_of, no_risk

OBSERVATIONS, ACTIONS, SIZE, MEMBERS = 3, 2, 16, 4
LAYOUT = Layout(OBSERVATIONS, ACTIONS)
SMALL = NetworkConfig((16,), (16,), MEMBERS)
FAST = 3e-3
NOTHING_ELSE = Steering()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_hot(index: Tensor, actions: int) -> Tensor:
    return torch.eye(actions)[index]


def make_batch(size: int = SIZE, seed: int = 0, *, discrete: bool = False) -> Batch:
    g = seeded(seed)
    batch = Batch(
        observations=torch.randn(size, OBSERVATIONS, generator=g),
        actions=2.0 * torch.rand(size, ACTIONS, generator=g) - 1.0,
        rewards=torch.randn(size, generator=g),
        accidents=(torch.rand(size, generator=g) < 0.2).float(),
        costs=torch.zeros(size),
        next_observations=torch.randn(size, OBSERVATIONS, generator=g),
        terminated=(torch.rand(size, generator=g) < 0.2).float(),
        time_to_go=torch.rand(size, generator=g),
        return_to_go=torch.randn(size, generator=g),
    )
    if discrete:
        batch = batch._replace(actions=one_hot(torch.arange(size) % ACTIONS, ACTIONS))
    return batch


def risk_of_going_right(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
    return torch.sigmoid(4.0 * actions[:, 0])


def networks_of(
    layout: Layout, sizes: NetworkConfig, generator: torch.Generator, *, discrete: bool = False
) -> Networks:
    return Networks(
        layout.observation_size, layout.action_size, sizes, generator, kind_for(discrete=discrete)
    )


def gaussian(actor: Actor, observations: Tensor) -> Gaussian:
    policy = actor(observations)
    assert isinstance(policy, Gaussian)
    return policy


def categorical(actor: Actor, observations: Tensor) -> Categorical:
    policy = actor(observations)
    assert isinstance(policy, Categorical)
    return policy


def make_rlpd(config: RLPDConfig | None = None, sizes: NetworkConfig = SMALL) -> RLPD:
    networks = networks_of(LAYOUT, sizes, seeded())
    return RLPD(networks, config or RLPDConfig(), seeded())


# Probes of those whose critics learn by temporal differences from batches alone; the others have
# theirs beside their formulas.
CONTINUOUS = ["iql", "cql", "calql", "latent", "idql", "bcq", "fql", "awac", "crr", "rlpd"]
DISCRETE = ["iql", "cql", "calql", "awac", "crr", "dqn", "rem", "qrdqn", "bcq_discrete", "rlpd"]
everyone_continuous = pytest.mark.parametrize("name", CONTINUOUS)
everyone_discrete = pytest.mark.parametrize("name", DISCRETE)


# --- probe problems ---


SPECIAL: dict[str, dict[str, Any]] = {
    "cql": {"alpha": 0.01, "actions": 4},
    "latent": {"kl_weight": 0.02},
    "idql": {"temperature": 0.02},
    "bcq": {"perturbation": 0.3, "temperature": 0.02},
    "fql": {"weight": 0.02},
    "awac": {"temperature": 0.1},
    "crr": {"temperature": 0.1},
    "qrdqn": {"quantiles": 16},
}


def probe(
    name: str,
    *,
    observations: int,
    steps: int,
    discount: float,
    source: Batch,
    discrete: bool = False,
) -> Networks:
    """What is learnt on uniform batches of ``source``, with small, fast networks; not careful."""
    common: dict[str, Any] = {"learning_rate": FAST, "discount": discount, "tau": 0.05}
    learner = learner_of(
        name,
        Layout(observations, CHOICES if discrete else 1),
        online=name == "rlpd",
        discrete=discrete,
        sizes=NetworkConfig((32,), (32,), MEMBERS),
        configs=configs_with(SPECIAL, **common),
        extraction=ExtractionConfig(learning_rate=FAST, weight=0.02),
        learner=RLPDConfig(
            **common, target_entropy=-3.0, discrete_entropy=0.05, temperature_init=1e-3
        ),
    )
    g = seeded(3)
    for _ in range(steps):
        index = torch.randint(len(source.rewards), (64,), generator=g)
        learner.step(Batch(*(x[index] for x in source.tensors)))
    return learner.networks


def transitions(
    observations: Tensor, actions: Tensor, rewards: Tensor, following: Tensor, terminated: Tensor
) -> Batch:
    zeros = torch.zeros_like(rewards)
    # The return-to-go is that of the worst policy, so that Cal-QL's maximum never binds.
    return Batch(
        observations, actions, rewards, zeros, zeros, following, terminated, zeros + 1, zeros - 99
    )


@everyone_continuous
def test_bandit_finds_the_best_action(name: str) -> None:
    """One step, reward 1 - 2 (a - 0.5)^2 for a logged uniformly: best is 0.5, Q(a) = reward."""
    actions = torch.linspace(-0.95, 0.95, 500).unsqueeze(-1)
    here = torch.zeros(500, 1)
    reward = 1.0 - 2.0 * (actions[:, 0] - 0.5).square()
    source = transitions(here, actions, reward, here, torch.ones(500))
    networks = probe(name, observations=1, steps=600, discount=0.9, source=source)
    with torch.no_grad():
        actor = networks.actor
        drawn = actor(here).act(actor.noise((500,), seeded(5)))
        q = networks.q(here, actions).mean(0)
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.15)
    assert drawn.std().item() < 0.4
    assert (q - reward).abs().mean().item() < 0.1
    assert actions[q.argmax()].item() == pytest.approx(0.5, abs=0.15)


CHAIN = 200


@everyone_continuous
def test_two_step_chain_discounts_once(name: str) -> None:
    """s0 -> s1 -> end, reward 1 at the end, whatever the action: Q(s1) = 1, Q(s0) = discount."""
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    actions = torch.linspace(-1, 1, CHAIN).unsqueeze(-1)
    source = transitions(
        torch.cat([first, second]).repeat_interleave(CHAIN, 0),
        actions.repeat(2, 1),
        torch.tensor([0.0, 1.0]).repeat_interleave(CHAIN),
        second.repeat(2 * CHAIN, 1),
        torch.tensor([0.0, 1.0]).repeat_interleave(CHAIN),
    )
    networks = probe(name, observations=2, steps=500, discount=0.7, source=source)
    with torch.no_grad():
        q0 = networks.q(first.expand(CHAIN, -1), actions).mean().item()
        q1 = networks.q(second.expand(CHAIN, -1), actions).mean().item()
    assert q1 == pytest.approx(1.0, abs=0.06)
    assert q0 == pytest.approx(0.7, abs=0.06)


@everyone_continuous
def test_truncation_bootstraps_and_termination_does_not(name: str) -> None:
    """Reward 1 for ever, only cut by a time limit: 1 / (1 - .5) = 2; reward 1 and the end: 1."""
    states = torch.eye(2).repeat_interleave(CHAIN, 0)
    terminated = torch.tensor([0.0, 1.0]).repeat_interleave(CHAIN)
    actions = torch.linspace(-1, 1, CHAIN).unsqueeze(-1)
    source = transitions(states, actions.repeat(2, 1), torch.ones(2 * CHAIN), states, terminated)
    networks = probe(name, observations=2, steps=500, discount=0.5, source=source)
    with torch.no_grad():
        q = networks.q(states, actions.repeat(2, 1)).mean(0)
    assert q[:CHAIN].mean().item() == pytest.approx(2.0, abs=0.1)
    assert q[CHAIN:].mean().item() == pytest.approx(1.0, abs=0.1)


CHOICES = 3  # actions of the discrete probes
CYCLE = torch.arange(3 * 100) % CHOICES


@everyone_discrete
def test_discrete_bandit_finds_the_best_action(name: str) -> None:
    """One step, rewards 0, 1 and .5 for actions logged equally often: Q is the reward."""
    rewards = torch.tensor([0.0, 1.0, 0.5])
    here = torch.zeros(len(CYCLE), 1)
    actions = one_hot(CYCLE, CHOICES)
    source = transitions(here, actions, rewards[CYCLE], here, torch.ones(len(CYCLE)))
    networks = probe(name, observations=1, steps=500, discount=0.9, source=source, discrete=True)
    with torch.no_grad():
        probabilities = categorical(networks.actor, torch.zeros(1, 1)).log_probs.exp()[0]
        q = networks.q(here[:3], actions[:3]).mean(0)
    assert probabilities[1].item() > 0.8
    torch.testing.assert_close(q, rewards, atol=0.1, rtol=0.0)


@everyone_discrete
def test_discrete_chain_discounts_once_and_truncation_bootstraps(name: str) -> None:
    """s0 -> s1 -> end with reward 1; s2 pays 1 for ever: Q = .7, 1 and 1 / (1 - .7) = 3.3.

    In s0 action 0 stays where it is for nothing, so the values are those of a policy that has
    learnt not to: exact expectations over the next action, not over the logged one.
    """
    n = 3 * len(CYCLE)
    states = torch.eye(3).repeat_interleave(len(CYCLE), 0)
    actions = one_hot(CYCLE, CHOICES).repeat(3, 1)
    state = torch.arange(3).repeat_interleave(len(CYCLE))
    stays = (state == 0) & (actions[:, 0] == 1)
    following = torch.where(state == 0, 1, state)
    following = torch.where(stays, 0, following)
    rewards, terminated = (state > 0).float(), (state == 1).float()
    source = transitions(states, actions, rewards, torch.eye(3)[following], terminated)
    networks = probe(name, observations=3, steps=700, discount=0.7, source=source, discrete=True)
    with torch.no_grad():
        q = networks.q(states, actions).mean(0)
        policy = categorical(networks.actor, torch.eye(3)).log_probs.exp()
    assert len(q) == n
    assert q[state == 1].mean().item() == pytest.approx(1.0, abs=0.06)
    assert q[(state == 0) & ~stays].mean().item() == pytest.approx(0.7, abs=0.06)
    assert q[stays].mean().item() == pytest.approx(0.49, abs=0.08)  # a step later
    assert q[state == 2].mean().item() == pytest.approx(1.0 / 0.3, abs=0.2)
    assert policy[0, 0].item() < 0.3


# --- IQL ---


def test_iql_value_loss_by_hand() -> None:
    networks = networks_of(LAYOUT, SMALL, seeded())
    agent = IQLValues(networks, IQLConfig(), seeded())
    constant_(agent.value, [0.0])
    # V = 0 everywhere, the least target critic is 2 and then -2: .7 * 4 and .3 * 4
    for least, expected in ((2.0, 2.8), (-2.0, 1.2)):
        constant_(networks.target_critics, [least, 3.0, 5.0, 4.0])
        loss, target_q = agent.value_loss(make_batch())
        assert loss.item() == pytest.approx(expected)
        assert target_q.tolist() == [least] * SIZE


def test_iql_uses_the_minimum_target_critic_and_the_new_value() -> None:
    networks = networks_of(LAYOUT, SMALL, seeded())
    agent = IQLValues(networks, IQLConfig(), seeded())
    batch = make_batch()
    q = networks.target_q(batch.observations, batch.actions).amin(0)
    advantages, _ = agent.update(batch)
    torch.testing.assert_close(advantages, q - agent.value(batch.observations)[0])


# --- CQL and Cal-QL ---


def make_cql(*, calibrated: bool = False, alpha: float = 5.0, k: int = 4) -> ConservativeCritics:
    networks = networks_of(LAYOUT, SMALL, seeded())
    return ConservativeCritics(networks, CQLConfig(alpha=alpha, actions=k), calibrated=calibrated)


def cql_loss(agent: ConservativeCritics, batch: Batch, k: int = 4) -> Tensor:
    g = seeded(4)
    many = (k, *batch.actions.shape)
    noise = (torch.randn(many, generator=g), torch.randn(many, generator=g))
    uniform = 2.0 * torch.rand(many, generator=g) - 1.0
    return agent.critic_loss(batch, torch.randn(many[1:], generator=g), noise, uniform)[0]


def cql_gradients(agent: ConservativeCritics, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """d loss / d Q: at logged actions [E, B], policy actions [E, 2K, B], uniform ones [E, K, B]."""
    seen: list[tuple[Tensor, Tensor]] = []
    q_of = agent.networks.q_of_actions

    def spy(observations: Tensor, actions: Tensor) -> Tensor:
        q = q_of(observations, actions)
        q.retain_grad()
        seen.append((q, observations))
        return q

    agent.networks.q_of_actions = spy  # type: ignore[method-assign]
    cql_loss(agent, batch).backward()
    ((q, observations),) = seen
    # Trap: all actions are evaluated at the CURRENT state.
    assert torch.equal(observations, batch.observations)
    assert q.shape == (MEMBERS, 13, SIZE)
    assert q.grad is not None
    return q.grad[:, 0], q.grad[:, 1:9], q.grad[:, 9:]


def test_cql_presses_down_unlogged_actions() -> None:
    """The gap's gradient is a softmax over the sampled actions, and -1 at the logged one."""
    logged, policy, uniform = cql_gradients(make_cql(), make_batch())
    sampled = torch.cat([policy, uniform], dim=1)
    assert bool((sampled > 0.0).all())  # descending lowers Q there
    # alpha times the softmax, averaged over the batch
    torch.testing.assert_close(sampled.sum(1), torch.full((MEMBERS, SIZE), 5.0 / SIZE))
    plain, none, _ = cql_gradients(make_cql(alpha=0.0), make_batch())
    assert none.abs().max() == 0.0
    torch.testing.assert_close(logged, plain - 5.0 / SIZE)


def test_calql_stops_at_the_return_of_the_log_at_policy_actions_only() -> None:
    batch = make_batch()
    high = batch._replace(return_to_go=torch.full((SIZE,), 100.0))
    _, policy, uniform = cql_gradients(make_cql(calibrated=True), high)
    assert policy.abs().max() == 0.0
    # 100 outweighs the uniform ones in the softmax; with a lower bar they still feel it.
    q = make_cql().networks.q(batch.observations, batch.actions)
    bar = batch._replace(return_to_go=torch.full((SIZE,), q.max().item() + 1.0))
    _, policy, uniform = cql_gradients(make_cql(calibrated=True), bar)
    assert policy.abs().max() == 0.0
    assert bool((uniform > 0.0).all())


def test_calql_is_cql_where_the_log_did_worse() -> None:
    low = make_batch()._replace(return_to_go=torch.full((SIZE,), -100.0))
    torch.testing.assert_close(cql_loss(make_cql(calibrated=True), low), cql_loss(make_cql(), low))
    some = make_batch()
    assert cql_loss(make_cql(calibrated=True), some) > cql_loss(make_cql(), some)


def test_cql_loss_by_hand() -> None:
    """Constant critics q, targets y: (q - r - g y)^2 + alpha (log integral - q), x members."""
    agent = make_cql(alpha=2.0, k=400)
    wide_(agent.networks.actor)
    constant_(agent.networks.critics, [0.3] * MEMBERS)
    constant_(agent.networks.target_critics, [1.0, 0.5, 2.0, 3.0])  # the minimum is .5
    batch = make_batch()._replace(rewards=torch.ones(SIZE), terminated=torch.zeros(SIZE))
    # log of the integral of e^.3 over [-1, 1]^2 = .3 + log 4, by importance sampling
    expected = MEMBERS * ((0.3 - 1.0 - 0.99 * 0.5) ** 2 + 2.0 * math.log(4.0))
    assert cql_loss(agent, batch, 400).item() == pytest.approx(expected, rel=0.05)


def wide_(actor: Actor) -> None:
    """Standard deviation .9 at mean 0: tanh of it is nearly uniform, good to integrate with."""
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.zero_()
        parameter[ACTIONS:] = math.atanh((math.log(0.9) + 5.0) / 3.5 - 1.0)


# --- RLPD ---


def constant_(critics: nn.Module, values: list[float]) -> None:
    """Make member e answer values[e] everywhere."""
    with torch.no_grad():
        *_, bias = critics.parameters()
        for parameter in critics.parameters():
            parameter.zero_()
        bias.copy_(torch.tensor(values).view(bias.shape))


def test_rlpd_target_is_the_minimum_over_the_drawn_members() -> None:
    learner = make_rlpd()
    constant_(learner.networks.critics, [0.0] * MEMBERS)
    constant_(learner.networks.target_critics, [1.0, 4.0, 2.0, 3.0])
    batch = make_batch()._replace(rewards=torch.zeros(SIZE), terminated=torch.zeros(SIZE))
    noise = torch.zeros(SIZE, ACTIONS)
    for members, least in (([1, 3], 3.0), ([0, 1], 1.0), ([1], 4.0), ([1, 2], 2.0)):
        (loss,) = learner.critic_loss(batch, noise, torch.tensor(members))
        assert loss.item() == pytest.approx(MEMBERS * (0.99 * least) ** 2)


def test_rlpd_draws_members_without_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_rlpd()
    drawn: list[tuple[int, ...]] = []
    target_q = learner.networks.target_q

    def spy(observations: Tensor, actions: Tensor, members: Tensor) -> Tensor:
        drawn.append(tuple(sorted(members.tolist())))
        return target_q(observations, actions, members)

    monkeypatch.setattr(learner.networks, "target_q", spy)
    for _ in range(100):
        learner.update_critics(make_batch())
    assert set(drawn) == set(combinations(range(MEMBERS), 2))


def test_rlpd_actor_climbs_the_mean_of_all_critics(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_rlpd()
    q_of, seen = learner.networks.q, []

    def spy(observations: Tensor, actions: Tensor) -> Tensor:
        q = q_of(observations, actions)
        q.retain_grad()
        seen.append(q)
        return q

    monkeypatch.setattr(learner.networks, "q", spy)
    batch, zero = make_batch(), torch.tensor(0.0)
    noise = torch.randn(batch.actions.shape, generator=seeded(1))
    learner.actor_loss(batch, noise, (), None, zero)[0].backward()
    (q,) = seen
    assert q.grad is not None
    # Every member pulls equally, upwards; the scale is the mean magnitude of the ensemble mean.
    scale = q.detach().mean(0).abs().mean()
    torch.testing.assert_close(q.grad, torch.full((MEMBERS, SIZE), -1.0 / (MEMBERS * SIZE)) / scale)


def test_rlpd_actor_loss_adds_risk_entropy_and_kl() -> None:
    learner = make_rlpd(RLPDConfig(temperature_init=0.5))
    batch = make_batch()
    noise = torch.randn(batch.actions.shape, generator=seeded(1))
    anchor = Actor(OBSERVATIONS, ACTIONS, (16,), seeded(8))
    zero, two, three = (torch.tensor(x) for x in (0.0, 2.0, 3.0))
    policy = learner.networks.actor(batch.observations)

    def loss(risk: bool, anchored: Actor | None, weight: Tensor) -> Tensor:
        penalty = Penalty(lambda o, t, a: 0.25 + 0.0 * a.sum(-1), two)
        penalties = (penalty,) if risk else ()
        return learner.actor_loss(batch, noise, penalties, anchored, weight)[0]

    plain = loss(False, None, zero)
    torch.testing.assert_close(loss(True, None, zero), plain + 2.0 * 0.25)
    distance = policy.divergence(anchor(batch.observations)).mean()
    assert distance > 0.0
    torch.testing.assert_close(loss(False, anchor, three), plain + 3.0 * distance)
    torch.testing.assert_close(loss(False, learner.networks.actor, three), plain)
    warmer = make_rlpd(RLPDConfig(temperature_init=1.5))
    value, log_prob = warmer.actor_loss(batch, noise, (), None, zero)
    torch.testing.assert_close(value, plain + (1.5 - 0.5) * log_prob)


@pytest.mark.parametrize(("target", "rises"), [(50.0, True), (-50.0, False)])
def test_temperature_rises_while_entropy_is_too_low(target: float, rises: bool) -> None:
    learner = make_rlpd(RLPDConfig(target_entropy=target))
    before = learner.log_temperature.item()
    learner.update_actor(make_batch(), NOTHING_ELSE)
    assert (learner.log_temperature.item() > before) == rises


# --- extraction ---


def extract(
    risk: Callable[[Tensor, Tensor, Tensor], Tensor], multiplier: float, steps: int
) -> Actor:
    """The log goes left (-.8) or right (+.8) around an obstacle; the critics do not care."""
    networks = Networks(1, 1, NetworkConfig((32,), (), 1), seeded(0))
    g = seeded(2)
    extraction = Extraction(networks, ExtractionConfig(learning_rate=5e-3), g)

    def indifferent(observations: Tensor, actions: Tensor) -> Tensor:
        return (1.0 + 0.0 * actions.sum(-1)).expand(2, -1)

    networks.q = indifferent  # type: ignore[method-assign]
    side = torch.where(torch.arange(64) % 2 == 0, 0.8, -0.8).unsqueeze(-1)
    zeros, here = torch.zeros(64), torch.zeros(64, 1)
    for _ in range(steps):
        actions = side + 0.05 * torch.randn(64, 1, generator=g)
        batch = transitions(here, actions, zeros, here, zeros)
        extraction.update(batch, zeros, Steering((Penalty(risk, torch.tensor(multiplier)),)))
    return networks.actor


def test_two_ways_around_are_not_averaged_into_the_obstacle() -> None:
    # Until the mixture has found both ways the actor is wide; then it falls into one of them.
    mean, log_std = gaussian(extract(no_risk, 0.0, 1200), torch.zeros(1, 1))
    assert abs(torch.tanh(mean).item()) == pytest.approx(0.8, abs=0.1)
    assert log_std.exp().item() < 0.4


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_safer_way_is_taken(direction: float) -> None:
    def risk(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
        return risk_of_going_right(observations, time_to_go, direction * actions)

    mean, _ = gaussian(extract(risk, 3.0, 500), torch.zeros(1, 1))
    assert torch.tanh(mean).item() == pytest.approx(-0.8 * direction, abs=0.1)


def extracted(
    *, rewards: float = 1.0, critics: int = 0, advantages: float | None, discrete: bool
) -> list[Tensor]:
    """What ten steps make of actor and mixture, for rewards times a number and other critics."""
    networks = networks_of(LAYOUT, SMALL, seeded(), discrete=discrete)
    networks.critics.load_state_dict(
        networks_of(LAYOUT, SMALL, seeded(critics), discrete=discrete).critics.state_dict()
    )
    extraction = Extraction(networks, ExtractionConfig(learning_rate=FAST), seeded(1))
    penalty = Penalty(risk_of_going_right, torch.tensor(1.0))
    for k in range(10):
        batch = make_batch(seed=k, discrete=discrete)
        batch = batch._replace(rewards=rewards * batch.rewards)
        given = None if advantages is None else advantages * batch.rewards
        metrics = extraction.update(batch, given, Steering((penalty,)))
        assert all(value.isfinite() for value in metrics.values())
    parts = extraction.parts()
    return list(collect_state({"actor": networks.actor, "mixture": parts["mixture"]}).values())


@pytest.mark.parametrize("discrete", [False, True])
def test_without_advantages_reward_has_no_part_in_it(discrete: bool) -> None:
    known = extracted(advantages=None, discrete=discrete)
    others: list[dict[str, Any]] = [{"rewards": -5.0}, {"critics": 9}]
    for other in others:
        found = extracted(advantages=None, discrete=discrete, **other)
        assert all(map(torch.equal, found, known))
    # With them, both count, even where they are all alike.
    asked = extracted(advantages=1.0, discrete=discrete)
    assert not any(map(torch.equal, asked, known))
    for other in others:
        found = extracted(advantages=1.0, discrete=discrete, **other)
        assert not all(map(torch.equal, found, asked))
    actor = slice(4)  # the mixture's weights are those of no advantage
    alike = extracted(advantages=0.0, discrete=discrete)
    assert not any(map(torch.equal, alike[actor], known[actor]))
    assert all(map(torch.equal, alike[4:], known[4:]))


def test_the_least_risky_way_is_taken_where_nothing_else_counts() -> None:
    """The critics are all for going right, which is where the risk is."""
    networks, g = Networks(1, 1, NetworkConfig((32,), (), 1), seeded(0)), seeded(2)
    aversion = Aversion(10.0, relative=True)
    config = ExtractionConfig(learning_rate=5e-3)
    extraction = Extraction(networks, config, g, aversions=[aversion])

    def rightwards(observations: Tensor, actions: Tensor) -> Tensor:
        return 9.0 * actions.sum(-1).expand(2, -1)

    networks.q = rightwards  # type: ignore[method-assign]
    side = torch.where(torch.arange(64) % 2 == 0, 0.8, -0.8).unsqueeze(-1)
    zeros, here = torch.zeros(64), torch.zeros(64, 1)
    steering = Steering((Penalty(risk_of_going_right, torch.tensor(1.0)),))
    for _ in range(500):
        actions = side + 0.05 * torch.randn(64, 1, generator=g)
        extraction.update(transitions(here, actions, zeros, here, zeros), None, steering)
    mean, _ = gaussian(networks.actor, torch.zeros(1, 1))
    assert torch.tanh(mean).item() == pytest.approx(-0.8, abs=0.1)


# --- discrete actions: every expectation exact, so every loss is a number by hand ---

Table = tuple[float, ...]


class TableNetworks(Networks):
    """Q and target Q of one state, read from tables [E, A]."""

    table: Tensor
    target_table: Tensor

    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.table @ actions.T

    def q_of_actions(self, observations: Tensor, actions: Tensor) -> Tensor:
        return torch.einsum("ea,kba->ekb", self.table, actions)

    def target_q(self, observations: Tensor, actions: Tensor, members: Members = EVERY) -> Tensor:
        return self.target_table[members] @ actions.T


def discrete_networks(probabilities: Table, q: Table, target_q: list[Table]) -> TableNetworks:
    """One state; the policy, Q of all critics and Q of each target critic are given tables."""
    sizes = NetworkConfig((), (), MEMBERS)
    networks = TableNetworks(1, len(q), sizes, seeded(), kind_for(discrete=True))
    with torch.no_grad():
        for parameter in networks.actor.parameters():
            parameter.zero_()
        parameter.copy_(torch.tensor(probabilities).log())
    networks.table = torch.tensor(q).expand(MEMBERS, -1).clone().requires_grad_()
    networks.target_table = torch.tensor(target_q)
    return networks


def discrete_batch(action: int, actions: int = 3, return_to_go: float = -99.0) -> Batch:
    one = torch.ones(1)
    return Batch(
        observations=torch.zeros(1, 1),
        actions=one_hot(torch.tensor([action]), actions),
        rewards=one,
        accidents=one * 0.0,
        costs=one * 0.0,
        next_observations=torch.zeros(1, 1),
        terminated=one * 0.0,
        time_to_go=one,
        return_to_go=one * return_to_go,
    )


NO_NOISE = torch.zeros(1, 3)
NOTHING = torch.zeros(0, 1, 3)


def discrete_cql(*, calibrated: bool, return_to_go: float = -99.0) -> tuple[float, Tensor]:
    """(loss, its gradient over the table) for Q = (1, 2, 0) where action 0 was logged."""
    # min of the targets is (1, 2, 3): E_pi = .5 + .6 + .6 = 1.7
    networks = discrete_networks(
        (0.5, 0.3, 0.2), (1.0, 2.0, 0.0), [(1.0, 5.0, 3.0), (4.0, 2.0, 9.0)]
    )
    settings = CQLConfig(alpha=2.0, discount=0.5)
    agent = ConservativeCritics(networks, settings, calibrated=calibrated)
    batch = discrete_batch(0, return_to_go=return_to_go)
    loss, _ = agent.critic_loss(batch, NO_NOISE, (NOTHING, NOTHING), NOTHING)
    return loss.item(), torch.autograd.grad(loss, networks.table)[0][0]


def test_discrete_cql_is_logsumexp_over_all_actions_minus_the_logged_one() -> None:
    loss, gradient = discrete_cql(calibrated=False)
    total = math.e + math.e**2 + 1.0
    td = (1.0 - (1.0 + 0.5 * 1.7)) ** 2
    assert loss == pytest.approx(MEMBERS * (td + 2.0 * (math.log(total) - 1.0)))
    # 2 softmax at every action, the logged one or not; there also the TD error and -2.
    softmax = torch.tensor([math.e, math.e**2, 1.0]) / total
    expected = 2.0 * softmax + torch.tensor([2.0 * (1.0 - 1.85) - 2.0, 0.0, 0.0])
    torch.testing.assert_close(gradient, expected)


def test_discrete_calql_stops_at_the_return_of_the_log_at_every_action() -> None:
    # max(Q, 1.5) = (1.5, 2, 1.5): only action 1 is still pressed down.
    loss, gradient = discrete_cql(calibrated=True, return_to_go=1.5)
    total = 2.0 * math.exp(1.5) + math.exp(2.0)
    td = (1.0 - (1.0 + 0.5 * 1.7)) ** 2
    assert loss == pytest.approx(MEMBERS * (td + 2.0 * (math.log(total) - 1.0)))
    expected = torch.tensor([2.0 * (1.0 - 1.85) - 2.0, 2.0 * math.exp(2.0) / total, 0.0])
    torch.testing.assert_close(gradient, expected)
    # Below every Q it is CQL.
    assert discrete_cql(calibrated=True, return_to_go=-9.0)[0] == discrete_cql(calibrated=False)[0]


def test_discrete_cql_advantage_is_over_the_expectation() -> None:
    networks = Networks(OBSERVATIONS, ACTIONS, SMALL, seeded(), kind_for(discrete=True))
    agent = ConservativeCritics(networks, CQLConfig(), calibrated=True)
    batch = make_batch(discrete=True)
    advantages, _ = agent.update(batch, seeded(1))
    q = torch.stack(
        [
            networks.target_q(batch.observations, one_hot(torch.full((SIZE,), k), ACTIONS)).amin(0)
            for k in range(ACTIONS)
        ],
        dim=-1,
    )
    value = (categorical(networks.actor, batch.observations).log_probs.exp() * q).sum(-1)
    logged = (q * batch.actions).sum(-1)
    torch.testing.assert_close(advantages, (logged - value).detach())


def test_discrete_rlpd_losses_by_hand() -> None:
    policy = (0.5, 0.3, 0.2)
    # drawn members 0 and 2: their minimum is (1, 2, 3), E_pi = 1.7 as above
    targets: list[Table] = [(1.0, 5.0, 3.0), (0.0, 0.0, 0.0), (4.0, 2.0, 9.0), (0.0, 0.0, 0.0)]
    networks = discrete_networks(policy, (1.0, -2.0, 4.0), targets)
    learner = RLPD(networks, RLPDConfig(discount=0.5, temperature_init=0.5), seeded())
    batch = discrete_batch(1)
    (loss,) = learner.critic_loss(batch, NO_NOISE, torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(MEMBERS * (-2.0 - 1.85) ** 2)

    anchor = Actor(1, 3, (), seeded(), kind_for(discrete=True))
    with torch.no_grad():
        for parameter in anchor.parameters():
            parameter.zero_()  # uniform

    def risk(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
        assert observations.shape == (3, 1)
        assert time_to_go.tolist() == [1.0] * 3
        return actions @ torch.tensor([0.1, 0.0, 0.9])

    two, three = torch.tensor(2.0), torch.tensor(3.0)
    value, log_prob = learner.actor_loss(batch, NO_NOISE, (Penalty(risk, two),), anchor, three)
    # E|Q| = .5 + .6 + .8 = 1.9; E Q = .5 - .6 + .8 = .7; E risk = .05 + .18 = .23
    negative_entropy = sum(p * math.log(p) for p in policy)
    distance = negative_entropy + math.log(3)
    expected = -0.7 / 1.9 + 0.5 * negative_entropy + 2.0 * 0.23 + 3.0 * distance
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert log_prob.item() == pytest.approx(negative_entropy, rel=1e-5)


@pytest.mark.parametrize(("share", "rises"), [(0.95, True), (0.9, False)])
def test_discrete_target_entropy_is_a_share_of_the_largest(share: float, rises: bool) -> None:
    # The policy (.5, .3, .2) has an entropy of 1.030 nats, .937 of log 3.
    networks = discrete_networks((0.5, 0.3, 0.2), (0.0, 0.0, 0.0), [(0.0, 0.0, 0.0)])
    learner = RLPD(networks, RLPDConfig(discrete_entropy=share, target_entropy=77.0), seeded())
    before = learner.log_temperature.item()
    learner.update_actor(discrete_batch(0), NOTHING_ELSE)
    assert (learner.log_temperature.item() > before) == rises


def test_discrete_extraction_by_hand() -> None:
    policy, behaviour = (0.5, 0.3, 0.2), (0.2, 0.2, 0.6)
    networks = discrete_networks(policy, (1.0, -2.0, 4.0), [])
    extraction = Extraction(networks, ExtractionConfig(weight=0.5), seeded())
    with torch.no_grad():
        for parameter in extraction.mixture.parameters():
            parameter.zero_()
        parameter.copy_(torch.tensor(behaviour).log())
    batch = discrete_batch(1)
    two = torch.tensor(2.0)
    penalty = Penalty(lambda o, t, a: a @ torch.tensor([0.1, 0.0, 0.9]), two)
    value, distance = extraction.actor_loss(batch, NO_NOISE, networks.q, (penalty,))
    kl_by_hand = sum(p * math.log(p / b) for p, b in zip(policy, behaviour, strict=True))
    assert distance.item() == pytest.approx(kl_by_hand, rel=1e-5)
    assert value.item() == pytest.approx(-0.7 / 1.9 + 2.0 * 0.23 + 0.5 * kl_by_hand, rel=1e-5)
    careful, distance = extraction.actor_loss(batch, NO_NOISE, None, (penalty,))
    assert distance.item() == pytest.approx(kl_by_hand, rel=1e-5)
    assert careful.item() == pytest.approx(2.0 * 0.23 + 0.5 * kl_by_hand, rel=1e-5)
    # One logged action: its weight is 1 after normalisation, whatever the advantage.
    (loss,) = extraction.mixture_loss(batch, torch.tensor([3.0]), (penalty,), None)
    assert loss.item() == pytest.approx(-math.log(0.2), rel=1e-5)


def test_discrete_extraction_has_the_closed_form_optimum() -> None:
    """pi* ~ p exp((Q/|Q| - lambda risk) / weight): the gradient is zero there alone."""
    behaviour, q = torch.tensor([0.2, 0.2, 0.6]), (1.0, 1.0, -1.0)  # |Q| is 1 under any policy
    risks = torch.tensor([0.3, 0.0, 0.1])
    best = behaviour * ((torch.tensor(q) - 2.0 * risks) / 0.5).exp()

    def gradient_at(probabilities: Tensor) -> float:
        networks = discrete_networks(tuple(probabilities.tolist()), q, [])
        extraction = Extraction(networks, ExtractionConfig(weight=0.5), seeded())
        with torch.no_grad():
            for parameter in extraction.mixture.parameters():
                parameter.zero_()
            parameter.copy_(behaviour.log())
        penalty = Penalty(lambda o, t, a: a @ risks, torch.tensor(2.0))
        loss, _ = extraction.actor_loss(discrete_batch(0), NO_NOISE, networks.q, (penalty,))
        *_, bias = networks.actor.parameters()
        return torch.autograd.grad(loss, bias)[0].abs().max().item()

    assert gradient_at(best / best.sum()) < 1e-6
    assert gradient_at(torch.tensor([0.3, 0.3, 0.4])) > 0.01


def test_discrete_extraction_compares_state_by_state() -> None:
    networks = Networks(OBSERVATIONS, ACTIONS, SMALL, seeded(), kind_for(discrete=True))
    extraction = Extraction(networks, ExtractionConfig(), seeded(1))
    batch = make_batch(discrete=True)
    flat = lambda o, a: a.sum(-1).expand(2, -1)  # noqa: E731
    _, divergence = extraction.actor_loss(batch, batch.actions, flat, ())
    behaviour = Categorical(torch.log_softmax(extraction.mixture["layers"](batch.observations), -1))
    expected = categorical(networks.actor, batch.observations).divergence(behaviour).mean()
    torch.testing.assert_close(divergence, expected.detach())
