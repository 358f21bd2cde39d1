import math

import pytest
import torch
from torch import Tensor

from safe_offrl.policies.categorical import Categorical
from safe_offrl.policies.gaussian import Gaussian, Mixture
from safe_offrl.policies.protocol import Quadrature


def d(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def action_grid(n: int = 400_001) -> Tensor:
    """Actions [n, 1] between -1 and 1, without the edges."""
    edge = 1.0 - 1e-5
    return torch.linspace(-edge, edge, n, dtype=torch.float64).unsqueeze(-1)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.3, 0.5), (-1.2, 0.2)])
def test_log_prob_integrates_to_one(mean: float, std: float) -> None:
    grid = action_grid()
    density = Gaussian(d(mean), d(math.log(std))).log_prob(grid).exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("p", "q"),
    [((0.0, 1.0), (0.0, 1.0)), ((0.3, 0.5), (-0.2, 0.8)), ((-0.2, 0.8), (0.3, 0.5))],
)
def test_kl_against_numerical_integration(p: tuple[float, float], q: tuple[float, float]) -> None:
    """Integrated over ACTIONS, so that the invariance under tanh is part of what is tested."""
    grid = action_grid()
    one, other = (Gaussian(d(mean), d(math.log(std))) for mean, std in (p, q))
    log_p, log_q = one.log_prob(grid), other.log_prob(grid)
    integral = torch.trapezoid(log_p.exp() * (log_p - log_q), grid[:, 0])
    assert one.divergence(other).item() == pytest.approx(integral.item(), abs=1e-3)


def test_kl_of_gaussians_by_hand() -> None:
    # KL(N(1, 1) || N(0, 2)) = log 2 + (1 + 1) / 8 - 1/2; a second dimension that agrees adds 0.
    p, q = Gaussian(d(1, 0.7), d(0, -1)), Gaussian(d(0, 0.7), d(math.log(2), -1))
    assert p.divergence(q).item() == pytest.approx(math.log(2) - 0.25)
    # ... and the other direction: -log 2 + (4 + 1) / 2 - 1/2
    assert q.divergence(p).item() == pytest.approx(2.0 - math.log(2))
    p, q = Gaussian(d(0, 0), d(0, 0)), Gaussian(d(1, 2), d(0, 0))
    assert p.divergence(q).item() == pytest.approx(2.5)  # 1/2 + 4/2


def test_the_log_density_of_a_sample() -> None:
    # At noise 0, mean 0, std 1: phi(0) / (1 - 0) in each of two dimensions.
    points, density = Gaussian(d(0, 0), d(0, 0)).scored(d(0, 0))
    assert points.actions.tolist() == [0.0, 0.0]
    assert density.item() == pytest.approx(-math.log(2 * math.pi))
    # At u = 1: log phi(1) - log(1 - tanh(1)^2)
    _, density = Gaussian(d(0), d(0)).scored(d(1))
    expected = -0.5 - 0.5 * math.log(2 * math.pi) - math.log(1 - math.tanh(1) ** 2)
    assert density.item() == pytest.approx(expected)


def test_sample_and_log_prob_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_std, noise = torch.randn(3, 50, 2, generator=generator, dtype=torch.float64)
    policy = Gaussian(mean, log_std - 1.0)
    (actions, _), density = policy.scored(noise)
    inside = (actions.abs() < 1.0 - 1e-5).all(-1)
    assert inside.sum() > 40
    torch.testing.assert_close(policy.log_prob(actions)[inside], density[inside])


def test_samples_follow_mean_and_std() -> None:
    noise = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    actions = Gaussian(torch.tensor([0.4]), torch.tensor([-1.0])).act(noise)
    before = torch.atanh(actions)
    assert before.mean().item() == pytest.approx(0.4, abs=0.01)
    assert before.std().item() == pytest.approx(math.exp(-1), abs=0.01)


def test_saturated_actions_stay_finite() -> None:
    points, density = Gaussian(d(30, -30), d(0, 0)).scored(d(0, 0))
    assert points.actions.tolist() == [1.0, -1.0]
    assert math.isfinite(density.item())  # log(1 - a^2) would be -inf
    assert math.isfinite(Gaussian(d(0), d(0)).log_prob(d(1)).item())


# --- what both forms of a policy have in common ---


def categorical(*probabilities: list[float]) -> Categorical:
    return Categorical(torch.tensor(probabilities, dtype=torch.float64).log())


def test_quadrature_of_a_gaussian_is_one_sample_and_costs_nothing() -> None:
    policy = Gaussian(d(0.3, -0.1).expand(5, 2), d(-1.0, 0.2).expand(5, 2))
    noise = torch.randn(5, 2, dtype=torch.float64)
    points = policy.quadrature(noise)
    torch.testing.assert_close(
        points.actions, torch.tanh(policy.mean + policy.log_std.exp() * noise)
    )
    torch.testing.assert_close(policy.scored(noise)[0].actions, points.actions)
    x = torch.randn(5, 3)
    assert points.repeat(x) is x
    assert points.expect(x) is x
    assert points.spread(x) is x


