"""What every agent must do, and problems so small that the right answer is known.

Parametrised over AGENTS: a new agent is tested by its line in the registry.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safe_offrl.agents import AGENTS, Agent, AgentConfigs
from safe_offrl.agents.cql import CQL, CQLConfig
from safe_offrl.agents.extraction import Extraction, ExtractionConfig
from safe_offrl.agents.iql import IQL, IQLConfig
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.distributions import kl
from safe_offrl.nets import Actor, NetworkConfig, Networks
from safe_offrl.state import Part, collect_state, restore_state
from safe_offrl.types import Batch, Layout

OBSERVATIONS, ACTIONS, SIZE, MEMBERS = 3, 2, 16, 4
LAYOUT = Layout(OBSERVATIONS, ACTIONS)
SMALL = NetworkConfig((16,), (16,), MEMBERS)
FAST = 3e-3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(size: int = SIZE, seed: int = 0) -> Batch:
    g = seeded(seed)
    return Batch(
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


def no_risk(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
    return torch.sigmoid(actions.sum(-1)) * 0.0


def risk_of_going_right(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
    return torch.sigmoid(4.0 * actions[:, 0])


@dataclass
class Setup:
    """An offline agent or the online learner, with one step of training as the loops do it."""

    networks: Networks
    parts: dict[str, Part]
    step: Callable[[Batch], None]
    update_values: Callable[[Batch], None]
    losses: Callable[[Batch], None]


def networks_of(layout: Layout, sizes: NetworkConfig, generator: torch.Generator) -> Networks:
    return Networks(layout.observation_size, layout.action_size, sizes, generator)


def offline(
    name: str,
    seed: int = 0,
    layout: Layout = LAYOUT,
    *,
    sizes: NetworkConfig = SMALL,
    configs: AgentConfigs | None = None,
    extraction: ExtractionConfig | None = None,
) -> Setup:
    configs = configs or AgentConfigs()
    extraction = extraction or ExtractionConfig()
    generator = seeded(seed)
    networks = networks_of(layout, sizes, generator)
    agent = AGENTS[name](networks, layout, sizes, configs, generator)
    extractor = Extraction(networks.actor, *layout, sizes.actor_hidden, extraction, generator)
    multiplier = torch.tensor(1.0)

    def step(batch: Batch) -> None:
        advantages, _ = agent.update(batch, generator)
        extractor.update(batch, advantages, networks.q, no_risk, multiplier, generator)

    def losses(batch: Batch) -> None:
        b = len(batch.rewards)
        if isinstance(agent, IQL):
            agent.value_loss(batch, torch.zeros(b))
            agent.critic_loss(batch)
        else:
            cql_loss(agent, batch)
        extractor.mixture_loss(batch, torch.zeros(b), torch.zeros(b))
        noise = torch.randn(batch.actions.shape, generator=seeded(5))
        extractor.actor_loss(batch, noise, networks.q, no_risk, multiplier)

    return Setup(
        networks,
        {**agent.parts(), **extractor.parts(), "generator": generator},
        step,
        lambda batch: void(agent.update(batch, generator)),
        losses,
    )


def void(_: object) -> None:
    pass


def make_rlpd(config: RLPDConfig | None = None, sizes: NetworkConfig = SMALL) -> RLPD:
    networks = networks_of(LAYOUT, sizes, seeded())
    return RLPD(networks, ACTIONS, config or RLPDConfig())


def online(
    seed: int = 0,
    layout: Layout = LAYOUT,
    *,
    sizes: NetworkConfig = SMALL,
    config: RLPDConfig | None = None,
) -> Setup:
    generator = seeded(seed)
    networks = networks_of(layout, sizes, generator)
    learner = RLPD(networks, layout.action_size, config or RLPDConfig())
    one = torch.tensor(1.0)

    def step(batch: Batch) -> None:
        learner.update_critics(batch, generator)
        learner.update_actor(batch, no_risk, one, None, one, generator)

    def losses(batch: Batch) -> None:
        noise = torch.randn(batch.actions.shape, generator=seeded(5))
        learner.critic_loss(batch, noise, torch.tensor([0, 1]))
        learner.actor_loss(batch, noise, no_risk, one, networks.actor, one)

    return Setup(
        networks,
        {**learner.parts(), "generator": generator},
        step,
        lambda batch: void(learner.update_critics(batch, generator)),
        losses,
    )


MAKERS: dict[str, Callable[..., Setup]] = {
    **{name: (lambda n: lambda **kw: offline(n, **kw))(name) for name in AGENTS},
    "rlpd": online,
}
everyone = pytest.mark.parametrize("name", list(MAKERS))


def tensors(setup: Setup) -> dict[str, Tensor]:
    return collect_state(setup.parts)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


# --- what holds for every agent ---


@everyone
def test_loss_functions_change_nothing(name: str) -> None:
    setup = MAKERS[name]()
    setup.step(make_batch())
    before = tensors(setup)
    batch = make_batch(seed=1)
    copy = Batch(*(x.clone() for x in batch))
    global_state = torch.get_rng_state()
    setup.losses(batch)
    assert_equal(tensors(setup), before)
    assert all(torch.equal(a, b) for a, b in zip(batch, copy, strict=True))
    assert torch.equal(torch.get_rng_state(), global_state)


@everyone
@pytest.mark.parametrize("field", ["rewards", "terminated"])
def test_wrong_shapes_are_refused(name: str, field: str) -> None:
    batch = make_batch()
    bad = batch._replace(**{field: getattr(batch, field).unsqueeze(-1)})
    with pytest.raises(ValueError, match="expected equal shapes"):
        MAKERS[name]().step(bad)


@everyone
def test_state_round_trip_continues_bitwise(name: str) -> None:
    setup, other = MAKERS[name](seed=0), MAKERS[name](seed=1)
    for i in range(3):
        setup.step(make_batch(seed=i))
    other.step(make_batch(seed=9))
    restore_state(other.parts, tensors(setup))
    for i in range(3):
        setup.step(make_batch(seed=i))
        other.step(make_batch(seed=i))
    assert_equal(tensors(setup), tensors(other))


@everyone
def test_every_trained_tensor_is_in_one_optimiser_and_moves(name: str) -> None:
    setup = MAKERS[name]()
    optimisers = [p for p in setup.parts.values() if isinstance(p, torch.optim.Optimizer)]
    held = [id(p) for o in optimisers for group in o.param_groups for p in group["params"]]
    trained: dict[str, Tensor] = {
        f"{part}.{key}": parameter
        for part, module in setup.parts.items()
        if isinstance(module, nn.Module)
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    trained |= {
        part: tensor
        for part, tensor in setup.parts.items()
        if isinstance(tensor, Tensor) and tensor.requires_grad
    }
    assert sorted(held) == sorted(id(p) for p in trained.values())
    before = {key: p.detach().clone() for key, p in trained.items()}
    setup.step(make_batch())
    still = [key for key, p in trained.items() if torch.equal(p, before[key])]
    assert not still
    module_names = {part for part, x in setup.parts.items() if isinstance(x, nn.Module)}
    assert {"actor", "critics", "target_critics"} <= module_names


@everyone
def test_target_networks_move_by_tau(name: str) -> None:
    setup = MAKERS[name]()
    networks = setup.networks
    before = [p.clone() for p in networks.target_critics.parameters()]
    setup.update_values(make_batch())
    online_now = list(networks.critics.parameters())
    tau = 5e-3  # of all three defaults
    for b, o, now in zip(before, online_now, networks.target_critics.parameters(), strict=True):
        torch.testing.assert_close(now, b + tau * (o - b), atol=1e-7, rtol=1e-5)
        assert not torch.equal(now, b)


@everyone
def test_updating_the_values_leaves_the_actor(name: str) -> None:
    setup = MAKERS[name]()
    before = [p.detach().clone() for p in setup.networks.actor.parameters()]
    setup.update_values(make_batch())
    after = setup.networks.actor.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@everyone
def test_the_generator_is_the_only_source_of_randomness(name: str) -> None:
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        setup = MAKERS[name]()
        setup.step(make_batch())
        results.append(tensors(setup))
    assert_equal(*results)


# --- probe problems ---


def probe(name: str, *, observations: int, steps: int, discount: float, source: Batch) -> Setup:
    """Train on uniform batches of ``source`` with small, fast networks; no conservatism."""
    setup = probe_setup(name, observations, discount)
    g = seeded(3)
    for _ in range(steps):
        index = torch.randint(len(source.rewards), (64,), generator=g)
        setup.step(Batch(*(x[index] for x in source)))
    return setup


def probe_setup(name: str, observations: int, discount: float) -> Setup:
    sizes = NetworkConfig((32,), (32,), MEMBERS)
    common: dict[str, Any] = {"learning_rate": FAST, "discount": discount, "tau": 0.05}
    layout = Layout(observations, 1)
    if name == "rlpd":
        config = RLPDConfig(**common, target_entropy=-3.0, temperature_init=1e-3)
        return online(layout=layout, sizes=sizes, config=config)
    configs = AgentConfigs(
        iql=IQLConfig(**common, expectile=0.7),
        cql=CQLConfig(**common, alpha=0.01, actions=4),
    )
    extraction = ExtractionConfig(learning_rate=FAST, weight=0.02)
    return offline(name, layout=layout, sizes=sizes, configs=configs, extraction=extraction)


def transitions(
    observations: Tensor, actions: Tensor, rewards: Tensor, following: Tensor, terminated: Tensor
) -> Batch:
    zeros = torch.zeros_like(rewards)
    # The return-to-go is that of the worst policy, so that Cal-QL's maximum never binds.
    return Batch(
        observations, actions, rewards, zeros, zeros, following, terminated, zeros + 1, zeros - 99
    )


@everyone
def test_bandit_finds_the_best_action(name: str) -> None:
    """One step, reward 1 - 2 (a - 0.5)^2 for a logged uniformly: best is 0.5, Q(a) = reward."""
    actions = torch.linspace(-0.95, 0.95, 500).unsqueeze(-1)
    here = torch.zeros(500, 1)
    reward = 1.0 - 2.0 * (actions[:, 0] - 0.5).square()
    source = transitions(here, actions, reward, here, torch.ones(500))
    setup = probe(name, observations=1, steps=600, discount=0.9, source=source)
    with torch.no_grad():
        mean, log_std = setup.networks.actor(torch.zeros(1, 1))
        q = setup.networks.q(here, actions).mean(0)
    assert torch.tanh(mean).item() == pytest.approx(0.5, abs=0.15)
    assert log_std.exp().item() < 0.5
    assert (q - reward).abs().mean().item() < 0.1
    assert actions[q.argmax()].item() == pytest.approx(0.5, abs=0.15)


CHAIN = 200


@everyone
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
    setup = probe(name, observations=2, steps=500, discount=0.7, source=source)
    with torch.no_grad():
        q0 = setup.networks.q(first.expand(CHAIN, -1), actions).mean().item()
        q1 = setup.networks.q(second.expand(CHAIN, -1), actions).mean().item()
    assert q1 == pytest.approx(1.0, abs=0.06)
    assert q0 == pytest.approx(0.7, abs=0.06)


@everyone
def test_truncation_bootstraps_and_termination_does_not(name: str) -> None:
    """Reward 1 for ever, only cut by a time limit: 1 / (1 - .5) = 2; reward 1 and the end: 1."""
    states = torch.eye(2).repeat_interleave(CHAIN, 0)
    terminated = torch.tensor([0.0, 1.0]).repeat_interleave(CHAIN)
    actions = torch.linspace(-1, 1, CHAIN).unsqueeze(-1)
    source = transitions(states, actions.repeat(2, 1), torch.ones(2 * CHAIN), states, terminated)
    setup = probe(name, observations=2, steps=500, discount=0.5, source=source)
    with torch.no_grad():
        q = setup.networks.q(states, actions.repeat(2, 1)).mean(0)
    assert q[:CHAIN].mean().item() == pytest.approx(2.0, abs=0.1)
    assert q[CHAIN:].mean().item() == pytest.approx(1.0, abs=0.1)


# --- IQL ---


def test_iql_value_loss_by_hand() -> None:
    agent = AGENTS["iql"](
        networks_of(Layout(1, 1), SMALL, seeded()), Layout(1, 1), SMALL, AgentConfigs(), seeded()
    )
    assert isinstance(agent, IQL)
    with torch.no_grad():
        for p in agent.value.parameters():
            p.zero_()
    batch = Batch(*(x[:2, :1] if x.ndim == 2 else x[:2] for x in make_batch()))
    # V = 0 everywhere, u = (2, 0) and (-2, 0): .7 * 4 / 2 and .3 * 4 / 2
    assert agent.value_loss(batch, torch.tensor([2.0, 0.0])).item() == pytest.approx(1.4)
    assert agent.value_loss(batch, torch.tensor([-2.0, 0.0])).item() == pytest.approx(0.6)


def test_iql_uses_the_minimum_target_critic_and_the_new_value() -> None:
    networks = networks_of(LAYOUT, SMALL, seeded())
    agent = AGENTS["iql"](networks, LAYOUT, SMALL, AgentConfigs(), seeded())
    assert isinstance(agent, IQL)
    batch = make_batch()
    q = networks.target_q(batch.observations, batch.actions).amin(0)
    advantages, _ = agent.update(batch, seeded())
    torch.testing.assert_close(advantages, q - agent.value(batch.observations)[0])


# --- CQL and Cal-QL ---


def make_cql(*, calibrated: bool = False, alpha: float = 5.0, k: int = 4) -> CQL:
    networks = networks_of(LAYOUT, SMALL, seeded())
    return CQL(networks, CQLConfig(alpha=alpha, actions=k), calibrated=calibrated)


def cql_loss(agent: Agent, batch: Batch, k: int = 4) -> Tensor:
    assert isinstance(agent, CQL)
    g = seeded(4)
    many = (k, *batch.actions.shape)
    noise = (torch.randn(many, generator=g), torch.randn(many, generator=g))
    uniform = 2.0 * torch.rand(many, generator=g) - 1.0
    return agent.critic_loss(batch, torch.randn(many[1:], generator=g), noise, uniform)[0]


def cql_gradients(agent: CQL, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """d loss / d Q: at logged actions [E, B], policy actions [E, 2K, B], uniform ones [E, K, B]."""
    seen: list[tuple[Tensor, Tensor]] = []
    q_of = agent.networks.q

    def spy(observations: Tensor, actions: Tensor) -> Tensor:
        q = q_of(observations, actions)
        q.retain_grad()
        seen.append((q, observations))
        return q

    agent.networks.q = spy  # type: ignore[method-assign]
    cql_loss(agent, batch).backward()
    ((q, observations),) = seen
    # Trap: all actions are evaluated at the CURRENT state.
    torch.testing.assert_close(observations, batch.observations.repeat(13, 1))
    assert q.grad is not None
    gradient = q.grad.unflatten(1, (13, SIZE))
    return gradient[:, 0], gradient[:, 1:9], gradient[:, 9:]


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
        loss = learner.critic_loss(batch, noise, torch.tensor(members))
        assert loss.item() == pytest.approx(MEMBERS * (0.99 * least) ** 2)


def test_rlpd_draws_members_without_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_rlpd()
    drawn: list[tuple[int, ...]] = []
    loss = learner.critic_loss

    def spy(batch: Batch, noise: Tensor, members: Tensor) -> Tensor:
        drawn.append(tuple(sorted(members.tolist())))
        return loss(batch, noise, members)

    monkeypatch.setattr(learner, "critic_loss", spy)
    generator, batch = seeded(), make_batch()
    for _ in range(100):
        learner.update_critics(batch, generator)
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
    learner.actor_loss(batch, noise, None, zero, None, zero)[0].backward()
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
    mean, log_std = learner.networks.actor(batch.observations)

    def loss(risk: bool, anchored: Actor | None, weight: Tensor) -> Tensor:
        chosen = (lambda o, t, a: 0.25 + 0.0 * a.sum(-1)) if risk else None
        return learner.actor_loss(batch, noise, chosen, two, anchored, weight)[0]

    plain = loss(False, None, zero)
    torch.testing.assert_close(loss(True, None, zero), plain + 2.0 * 0.25)
    distance = kl(mean, log_std, *anchor(batch.observations)).mean()
    assert distance > 0.0
    torch.testing.assert_close(loss(False, anchor, three), plain + 3.0 * distance)
    torch.testing.assert_close(loss(False, learner.networks.actor, three), plain)
    warmer = make_rlpd(RLPDConfig(temperature_init=1.5))
    value, log_prob = warmer.actor_loss(batch, noise, None, zero, None, zero)
    torch.testing.assert_close(value, plain + (1.5 - 0.5) * log_prob)


@pytest.mark.parametrize(("target", "rises"), [(50.0, True), (-50.0, False)])
def test_temperature_rises_while_entropy_is_too_low(target: float, rises: bool) -> None:
    learner = make_rlpd(RLPDConfig(target_entropy=target))
    before = learner.log_temperature.item()
    zero = torch.tensor(0.0)
    learner.update_actor(make_batch(), None, zero, None, zero, seeded())
    assert (learner.log_temperature.item() > before) == rises


# --- extraction ---


def extract(
    risk: Callable[[Tensor, Tensor, Tensor], Tensor], multiplier: float, steps: int
) -> Actor:
    """The log goes left (-.8) or right (+.8) around an obstacle; the critics do not care."""
    actor = Actor(1, 1, (32,), seeded(0))
    config = ExtractionConfig(learning_rate=5e-3)
    extraction = Extraction(actor, 1, 1, (32,), config, seeded(1))
    g = seeded(2)
    side = torch.where(torch.arange(64) % 2 == 0, 0.8, -0.8).unsqueeze(-1)
    zeros, here = torch.zeros(64), torch.zeros(64, 1)
    for _ in range(steps):
        actions = side + 0.05 * torch.randn(64, 1, generator=g)
        batch = transitions(here, actions, zeros, here, zeros)
        extraction.update(
            batch,
            zeros,
            lambda _, a: (1.0 + 0.0 * a.sum(-1)).expand(2, -1),
            risk,
            torch.tensor(multiplier),
            g,
        )
    return actor


def test_two_ways_around_are_not_averaged_into_the_obstacle() -> None:
    # Until the mixture has found both ways the actor is wide; then it falls into one of them.
    mean, log_std = extract(no_risk, 0.0, 1200)(torch.zeros(1, 1))
    assert abs(torch.tanh(mean).item()) == pytest.approx(0.8, abs=0.1)
    assert log_std.exp().item() < 0.4


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_safer_way_is_taken(direction: float) -> None:
    def risk(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
        return risk_of_going_right(observations, time_to_go, direction * actions)

    mean, _ = extract(risk, 3.0, 500)(torch.zeros(1, 1))
    assert torch.tanh(mean).item() == pytest.approx(-0.8 * direction, abs=0.1)
