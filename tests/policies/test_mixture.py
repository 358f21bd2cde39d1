"""Mixtures: what they do in torch, in numpy and as a file, and what bounds their KL."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from safe_offrl.agents.cql import ConservativeCritics, CQLConfig
from safe_offrl.deploy.export import FORMATS
from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.errors import ConfigError
from safe_offrl.policies.acting import NumpyActor
from safe_offrl.policies.gaussian import GAUSSIAN, Gaussian, Mixture, mixture_of
from safe_offrl.policies.mixture import COMPONENTS, MIXTURE, SquashedMixture
from safe_offrl.policies.networks import Actor, NetworkConfig, Networks
from safe_offrl.policies.protocol import require_density, require_entropy
from tests.policies.test_distributions import action_grid, d
from tests.policies.test_latent import A, O, assert_same_in_a_file, deployed_of, seeded


def mixture(weights: list[float], means: list[float], stds: list[float]) -> SquashedMixture:
    """At one observation, of one number of an action."""
    parts = Gaussian(d(*means).view(1, -1, 1), d(*stds).log().view(1, -1, 1))
    return SquashedMixture(Mixture(d(*weights).log().unsqueeze(0), parts))


def bell(x: float, mean: float, std: float) -> float:
    return math.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2.0 * math.pi))


TWO = mixture([0.25, 0.75], [-1.0, 0.8], [0.5, 0.2])


def density_before(x: float) -> float:
    """Of TWO."""
    return 0.25 * bell(x, -1.0, 0.5) + 0.75 * bell(x, 0.8, 0.2)


# --- what it is ---


def test_its_density_is_by_hand() -> None:
    for x in (-1.3, 0.3, 0.9):
        found = TWO.log_prob(torch.tanh(d(x)).unsqueeze(0)).item()
        assert found == pytest.approx(math.log(density_before(x) / (1.0 - math.tanh(x) ** 2)))


def test_its_density_integrates_to_one() -> None:
    grid = action_grid()
    density = TWO.log_prob(grid.unsqueeze(1)).exp()[:, 0]
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1.0, abs=1e-3)


def noise_of(*rows: tuple[float, float]) -> Tensor:
    """For an action, then for the choice, of each component, [1, M, 2]."""
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(0)


def test_gumbel_noise_chooses_who_acts() -> None:
    """The second is three times as likely: 1.09 is too little for the first, 1.11 enough."""
    draws = [noise_of((2.0, extra), (-1.0, 0.0)) for extra in (1.09, 1.11)]
    actions = TWO.act(torch.stack(draws)).flatten().tolist()
    assert actions == pytest.approx([math.tanh(0.8 - 0.2), math.tanh(-1.0 + 2.0 * 0.5)])
    assert TWO.act(torch.zeros(1, 1, 2, 2)).item() == pytest.approx(math.tanh(0.8))


def test_its_quadrature_has_an_action_of_each_component() -> None:
    """Their densities are the whole mixture's; what the choice is drawn by does not matter."""
    noise = noise_of((2.0, 9.0), (-1.0, -9.0))
    points, densities = TWO.scored(noise)
    actions = [math.tanh(0.0), math.tanh(0.6)]
    for found in (points, TWO.quadrature(noise)):
        assert found.actions.flatten().tolist() == pytest.approx(actions)
        assert found.weights is not None
        assert found.weights.flatten().tolist() == pytest.approx([0.25, 0.75])
    by_hand = [
        math.log(density_before(x) / (1.0 - a * a))
        for x, a in zip((0.0, 0.6), actions, strict=True)
    ]
    assert densities.tolist() == pytest.approx(by_hand)


def test_rows_of_its_quadrature_are_component_by_component() -> None:
    """[K B]: all observations of the first component, then all of the second."""
    parts = Gaussian(torch.arange(6.0).view(3, 2, 1) / 10.0, torch.zeros(3, 2, 1))
    weights = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    policy = SquashedMixture(Mixture(weights.log(), parts))
    points, densities = policy.scored(torch.zeros(3, 2, 2))
    before = [0.0, 0.2, 0.4, 0.1, 0.3, 0.5]
    assert points.actions.flatten().tolist() == pytest.approx([math.tanh(x) for x in before])
    assert points.expect(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 0.0])).tolist() == pytest.approx(
        [0.1, 0.4, 0.9]
    )
    one_by_one = policy.log_prob(points.actions.view(2, 3, 1)).flatten()
    torch.testing.assert_close(densities, one_by_one)


