"""One-step policies: what they do in torch, in numpy and as a file, and what their KL bounds."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from safe_offrl.deploy.export import FORMATS
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.errors import ConfigError
from safe_offrl.policies.acting import NumpyActor
from safe_offrl.policies.networks import Actor
from safe_offrl.policies.one_step import ONE_STEP, OneStep
from safe_offrl.policies.protocol import require_density, require_entropy
from safe_offrl.safety.acceptance import interpolate, measure_divergence
from tests.policies.test_latent import assert_same_in_a_file, deployed_of

O, A = 3, 2  # noqa: E741


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def actor_of(seed: int = 0) -> Actor:
    actor = Actor(O, A, (16, 16), seeded(seed), ONE_STEP)
    with torch.no_grad():
        last = list(actor.parameters())[-2]
        last.mul_(3.0)
    return actor


def linear(of_state: float, of_z: float, bias: float) -> OneStep:
    """m(s, z) = of_state s + of_z z + bias, at s = 2."""
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[of_state, of_z]]))
        layer.bias.fill_(bias)
    return OneStep(layer, torch.full((1, 1), 2.0))


# --- what it is ---


def test_an_action_is_by_hand() -> None:
    """m = .3 s - .5 z + .2 at s = 2, of z = 1, 0 and 2, and of eps = -2, 0 and 1 with .1 each."""
    policy = linear(0.3, -0.5, 0.2)
    noise = torch.tensor([[[1.0, -2.0]], [[0.0, 0.0]], [[2.0, 1.0]]])
    expected = [math.tanh(u) for u in (0.8 - 0.5 - 0.2, 0.8, 0.8 - 1.0 + 0.1)]
    assert policy.act(noise).flatten().tolist() == pytest.approx(expected)
    quadrature = policy.quadrature(noise[0])
    assert quadrature.actions.tolist() == [[pytest.approx(expected[0])]]
    assert quadrature.weights is None


def test_of_two_actions_each_has_a_z_and_an_eps_of_its_own() -> None:
    """The first half of the noise is z, the second eps."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        layer.bias.zero_()
    action = OneStep(layer, torch.zeros(1, 1)).act(torch.tensor([[0.1, 0.2, 3.0, 4.0]]))
    assert action[0].tolist() == pytest.approx([math.tanh(0.4), math.tanh(0.6)])


def test_it_has_neither_entropy_nor_density() -> None:
    with pytest.raises(ConfigError, match=r'how random .* kind "one_step" does not say\.'):
        require_entropy(ONE_STEP, "The entropy")
    with pytest.raises(ConfigError, match=r'of the kind "one_step" has none\.'):
        require_density(ONE_STEP, "The likelihood")


# --- its divergence ---


def test_given_the_noise_the_kl_is_by_hand() -> None:
    """Of deviation .1 both, means .03 apart at z = 0 and .13 at z = 1: .03^2 / .02, .13^2 / .02."""
    p, q = linear(0.3, -0.5, 0.2), linear(0.3, -0.6, 0.17)
    found = p.divergence_given(q, torch.tensor([[[0.0]], [[1.0]]])).flatten().tolist()
    assert found == pytest.approx([0.0009 / 0.02, 0.0169 / 0.02], rel=1e-4)


def test_over_the_noise_it_is_a_mean_of_always_the_same_antithetic_sample() -> None:
    """A shift alone is exact; of a shift .05 and a slope .2, the product of both cancels out."""
    p = linear(0.3, -0.5, 0.2)
    assert p.divergence(p).tolist() == [0.0]
    assert p.divergence(linear(0.3, -0.5, 0.23)).item() == pytest.approx(0.045, rel=1e-4)
    slope = p.divergence(linear(0.3, -0.3, 0.2)).item()
    assert slope == pytest.approx(0.5 * 2.0**2, rel=0.5)  # of 16 points, not of all
    both = p.divergence(linear(0.3, -0.3, 0.25)).item()
    assert both == pytest.approx(slope + 0.5 * 0.5**2, rel=1e-4)
    assert p.divergence(linear(0.3, -0.3, 0.25)).item() == both


def test_the_dimensions_of_an_action_add_up() -> None:
    """.03 and .04 apart: .0025 / .02."""

    def constant(*means: float) -> OneStep:
        layer = nn.Linear(3, 2)
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor(means))
        return OneStep(layer, torch.zeros(4, 1))

    found = constant(0.5, 0.1).divergence(constant(0.53, 0.06))
    assert found.tolist() == pytest.approx([0.125] * 4, rel=1e-4)


Z = torch.linspace(-5.0, 5.0, 401)
SHARES = torch.softmax(-0.5 * Z.double().square(), dim=0)  # of z that are drawn from N(0, 1)
U = torch.linspace(-8.0, 8.0, 1601).double()  # before tanh, which changes no KL


