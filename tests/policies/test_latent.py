"""Latent policies: what they do in torch, in numpy and as a file, and what their KL bounds."""

import copy
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from safe_offrl.deploy.export import FORMATS
from safe_offrl.deploy.graph import PolicyGraph
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.errors import ConfigError
from safe_offrl.policies.acting import NumpyActor
from safe_offrl.policies.gaussian import GAUSSIAN, Gaussian
from safe_offrl.policies.latent import LATENT, Latent, LatentNetwork, generate
from safe_offrl.policies.networks import Actor, StackedMLP
from safe_offrl.policies.protocol import require_density, require_entropy
from safe_offrl.safety.acceptance import interpolate
from safe_offrl.safety.guard import Guard, Watch
from safe_offrl.safety.shield import Shield
from safe_offrl.types import Normalizer

O, A = 3, 2  # noqa: E741


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def actor_of(seed: int = 0, sharp: float = 3.0) -> Actor:
    """A policy that is far from where one begins, and whose generator is no straight line."""
    actor = Actor(O, A, (16, 16), seeded(seed), LATENT)
    network = parts_of(actor)
    with torch.no_grad():
        network.policy[-1].weight.mul_(100.0)  # type: ignore[operator]
        network.generator[-1].weight.mul_(sharp)  # type: ignore[operator]
    return actor


def parts_of(actor: Actor) -> LatentNetwork:
    assert isinstance(actor.layers, LatentNetwork)
    return actor.layers


def latent(actor: Actor, observations: Tensor) -> Latent:
    policy = actor(observations)
    assert isinstance(policy, Latent)
    return policy


def policy_of(mean: float, std: float, generator: nn.Module, size: int = 1) -> Latent:
    over_noise = Gaussian(torch.full((1, size), mean), torch.full((1, size), math.log(std)))
    return Latent(over_noise, generator, torch.zeros(1, 1))


# --- what it is ---


def test_an_action_is_what_the_generator_makes_of_the_noise() -> None:
    """With one linear layer: a = tanh(.5 w - .1 s + .2), w = mean + std noise."""
    generator = nn.Linear(2, 1)
    with torch.no_grad():
        generator.weight.copy_(torch.tensor([[-0.1, 0.5]]))
        generator.bias.fill_(0.2)
    over_noise = Gaussian(torch.tensor([[0.4]]), torch.tensor([[math.log(0.5)]]))
    policy = Latent(over_noise, generator, torch.tensor([[3.0]]))
    noise = torch.tensor([[[0.0]], [[-2.0]], [[100.0]]])  # the last is beyond the reach of F, 3
    expected = [math.tanh(0.5 * w - 0.3 + 0.2) for w in (0.4, -0.6, 3.0)]
    assert policy.act(noise).flatten().tolist() == pytest.approx(expected)
    assert policy.quadrature(noise[1]).actions.tolist() == [[pytest.approx(expected[1])]]
    quadrature, density = policy.scored(noise[1])
    assert quadrature.actions.item() == pytest.approx(expected[1])
    # Of w = mean - 2 std: -2^2 / 2 - log .5 - log(2 pi) / 2, whatever F makes of it.
    by_hand = -2.0 - math.log(0.5) - 0.5 * math.log(2.0 * math.pi)
    assert density.item() == pytest.approx(by_hand)


def test_its_network_says_mean_and_deviation() -> None:
    """Outputs 0.3 and -0.4: the mean is 1.5 tanh(.3), log std -5 + 3.5 (tanh(-.4) + 1)."""
    actor = Actor(1, 1, (), seeded(), LATENT)
    last = parts_of(actor).policy[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.3, -0.4]))
    mean, log_std = latent(actor, torch.zeros(1, 1)).over_noise
    assert mean.item() == pytest.approx(1.5 * math.tanh(0.3))
    assert log_std.item() == pytest.approx(-5.0 + 3.5 * (math.tanh(-0.4) + 1.0))


def test_it_begins_near_the_behaviour() -> None:
    """Within 0.01 nats of N(0, I) at every observation."""
    actor = Actor(O, A, (64, 64), seeded(), LATENT)
    policy = latent(actor, torch.randn(500, O, generator=seeded(1))).over_noise
    zeros = torch.zeros(500, A)
    assert policy.divergence(Gaussian(zeros, zeros)).max().item() < 0.01


def test_its_entropy_is_counted_from_that_of_the_behaviour() -> None:
    """Uniform actions have log 2 a dimension, N(0, 1) has log(2 pi e) / 2."""
    assert LATENT.target_entropy is not None
    normal = 0.5 * math.log(2.0 * math.pi * math.e)
    assert LATENT.target_entropy(3, math.log(2.0), math.nan) == pytest.approx(3 * normal)
    assert LATENT.target_entropy(1, -0.5, math.nan) == pytest.approx(0.2257914)
    noise = torch.randn(100_000, 1, generator=seeded())
    _, density = policy_of(0.7, 1.0, nn.Linear(2, 1)).scored(noise)
    assert -density.mean().item() == pytest.approx(normal, abs=0.01)


