import math

import pytest
import torch
from torch import Tensor

from safe_offrl.policies.distributions import (
    Categorical,
    Gaussian,
    Quadrature,
    kl,
    log_prob,
    sample,
)


def d(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def action_grid(n: int = 400_001) -> Tensor:
    """Actions [n, 1] between -1 and 1, without the edges."""
    edge = 1.0 - 1e-5
    return torch.linspace(-edge, edge, n, dtype=torch.float64).unsqueeze(-1)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.3, 0.5), (-1.2, 0.2)])
def test_log_prob_integrates_to_one(mean: float, std: float) -> None:
    grid = action_grid()
    density = log_prob(d(mean), d(math.log(std)), grid).exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("p", "q"),
    [((0.0, 1.0), (0.0, 1.0)), ((0.3, 0.5), (-0.2, 0.8)), ((-0.2, 0.8), (0.3, 0.5))],
)
def test_kl_against_numerical_integration(p: tuple[float, float], q: tuple[float, float]) -> None:
    """Integrated over ACTIONS, so that the invariance under tanh is part of what is tested."""
    grid = action_grid()
    log_p = log_prob(d(p[0]), d(math.log(p[1])), grid)
    log_q = log_prob(d(q[0]), d(math.log(q[1])), grid)
    integral = torch.trapezoid(log_p.exp() * (log_p - log_q), grid[:, 0])
    closed = kl(d(p[0]), d(math.log(p[1])), d(q[0]), d(math.log(q[1])))
    assert closed.item() == pytest.approx(integral.item(), abs=1e-3)


def test_kl_by_hand() -> None:
    # KL(N(1, 1) || N(0, 2)) = log 2 + (1 + 1) / 8 - 1/2; a second dimension that agrees adds 0.
    value = kl(d(1, 0.7), d(0, -1), d(0, 0.7), d(math.log(2), -1))
    assert value.item() == pytest.approx(math.log(2) - 0.25)
    # ... and the other direction: -log 2 + (4 + 1) / 2 - 1/2
    value = kl(d(0, 0.7), d(math.log(2), -1), d(1, 0.7), d(0, -1))
    assert value.item() == pytest.approx(2.0 - math.log(2))
    assert kl(d(0, 0), d(0, 0), d(1, 2), d(0, 0)).item() == pytest.approx(2.5)  # 1/2 + 4/2


def test_the_log_density_of_a_sample() -> None:
    # At noise 0, mean 0, std 1: phi(0) / (1 - 0) in each of two dimensions.
    action, density = sample(d(0, 0), d(0, 0), d(0, 0))
    assert action.tolist() == [0.0, 0.0]
    assert density.item() == pytest.approx(-math.log(2 * math.pi))
    # At u = 1: log phi(1) - log(1 - tanh(1)^2)
    _, density = sample(d(0), d(0), d(1))
    expected = -0.5 - 0.5 * math.log(2 * math.pi) - math.log(1 - math.tanh(1) ** 2)
    assert density.item() == pytest.approx(expected)


def test_sample_and_log_prob_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_std, noise = torch.randn(3, 50, 2, generator=generator, dtype=torch.float64)
    actions, density = sample(mean, log_std - 1.0, noise)
    inside = (actions.abs() < 1.0 - 1e-5).all(-1)
    assert inside.sum() > 40
    torch.testing.assert_close(log_prob(mean, log_std - 1.0, actions)[inside], density[inside])


def test_samples_follow_mean_and_std() -> None:
    noise = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0))
    actions, _ = sample(torch.tensor([0.4]), torch.tensor([-1.0]), noise)
    before = torch.atanh(actions)
    assert before.mean().item() == pytest.approx(0.4, abs=0.01)
    assert before.std().item() == pytest.approx(math.exp(-1), abs=0.01)


def test_saturated_actions_stay_finite() -> None:
    action, density = sample(d(30, -30), d(0, 0), d(0, 0))
    assert action.tolist() == [1.0, -1.0]
    assert math.isfinite(density.item())  # log(1 - a^2) would be -inf
    assert math.isfinite(log_prob(d(0), d(0), d(1)).item())


# --- what both forms of a policy have in common ---


def categorical(*probabilities: list[float]) -> Categorical:
    return Categorical(torch.tensor(probabilities, dtype=torch.float64).log())


def test_quadrature_of_a_gaussian_is_one_sample_and_costs_nothing() -> None:
    policy = Gaussian(d(0.3, -0.1).expand(5, 2), d(-1.0, 0.2).expand(5, 2))
    noise = torch.randn(5, 2, dtype=torch.float64)
    points = policy.quadrature(noise)
    actions, log_probs = sample(*policy, noise)
    torch.testing.assert_close(points.actions, actions)
    torch.testing.assert_close(points.log_probs, log_probs)
    x = torch.randn(5, 3)
    assert points.repeat(x) is x
    assert points.expect(x) is x
    assert points.spread(x) is x


def test_quadrature_of_a_categorical_is_every_action() -> None:
    points = categorical([0.2, 0.5, 0.3], [1.0, 0.0, 0.0]).quadrature()
    # Blocks by action: action 0 at both observations, action 1 at both ...
    assert points.actions.tolist() == [[1, 0, 0]] * 2 + [[0, 1, 0]] * 2 + [[0, 0, 1]] * 2
    assert points.log_probs.exp().tolist() == pytest.approx([0.2, 1.0, 0.5, 0.0, 0.3, 0.0])
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
    assert p.kl(q).item() == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5))
    assert q.kl(p).item() == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert p.kl(p).item() == 0.0
    # A probability that underflows is no NaN: 0 log 0 = 0, and log 2 against the even one.
    sure = Categorical(torch.log_softmax(d(0.0, -2000.0).unsqueeze(0), -1))
    assert sure.kl(p).item() == pytest.approx(math.log(2))


def test_kl_of_gaussians_is_the_closed_form() -> None:
    p, q = Gaussian(d(1, 0.7), d(0, -1)), Gaussian(d(0, 0.7), d(math.log(2), -1))
    assert p.kl(q).item() == pytest.approx(math.log(2) - 0.25)
    assert q.kl(p).item() == pytest.approx(2.0 - math.log(2))


def test_forms_are_not_mixed() -> None:
    with pytest.raises(AssertionError):
        categorical([0.5, 0.5]).kl(Gaussian(d(0, 0), d(0, 0)))
    with pytest.raises(AssertionError):
        Gaussian(d(0, 0), d(0, 0)).kl(categorical([0.5, 0.5]))
    assert Quadrature(d(1).unsqueeze(-1), d(0)).weights is None