def histogram(means: Tensor) -> Tensor:
    """Shares of the points U, for m at each of Z."""
    density = torch.exp(-0.5 * ((U - means.double()[:, None]) / 0.1).square())
    return SHARES @ (density / density.sum(1, keepdim=True))


def random_policies(seed: int) -> tuple[OneStep, OneStep]:
    """One of one or two hidden layers, smooth or sharp, and one that is near it or far away."""
    g = seeded(seed)
    p, q = (Actor(1, 1, (16,) * (1 + seed % 2), g, ONE_STEP) for _ in range(2))
    with torch.no_grad():
        sharp = 10.0 ** float(torch.rand((), generator=g))
        for parameter in p.parameters():
            parameter.mul_(sharp).clamp_(-2.0, 2.0)
    q = interpolate(p, q, 10.0 ** (-3.0 * float(torch.rand((), generator=g))))
    at = torch.zeros(1, 1)
    return OneStep(p.layers, at), OneStep(q.layers, at)


@torch.no_grad()
def test_the_kl_of_actions_is_at_most_the_bound() -> None:
    """The data-processing inequality, for a hundred pairs of networks; and the estimate is near."""
    shares, estimates = [], []
    for seed in range(100):
        p, q = random_policies(seed)
        mine, theirs = (histogram(x.means(Z[:, None, None]).flatten()) for x in (p, q))
        assert mine.sum().item() == pytest.approx(1.0)
        found = torch.special.xlogy(mine, mine / theirs.clamp_min(1e-300)).sum().item()
        given = p.divergence_given(q, Z[:, None, None]).flatten().double()
        bound = (SHARES * given).sum().item()
        assert found <= bound * (1.0 + 1e-4) + 1e-6
        shares.append(found / bound)
        estimates.append(p.divergence(q).item() / bound)
    assert np.median(shares) > 0.1  # a bound that is of use
    assert np.median(estimates) == pytest.approx(1.0, abs=0.3)


def test_an_actor_s_divergence_is_measured_at_each_observation() -> None:
    """In both directions it is the same."""
    candidate, previous = actor_of(0), interpolate(actor_of(0), actor_of(1), 0.1)
    found = measure_divergence(candidate, previous, torch.randn(50, O, generator=seeded(1)), 0.95)
    assert found[0].item() == pytest.approx(found[1].item())
    assert found[2].item() == pytest.approx(found[3].item())
    assert 0.0 < found[0].item() < found[2].item()


# --- numpy, files, checkpoints ---


def test_it_acts_in_numpy_as_in_torch() -> None:
    actor, observations = actor_of(), torch.randn(20, O, generator=seeded(1))
    sampler = NumpyActor(actor)
    for observation in observations:
        noise = sampler.noise(6, np.random.default_rng(0))
        assert noise.shape == (6, 2 * A)
        drawn = sampler.draw(observation.numpy(), 6, np.random.default_rng(0))
        with torch.no_grad():
            wanted = actor(observation[None]).act(torch.from_numpy(noise)[:, None])[:, 0]
            mean = torch.tanh(actor.layers(torch.cat([observation, torch.zeros(A)])))
        np.testing.assert_allclose(drawn, wanted.numpy(), atol=2e-6)
        assert drawn.dtype == np.float32
        np.testing.assert_allclose(sampler.mean_action(observation.numpy()), mean, atol=2e-6)


NOT_FINITE = [(place, math.nan) for place in range(6)]
NOT_FINITE += [(5, sign * math.inf) for sign in (1, -1)]  # the last bias


@pytest.mark.parametrize(("place", "value"), NOT_FINITE)
def test_an_action_of_a_network_that_is_not_finite_is_nan(place: int, value: float) -> None:
    actor = actor_of()
    parameters = list(actor.parameters())
    assert len(parameters) == 6
    with torch.no_grad():
        parameters[place].fill_(value)
    drawn = NumpyActor(actor).draw(np.ones(O, np.float32), 5, np.random.default_rng(0))
    assert np.isnan(drawn).all()


def test_a_checkpoint_brings_it_back_with_its_guard() -> None:
    deployed = deployed_of(actor_of())
    kept = DeployedPolicy.restored(deployed.tensors(), deployed.words())
    assert kept.actor.kind is ONE_STEP
    assert kept.sha256 == deployed.sha256
    assert kept.guard is not None
    assert [fallback.kind.name for fallback in kept.guard.fallbacks] == ["gaussian", "one_step"]


@pytest.mark.parametrize("file_format", list(FORMATS))
def test_a_file_does_what_it_does(file_format: str) -> None:
    assert_same_in_a_file(deployed_of(actor_of()), file_format)