def test_expectations_are_differentiable_in_weights_and_actions() -> None:
    logits, means = d(0.0, 0.0), d(-1.0, 0.8)
    logits.requires_grad_()
    means.requires_grad_()
    parts = Gaussian(means.view(1, 2, 1), d(0.5, 0.2).log().view(1, 2, 1))
    policy = SquashedMixture(Mixture(torch.log_softmax(logits, 0).unsqueeze(0), parts))
    points = policy.quadrature(torch.zeros(1, 2, 2, dtype=torch.float64))
    expected = points.expect(points.actions[:, 0]).sum()
    of_logits, of_means = torch.autograd.grad(expected, (logits, means))
    low, high = math.tanh(-1.0), math.tanh(0.8)
    assert of_logits.tolist() == pytest.approx([(low - high) / 4.0, (high - low) / 4.0])
    assert of_means.tolist() == pytest.approx([0.5 * (1 - low**2), 0.5 * (1 - high**2)])


def test_the_mean_score_is_its_entropy() -> None:
    grid = action_grid()
    log_density = TWO.log_prob(grid.unsqueeze(1))[:, 0]
    entropy = -torch.trapezoid(log_density.exp() * log_density, grid[:, 0]).item()
    parts = TWO.unsquashed.parts
    many = SquashedMixture(
        Mixture(
            TWO.unsquashed.log_weights.expand(50_000, 2),
            Gaussian(parts.mean.expand(50_000, 2, 1), parts.log_std.expand(50_000, 2, 1)),
        )
    )
    noise = torch.randn(50_000, 2, 2, generator=seeded(), dtype=torch.float64)
    points, densities = many.scored(noise)
    assert -points.expect(densities).mean().item() == pytest.approx(entropy, abs=0.01)


def test_it_draws_as_often_as_it_says() -> None:
    """Which is what is drawn in numpy for all who act."""
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(MIXTURE.draw_noise((50_000, 2, 2), rng))
    actions = TWO.act(noise.unsqueeze(1)).flatten()
    assert noise.dtype == torch.float32
    # Below tanh(-.1) are 96.4 % of the first, none of the second: 1.8 deviations above, 4.5 below.
    first = 0.25 * 0.5 * (1.0 + math.erf(1.8 / math.sqrt(2.0)))
    assert (actions < math.tanh(-0.1)).double().mean().item() == pytest.approx(first, abs=0.006)
    of_second = torch.atanh(actions[actions > math.tanh(0.3)])
    assert of_second.mean().item() == pytest.approx(0.8, abs=0.02)
    assert of_second.std().item() == pytest.approx(0.2, abs=0.02)


def test_typical_is_what_a_component_of_some_weight_does() -> None:
    """1.96 deviations; a component of 4 % is none of the policy's ways, one of 6 % is."""
    policy = mixture([0.04, 0.06, 0.9], [-2.0, 0.0, 2.0], [0.1, 0.1, 0.1])
    before = d(-2.0, -0.197, -0.195, 0.195, 0.197, 1.0, 1.805, 2.195, 2.197)
    found = [policy.typical(torch.tanh(x).view(1, 1)).item() for x in before]
    assert found == [False, False, True, True, False, False, True, True, False]


def test_the_ratio_to_a_model_of_the_log_is_by_hand() -> None:
    """Of actions of both components, against a model of the log with other ones."""
    model = mixture([0.5, 0.5], [-0.5, 0.5], [1.0, 1.0]).unsquashed
    points, ratios = model.log_ratio(TWO, noise_of((2.0, 0.0), (-1.0, 0.0)))
    assert points.actions.flatten().tolist() == pytest.approx([0.0, math.tanh(0.6)])
    by_hand = [
        math.log(density_before(x) / (0.5 * bell(x, -0.5, 1.0) + 0.5 * bell(x, 0.5, 1.0)))
        for x in (0.0, 0.6)
    ]
    assert ratios.tolist() == pytest.approx(by_hand)