def test_it_has_an_entropy_and_no_density() -> None:
    require_entropy(LATENT, "The entropy")
    with pytest.raises(ConfigError, match=r'of the kind "latent" has none\.'):
        require_density(LATENT, "The likelihood")


# --- its divergence ---


def test_its_divergence_is_by_hand() -> None:
    """log(.8 / .5) + (.5^2 + .3^2) / (2 .8^2) - 1/2, in each of two dimensions."""
    generator = nn.Linear(3, 2)
    p, q = policy_of(0.5, 0.5, generator, 2), policy_of(0.2, 0.8, generator, 2)
    expected = 2.0 * (math.log(0.8 / 0.5) + (0.25 + 0.09) / (2.0 * 0.64) - 0.5)
    assert p.divergence(q).item() == pytest.approx(expected)
    assert p.divergence(p).item() == 0.0


W = torch.linspace(-12.0, 12.0, 40_001, dtype=torch.float64)


def weights_of(policy: Latent) -> Tensor:
    """The share of each of the points W under a policy's Gaussian."""
    mean, std = policy.over_noise.mean.double(), policy.over_noise.log_std.double().exp()
    return torch.softmax(-0.5 * ((W - mean[0]) / std[0]).square(), dim=0)


def kl_of_actions(p: Latent, q: Latent, bins: int) -> float:
    """KL of the histograms of their actions, which is no more than that of the actions."""
    with torch.no_grad():
        actions = generate(p.generator, torch.zeros(1, 1), W.float()[:, None, None]).flatten()
    place = ((actions.double() + 1.0) / 2.0 * bins).long().clamp(0, bins - 1)
    mine, theirs = (
        torch.zeros(bins, dtype=torch.float64).index_add_(0, place, weights_of(x)) for x in (p, q)
    )
    found = torch.special.xlogy(mine, mine / theirs.clamp_min(1e-300))
    return float(found.sum())


def random_policies(seed: int) -> tuple[Latent, Latent]:
    """Two of one generator: of one or two hidden layers, smooth or sharp, as chance has it."""
    g = seeded(seed)
    hidden = (16,) * int(1 + seed % 2)
    generator = parts_of(Actor(1, 1, hidden, g, LATENT)).generator
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(10.0 ** float(torch.rand((), generator=g)))
    means = (3.0 * torch.rand(2, generator=g) - 1.5).tolist()
    stds = torch.exp(1.5 * torch.rand(2, generator=g) - 1.5).tolist()
    p, q = (policy_of(m, s, generator) for m, s in zip(means, stds, strict=True))
    return p, q


def test_the_kl_of_actions_is_at_most_the_kl_over_the_noise() -> None:
    """The data-processing inequality, for a hundred generators."""
    shares = []
    for seed in range(100):
        p, q = random_policies(seed)
        found, bound = kl_of_actions(p, q, bins=1000), p.divergence(q).item()
        assert found <= bound * (1.0 + 1e-4) + 1e-5
        shares.append(found / bound)
    assert np.median(shares) > 0.3  # a bound that is of use


def test_they_are_the_same_where_an_action_tells_its_noise() -> None:
    """F(w) = tanh(w / 4) can be inverted, and hardly any of the noise lies beyond its reach."""
    generator = nn.Linear(2, 1)
    with torch.no_grad():
        generator.weight.copy_(torch.tensor([[0.0, 0.25]]))
        generator.bias.zero_()
    p, q = policy_of(0.3, 0.4, generator), policy_of(-0.2, 0.6, generator)
    assert kl_of_actions(p, q, bins=4000) == pytest.approx(p.divergence(q).item(), rel=1e-3)


# --- numpy, files, checkpoints ---


def test_it_acts_in_numpy_as_in_torch() -> None:
    actor, observations = actor_of(), torch.randn(20, O, generator=seeded(1))
    sampler = NumpyActor(actor)
    for observation in observations:
        noise = sampler.noise(6, np.random.default_rng(0))
        assert noise.shape == (6, A)
        drawn = sampler.draw(observation.numpy(), 6, np.random.default_rng(0))
        with torch.no_grad():
            wanted = actor(observation[None]).act(torch.from_numpy(noise)[:, None])[:, 0]
            mean = actor(observation[None]).act(torch.zeros(1, 1, A))[0, 0]
        np.testing.assert_allclose(drawn, wanted.numpy(), atol=2e-6)
        assert drawn.dtype == np.float32
        np.testing.assert_allclose(sampler.mean_action(observation.numpy()), mean, atol=2e-6)
    # Beyond the reach of the generator too.
    far = 100.0 * torch.randn(6, A, generator=seeded(2))
    with torch.no_grad():
        wanted = actor(observations[:1]).act(far[:, None])[:, 0]
    drawn = LATENT.in_numpy(actor.layers)(observations[0].numpy(), far.numpy())
    np.testing.assert_allclose(drawn, wanted.numpy(), atol=2e-6)
    # Without noise it is what the generator makes of the mean.
    over_noise = latent(actor, observations).over_noise
    of_mean = generate(parts_of(actor).generator, observations, over_noise.mean)
    assert torch.equal(actor(observations).act(torch.zeros(1, 20, A))[0], of_mean)


