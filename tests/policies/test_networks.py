import pytest
import torch
from torch import nn

from safe_offrl.agents.iql import IQLConfig, IQLValues
from safe_offrl.policies.categorical import Categorical
from safe_offrl.policies.gaussian import Gaussian
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.networks import (
    Actor,
    NetworkConfig,
    Networks,
    StackedLinear,
    StackedMLP,
    polyak_,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(actor: Actor, observations: torch.Tensor) -> Gaussian:
    policy = actor(observations)
    assert isinstance(policy, Gaussian)
    return policy


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(b, a) for b, a in zip(before, after, strict=True)]


def one_member(net: StackedMLP, member: int, inputs: int, hidden: int, norm: bool) -> nn.Module:
    """A plain torch network with the weights of one member."""
    layers: list[nn.Module] = [nn.Linear(inputs, hidden)]
    layers += [nn.LayerNorm(hidden)] if norm else []
    layers += [nn.ReLU(), nn.Linear(hidden, 1)]
    plain = nn.Sequential(*layers)
    linear = [x for x in plain if isinstance(x, nn.Linear)]
    stacked = [x for x in [*net.hidden, net.output] if isinstance(x, StackedLinear)]
    with torch.no_grad():
        for to, source in zip(linear, stacked, strict=True):
            to.weight.copy_(source.weight[member].T)
            to.bias.copy_(source.bias[member, 0])
    return plain


@pytest.mark.parametrize("norm", [True, False])
def test_every_member_is_a_plain_network(norm: bool) -> None:
    net = StackedMLP(3, 5, (8,), layer_norm=norm, generator=seeded())
    inputs = torch.randn(7, 5, generator=seeded(1))
    outputs = net(inputs)
    assert outputs.shape == (3, 7)
    for member in range(3):
        plain = one_member(net, member, 5, 8, norm)
        torch.testing.assert_close(outputs[member], plain(inputs)[:, 0])


def test_selected_members_are_a_network_of_their_own() -> None:
    net = StackedMLP(5, 4, (8, 8), layer_norm=True, generator=seeded())
    inputs, states = torch.randn(7, 4, generator=seeded(1)), torch.randn(7, 3, generator=seeded(2))
    actions = torch.randn(6, 7, 1, generator=seeded(3))
    some = net.select(slice(2, None))
    assert some.members == 3
    torch.testing.assert_close(some(inputs), net(inputs)[2:])
    torch.testing.assert_close(
        some.over_actions(states, actions), net.over_actions(states, actions)[2:]
    )
    before = some(inputs)
    with torch.no_grad():
        net.output.bias.add_(1.0)
    assert torch.equal(some(inputs), before)


def test_members_are_independent() -> None:
    net = StackedMLP(3, 5, (8,), layer_norm=True, generator=seeded())
    inputs = torch.randn(7, 5, generator=seeded(1))
    outputs = net(inputs)
    assert not torch.allclose(outputs[0], outputs[1])
    gradient = torch.autograd.grad(outputs[1].sum(), list(net.parameters()))
    assert all(g[0].abs().max() == 0 and g[2].abs().max() == 0 for g in gradient)


def test_layer_norm_bounds_what_the_critic_says_far_away() -> None:
    near = torch.randn(20, 5, generator=seeded(1))
    bounded = StackedMLP(2, 5, (16,), layer_norm=True, generator=seeded())
    unbounded = StackedMLP(2, 5, (16,), layer_norm=False, generator=seeded())
    # |output| <= |bias| + |weight| sqrt(width), however far the input is.
    last = bounded.output
    limit = last.bias.abs().amax() + last.weight.norm(dim=1).amax() * 4.0
    assert bounded(1e6 * near).abs().max() <= limit
    assert unbounded(1e6 * near).abs().max() > 1e4


@pytest.mark.parametrize("layer_norm", [True, False])
def test_the_settings_decide_about_layer_norm_in_critics_and_value(layer_norm: bool) -> None:
    sizes = NetworkConfig((8,), (16,), 2, layer_norm=layer_norm)
    networks = Networks(3, 2, sizes, seeded())
    value = IQLValues(networks, IQLConfig(), seeded()).value
    far = 1e6 * torch.randn(20, 5, generator=seeded(1))
    for net, inputs in (
        (networks.critics, far),
        (networks.target_critics, far),
        (value, far[:, :3]),
    ):
        assert (net(inputs).abs().max() < 10.0) == layer_norm