def test_it_has_an_entropy_and_a_density() -> None:
    require_entropy(MIXTURE, "The entropy")
    assert MIXTURE.target_entropy is not None
    assert MIXTURE.target_entropy(3, -0.5, math.nan) == -1.5
    density = require_density(MIXTURE, "The likelihood")
    assert density.behaviour_outputs(A, 4) == 4 * (1 + 2 * A)
    assert isinstance(density.behaviour(torch.zeros(1, 4 * (1 + 2 * A)), 4), Mixture)


def test_cql_refuses_actions_with_weights() -> None:
    networks = Networks(O, A, NetworkConfig((4,), (4,), 2), seeded(), MIXTURE)
    with pytest.raises(ConfigError, match=r'drawn one by one, .* kind "mixture" .* Take another'):
        ConservativeCritics(networks, CQLConfig(), calibrated=True)


# --- its divergence ---


def test_its_divergence_is_by_hand() -> None:
    p, q = TWO, mixture([0.5, 0.5], [-0.4, 0.8], [1.0, 0.4])
    of_weights = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    first = math.log(2.0) + (0.25 + 0.36) / 2.0 - 0.5
    second = math.log(2.0) + 0.04 / (2.0 * 0.16) - 0.5
    by_hand = of_weights + 0.25 * first + 0.75 * second
    assert p.divergence(q).item() == pytest.approx(by_hand)
    assert p.divergence(p).item() == 0.0


def numerical_kl(p: SquashedMixture, q: SquashedMixture) -> float:
    grid = action_grid(100_001)
    log_p, log_q = (x.log_prob(grid.unsqueeze(1))[:, 0] for x in (p, q))
    return torch.trapezoid(log_p.exp() * (log_p - log_q), grid[:, 0]).item()


def random_mixture(g: torch.Generator) -> SquashedMixture:
    """Of three components, none of which reaches the edge of the grid."""
    uniform = torch.rand(3, 3, generator=g, dtype=torch.float64)
    weights = torch.softmax(3.0 * uniform[0], 0)
    means, stds = 3.0 * uniform[1] - 1.5, torch.exp(1.5 * uniform[2] - 2.0)
    return mixture(weights.tolist(), means.tolist(), stds.tolist())


def test_the_kl_is_at_most_its_divergence() -> None:
    g, shares = seeded(), []
    for _ in range(100):
        p, q = random_mixture(g), random_mixture(g)
        found, bound = numerical_kl(p, q), p.divergence(q).item()
        assert found <= bound + 2e-3
        shares.append(found / bound)
    assert np.median(shares) > 0.05  # also where nothing connects the two


def test_it_is_the_kl_where_an_action_tells_its_component() -> None:
    p = mixture([0.3, 0.7], [-1.2, 1.2], [0.2, 0.15])
    q = mixture([0.6, 0.4], [-1.1, 1.25], [0.25, 0.2])
    assert numerical_kl(p, q) == pytest.approx(p.divergence(q).item(), abs=2e-3)


# --- numpy, files, checkpoints ---


def actor_of(seed: int = 0) -> Actor:
    """A policy with components that are far apart."""
    actor = Actor(O, A, (16, 16), seeded(seed), MIXTURE)
    with torch.no_grad():
        last = actor.layers[-1]  # type: ignore[index]
        last.weight.mul_(5.0)
        last.bias[:COMPONENTS].copy_(torch.linspace(-0.3, 0.3, COMPONENTS))
        last.bias[COMPONENTS:].copy_(torch.linspace(-1.5, 1.0, COMPONENTS * 2 * A))
    return actor