NOT_FINITE = [(place, math.nan) for place in range(12)]
NOT_FINITE += [(place, sign * math.inf) for place in (5, 11) for sign in (1, -1)]  # last biases


@pytest.mark.parametrize(("place", "value"), NOT_FINITE)
def test_an_action_of_a_network_that_is_not_finite_is_nan(place: int, value: float) -> None:
    actor = actor_of()
    parameters = list(actor.parameters())
    assert len(parameters) == 12
    with torch.no_grad():
        parameters[place].fill_(value)
    drawn = NumpyActor(actor).draw(np.ones(O, np.float32), 5, np.random.default_rng(0))
    assert np.isnan(drawn).all()


def deployed_of(actor: Actor) -> DeployedPolicy:
    """Behind a shield that acts and a guard with fallbacks of two kinds."""
    g = seeded(4)
    net = StackedMLP(2, O + 1 + A, (8,), layer_norm=True, generator=g).requires_grad_(False)
    watch = Watch("accident", 0.002, net, 1.0, spends=False)
    guard = Guard([Actor(O, A, (8,), g), copy.deepcopy(actor)], [watch])
    normalizer = Normalizer(np.full(O, 0.1, np.float32), np.full(O, 2.0, np.float32))
    return DeployedPolicy.from_actor(actor, Shield(net, 6, 0.0, acts=True), normalizer, 3, guard)


def test_a_checkpoint_brings_it_back_with_its_guard() -> None:
    deployed = deployed_of(actor_of())
    kept = DeployedPolicy.restored(deployed.tensors(), deployed.words())
    assert kept.actor.kind is LATENT
    assert kept.sha256 == deployed.sha256
    assert kept.guard is not None
    assert deployed.guard is not None
    assert kept.guard.sha256 == deployed.guard.sha256
    assert [fallback.kind for fallback in kept.guard.fallbacks] == [GAUSSIAN, LATENT]
    assert not any(p.requires_grad for p in parts_of(kept.actor).generator.parameters())
    # Runs of earlier versions have fallbacks of the policy's own kind, and do not say so.
    words = deployed.guard.words()
    alike = Guard([actor_of(1), actor_of(2)], deployed.guard.watches)
    words = {k: v for k, v in alike.words().items() if k != "kinds"}
    again = Guard.restored(alike.tensors(), words, (O, A), LATENT)
    assert again.sha256 == alike.sha256


@pytest.mark.parametrize("file_format", list(FORMATS))
def test_a_file_does_what_it_does(file_format: str) -> None:
    assert_same_in_a_file(deployed_of(actor_of()), file_format)


def assert_same_in_a_file(deployed: DeployedPolicy, file_format: str) -> None:
    """With some actions that are replaced and some that are handed over."""
    graph = PolicyGraph(deployed, spaces.Box(-1.0, 1.0, (A,)))
    run = FORMATS[file_format].open(FORMATS[file_format].write(graph))
    rng, rows = np.random.default_rng(0), 50
    seen = rng.standard_normal((rows, O), dtype=np.float32)
    left = rng.random(rows, dtype=np.float32)
    sampler = NumpyActor(deployed.actor)
    noise = np.stack([sampler.noise(6, np.random.default_rng(row)) for row in range(rows)])
    given = run({"observation": seen, "time_to_go": left, "noise": noise.astype(np.float32)})
    acts = [
        deployed.act(deployed.normalizer(seen[row]), float(left[row]), np.random.default_rng(row))
        for row in range(rows)
    ]
    np.testing.assert_allclose(given["action"], np.stack([x.action for x in acts]), atol=1e-5)
    assert given["intervened"].tolist() == [x.replaced for x in acts]
    assert given["handed_over"].tolist() == [x.handed_over for x in acts]
    assert given["intervened"].any()
    assert given["handed_over"].any()


# --- the generator stays ---


def bits(module: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in module.parameters()]


@pytest.mark.parametrize("fraction", [0.7**k for k in range(8)])
def test_between_two_versions_the_generator_is_the_same_bit_for_bit(fraction: float) -> None:
    previous, learner = actor_of(0), actor_of(0)
    with torch.no_grad():
        for parameter in parts_of(learner).policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=seeded(1)))
    between = interpolate(previous, learner, fraction)
    assert bits(parts_of(between).generator) == bits(parts_of(previous).generator)
    assert bits(parts_of(between).policy) != bits(parts_of(previous).policy)