def test_quadrature_of_a_categorical_is_every_action() -> None:
    points, log_probs = categorical([0.2, 0.5, 0.3], [1.0, 0.0, 0.0]).scored()
    # Blocks by action: action 0 at both observations, action 1 at both ...
    assert points.actions.tolist() == [[1, 0, 0]] * 2 + [[0, 1, 0]] * 2 + [[0, 0, 1]] * 2
    assert log_probs.exp().tolist() == pytest.approx([0.2, 1.0, 0.5, 0.0, 0.3, 0.0])
    observations = d(7, 8).unsqueeze(-1)
    assert points.repeat(observations)[:, 0].tolist() == [7, 8, 7, 8, 7, 8]
    assert points.repeat(observations[:, 0]).tolist() == [7, 8, 7, 8, 7, 8]
    values = points.repeat(observations)[:, 0] * 10.0 + points.actions @ d(1, 2, 3)
    # .2 * 71 + .5 * 72 + .3 * 73 and 81
    assert points.expect(values).tolist() == pytest.approx([72.1, 81.0])
    two_critics = torch.stack([values, -values])
    assert points.expect(two_critics).tolist() == [
        pytest.approx([72.1, 81.0]),
        pytest.approx([-72.1, -81.0]),
    ]


def test_the_gradient_of_an_expectation_reaches_the_probabilities() -> None:
    # d/dlogit_k sum_a p_a f_a = p_k (f_k - E f); E f = .2 * 1 + .5 * 2 + .3 * 4 = 2.4
    logits = d(0.2, 0.5, 0.3).log().unsqueeze(0).requires_grad_()
    points = Categorical(torch.log_softmax(logits, -1)).quadrature()
    (gradient,) = torch.autograd.grad(points.expect(d(1, 2, 4)).sum(), logits)
    assert gradient[0].tolist() == pytest.approx([0.2 * -1.4, 0.5 * -0.4, 0.3 * 1.6])


def test_spread_weights_average_to_the_weighted_expectation() -> None:
    points = categorical([0.2, 0.5, 0.3], [0.6, 0.4, 0.0]).quadrature()
    values, weights = torch.arange(6.0, dtype=torch.float64), d(0.5, 2.0)
    by_rows = (points.spread(weights) * values).mean()
    assert by_rows.item() == pytest.approx((weights * points.expect(values)).mean().item())
    # by hand: E f = .5 * 2 + .3 * 4 = 2.2 and .6 * 1 + .4 * 3 = 1.8; (.5 * 2.2 + 2 * 1.8) / 2
    assert by_rows.item() == pytest.approx(2.35)


def test_kl_of_categoricals_by_hand() -> None:
    p, q = categorical([0.5, 0.5]), categorical([0.9, 0.1])
    # .5 log(.5/.9) + .5 log(.5/.1) and .9 log(.9/.5) + .1 log(.1/.5)
    assert p.divergence(q).item() == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5))
    assert q.divergence(p).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert p.divergence(p).item() == 0.0
    # A probability that underflows is no NaN: 0 log 0 = 0, and log 2 against the even one.
    sure = Categorical(torch.log_softmax(d(0.0, -2000.0).unsqueeze(0), -1))
    assert sure.divergence(p).item() == pytest.approx(math.log(2))


def test_typical_actions_by_hand() -> None:
    # 95 % of a Gaussian in one dimension lie within 1.96 standard deviations, before tanh.
    policy = Gaussian(d(0.2), d(math.log(0.5)))
    actions = torch.tanh(0.2 + 0.5 * d(-1.97, -1.95, 0.0, 1.95, 1.97)).unsqueeze(-1)
    assert policy.typical(actions).tolist() == [False, True, True, True, False]
    # In two dimensions the radius is sqrt(-2 log .05) = 2.448.
    policy = Gaussian(d(0, 0), d(0, 0))
    assert policy.typical(torch.tanh(d(1.73, 1.73))).item()
    assert not policy.typical(torch.tanh(d(1.74, 1.74))).item()
    choice = categorical([0.9, 0.04, 0.06])
    assert choice.typical(torch.eye(3, dtype=torch.float64)).tolist() == [True, False, True]


def test_draws_of_a_mixture_by_hand() -> None:
    """Weights .2, .5, .3: 0 and .19 choose the first, .2 and .69 the second, .7 the third."""
    means, stds = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[[0.1], [0.2], [0.3]]])
    mixture = Mixture(torch.tensor([[0.2, 0.5, 0.3]]).log(), Gaussian(means, stds.log()))
    uniform = torch.tensor([[0.0], [0.19], [0.21], [0.69], [0.71], [1.0]])
    noise = torch.tensor([1.0, -1.0, 2.0, 0.0, 1.0, -2.0]).view(6, 1, 1)
    drawn = mixture.unsquashed(noise, uniform)
    assert drawn.flatten().tolist() == pytest.approx([1.1, 0.9, 2.4, 2.0, 3.3, 2.4])


def test_draws_of_a_mixture_are_of_their_own_observation() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
    parts = Gaussian(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), torch.zeros(2, 2, 1))
    drawn = Mixture(weights, parts).unsquashed(torch.zeros(3, 2, 1), torch.full((3, 2), 0.5))
    assert drawn[..., 0].tolist() == [[1.0, 4.0]] * 3


def test_forms_are_not_mixed() -> None:
    with pytest.raises(AssertionError):
        categorical([0.5, 0.5]).divergence(Gaussian(d(0, 0), d(0, 0)))  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        Gaussian(d(0, 0), d(0, 0)).divergence(categorical([0.5, 0.5]))  # type: ignore[arg-type]
    assert Quadrature(d(1).unsqueeze(-1)).weights is None