def test_its_network_says_weights_means_and_deviations() -> None:
    """Six logits, then of each component its means, then what log std is made of."""
    outputs = torch.linspace(-1.0, 1.5, COMPONENTS * (1 + 2 * A))
    actor = Actor(1, A, (), seeded(), MIXTURE)
    with torch.no_grad():
        linear = actor.layers[0]  # type: ignore[index]
        linear.weight.zero_()
        linear.bias.copy_(outputs)
    policy = actor(torch.zeros(1, 1))
    assert isinstance(policy, SquashedMixture)
    log_weights, parts = policy.unsquashed
    assert log_weights[0].tolist() == pytest.approx(torch.log_softmax(outputs[:6], 0).tolist())
    assert parts.mean[0, 1].tolist() == pytest.approx(outputs[10:12].tolist())
    wanted = [-5.0 + 3.5 * (math.tanh(x) + 1.0) for x in outputs[12:14].tolist()]
    assert parts.log_std[0, 1].tolist() == pytest.approx(wanted)


def test_it_acts_in_numpy_as_in_torch() -> None:
    actor, observations = actor_of(), torch.randn(20, O, generator=seeded(1))
    sampler, components = NumpyActor(actor), set()
    for observation in observations:
        noise = sampler.noise(50, np.random.default_rng(0))
        assert noise.shape == (50, COMPONENTS, A + 1)
        drawn = sampler.draw(observation.numpy(), 50, np.random.default_rng(0))
        with torch.no_grad():
            policy = actor(observation[None])
            wanted = policy.act(torch.from_numpy(noise)[:, None])[:, 0]
            mean = policy.act(torch.zeros(1, 1, COMPONENTS, A + 1))[0, 0]
        np.testing.assert_allclose(drawn, wanted.numpy(), atol=2e-6)
        assert drawn.dtype == np.float32
        np.testing.assert_allclose(sampler.mean_action(observation.numpy()), mean, atol=2e-6)
        # Without noise it is the mean of the likeliest component.
        assert isinstance(policy, SquashedMixture)
        log_weights, parts = policy.unsquashed
        likeliest = int(log_weights[0].argmax())
        components.add(likeliest)
        torch.testing.assert_close(mean, torch.tanh(parts.mean[0, likeliest]))
    assert len(components) > 1


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


@pytest.mark.parametrize("place", range(COMPONENTS * (1 + 2 * A)))
def test_one_number_of_its_network_that_is_nan_makes_the_action_nan(place: int) -> None:
    """In torch, and so in files, as in numpy; of any component, chosen or not."""
    actor = actor_of()
    *_, bias = actor.parameters()
    with torch.no_grad():
        bias[place] = math.nan
        acted = actor(torch.ones(1, O)).act(torch.zeros(1, 1, COMPONENTS, A + 1))
    drawn = NumpyActor(actor).draw(np.ones(O, np.float32), 5, np.random.default_rng(0))
    assert np.isnan(drawn).all()
    assert acted.isnan().any()  # a graph refuses an action of which a number is not finite


def test_a_checkpoint_brings_it_back_with_its_guard() -> None:
    deployed = deployed_of(actor_of())
    kept = DeployedPolicy.restored(deployed.tensors(), deployed.words())
    assert kept.actor.kind is MIXTURE
    assert kept.sha256 == deployed.sha256
    assert kept.guard is not None
    assert [fallback.kind for fallback in kept.guard.fallbacks] == [GAUSSIAN, MIXTURE]


@pytest.mark.parametrize("file_format", list(FORMATS))
def test_a_file_does_what_it_does(file_format: str) -> None:
    assert_same_in_a_file(deployed_of(actor_of()), file_format)


def test_the_formulas_are_the_model_of_the_log_s() -> None:
    """One density network, before tanh and after it: they differ by the Jacobian alone."""
    outputs = torch.randn(5, 3 * (1 + 2 * A), generator=seeded())
    model = mixture_of(outputs, 3)
    actions = torch.tanh(torch.randn(5, A, generator=seeded(1)))
    jacobian = (1.0 - actions.square()).log().sum(-1)
    after = SquashedMixture(model).log_prob(actions)
    torch.testing.assert_close(after, model.log_prob(actions) - jacobian, rtol=1e-4, atol=1e-4)


def test_kinds_are_not_mixed() -> None:
    with pytest.raises(AssertionError):
        TWO.divergence(Gaussian(d(0), d(0)))  # type: ignore[arg-type]
    assert isinstance(Actor(O, A, (4,), seeded(), MIXTURE).layers, nn.Sequential)