def test_the_generator_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first = Networks(3, 2, NetworkConfig((8,), (8,), 2), seeded())
    torch.manual_seed(2)
    second = Networks(3, 2, NetworkConfig((8,), (8,), 2), seeded())
    for name in ("actor", "critics", "target_critics"):
        assert all(same(weights(getattr(first, name)), weights(getattr(second, name))))


def test_actor_log_std_stays_in_its_range_with_a_gradient() -> None:
    actor = Actor(3, 2, (8,), seeded())
    mean, log_std = gaussian(actor, 1e3 * torch.randn(50, 3, generator=seeded(1)))
    assert mean.shape == log_std.shape == (50, 2)
    assert -5.0 <= log_std.min() < log_std.max() <= 2.0
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.zero_()
    mean, log_std = gaussian(actor, torch.zeros(1, 3))
    assert mean.tolist() == [[0.0, 0.0]]
    assert log_std.tolist() == [[-1.5, -1.5]]  # the middle of [-5, 2]
    *_, bias = actor.parameters()
    assert torch.autograd.grad(log_std.sum(), bias)[0][2:].min() > 1.0


def test_a_discrete_actor_gives_log_probabilities() -> None:
    actor = Actor(3, 4, (8,), seeded(), kind_for(discrete=True))
    *_, bias = actor.parameters()
    assert bias.shape == (4,)
    policy = actor(torch.randn(5, 3, generator=seeded(1)))
    assert isinstance(policy, Categorical)
    torch.testing.assert_close(policy.log_probs.exp().sum(-1), torch.ones(5))
    networks = Networks(3, 4, NetworkConfig((8,), (8,), 2), seeded(), kind_for(discrete=True))
    assert networks.actor.kind.name == "categorical"


def test_polyak_moves_the_target_by_tau() -> None:
    target = StackedMLP(2, 3, (4,), layer_norm=True, generator=seeded(0))
    online = StackedMLP(2, 3, (4,), layer_norm=True, generator=seeded(1))
    before, source = weights(target), weights(online)
    polyak_(target, online, 0.25)
    for b, s, a in zip(before, source, weights(target), strict=True):
        torch.testing.assert_close(a, 0.75 * b + 0.25 * s)
        assert not torch.equal(a, b)
    assert all(same(source, weights(online)))


def test_members_can_be_asked_for() -> None:
    net = StackedMLP(4, 5, (8, 8), layer_norm=True, generator=seeded())
    inputs = torch.randn(7, 5, generator=seeded(1))
    whole = net(inputs)
    torch.testing.assert_close(net(inputs, slice(1, None)), whole[1:])
    torch.testing.assert_close(net(inputs, torch.tensor([3, 0])), whole[[3, 0]])


@pytest.mark.parametrize("hidden", [(8, 8), (8,), ()])
def test_many_actions_at_a_state_are_the_same_as_one_by_one(hidden: tuple[int, ...]) -> None:
    networks = Networks(3, 2, NetworkConfig((8,), hidden, 4), seeded())
    observations = torch.randn(7, 3, generator=seeded(1))
    actions = torch.randn(5, 7, 2, generator=seeded(2))
    together = networks.q_of_actions(observations, actions)
    assert together.shape == (4, 5, 7)
    for k in range(5):
        torch.testing.assert_close(together[:, k], networks.q(observations, actions[k]))


def test_the_target_starts_equal_and_gets_no_gradient() -> None:
    networks = Networks(3, 2, NetworkConfig((8,), (8,), 2), seeded())
    o, a = torch.randn(4, 3), torch.randn(4, 2, requires_grad=True)
    torch.testing.assert_close(networks.q(o, a).detach(), networks.target_q(o, a))
    assert not networks.target_q(o, a).requires_grad
    assert not any(p.requires_grad for p in networks.target_critics.parameters())
