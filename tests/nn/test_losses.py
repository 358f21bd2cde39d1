"""Every formula against numbers derived by hand, and the two regularisers against closed forms."""

import math

import pytest
import torch
from torch import Tensor

from safe_offrl.nn.losses import (
    accident_td_loss,
    calibrate,
    conservative_gap,
    expectile_loss,
    exponential_weight,
    first_accident_target,
    maximum_mean_discrepancy,
    push_up_loss,
    td_target,
)


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_td_target_stops_at_termination_only() -> None:
    # 1 + .9 * 10 = 10; after termination nothing follows: 1
    assert td_target(t(1, 1), t(0, 1), t(10, 10), 0.9).tolist() == pytest.approx([10.0, 1.0])


def test_first_accident_target_case_by_case() -> None:
    #         accident  terminated  left  V(s')   target
    cases = [
        (0, 0, 0.5, 0.3, 0.3),  # goes on: what follows
        (1, 0, 0.5, 0.3, 1.0),  # absorbing: 1, not 1.3
        (1, 1, 0.5, 0.3, 1.0),
        (0, 1, 0.5, 0.3, 0.0),  # arrived: nothing can happen any more
        (0, 0, 0.0, 0.3, 0.0),  # last step of the horizon
        (1, 0, 0.0, 0.3, 1.0),  # an accident in the last step still counts
        (0, 0, 3e-8, 0.3, 0.0),  # ... also with float32's rounding of 1 - 99/100 - 1/100
        (0, 0, 1e-4, 0.3, 0.3),  # one step of a horizon of 10000
    ]
    columns = [t(*column) for column in zip(*cases, strict=True)]
    target = first_accident_target(*columns[:4])
    assert target.tolist() == pytest.approx(columns[4].tolist())


def test_absorbing_accident_values_of_a_chain() -> None:
    # s0 -(.5: accident)-> s1 -(.2: accident)-> end, and the episode goes on after an accident.
    # V(s1) = .2, V(s0) = .5 + .5 * .2 = .6; without absorption it would be .5 + .2 = .7.
    v1 = first_accident_target(
        t(*[1] * 2, *[0] * 8), torch.zeros(10), torch.zeros(10), t(*[9] * 10)
    )
    accidents = t(*[1] * 5, *[0] * 5)
    v0 = first_accident_target(accidents, torch.zeros(10), t(*[0.5] * 10), v1.mean().expand(10))
    assert v1.mean().item() == pytest.approx(0.2)
    assert v0.mean().item() == pytest.approx(0.6)


def test_expectile_loss_by_hand() -> None:
    # .7 * 2^2 above, .3 * 2^2 below
    assert expectile_loss(t(2, -2, 0), 0.7).tolist() == pytest.approx([2.8, 1.2, 0.0])


def test_expectile_of_two_points() -> None:
    # .9-expectile of {0, 1}: .1 m = .9 (1 - m), m = .9
    m = torch.tensor(0.9, requires_grad=True)
    (gradient,) = torch.autograd.grad(expectile_loss(t(0, 1) - m, 0.9).sum(), m)
    assert gradient.item() == pytest.approx(0.0, abs=1e-6)


def test_exponential_weight_is_clipped_after_the_exponential() -> None:
    weight = exponential_weight(t(0, 1, 3, -1), 2.0, 100.0)
    assert weight.tolist() == pytest.approx([1.0, math.e**2, 100.0, math.e**-2])


def test_calibrate_is_a_maximum_per_state() -> None:
    values = t(1, 2, 3, 4).view(1, 2, 2)  # two states, two actions
    assert calibrate(values, t(1.5, 3.5)).flatten().tolist() == [1.5, 2.0, 3.5, 4.0]


# --- CQL's gap ---


def test_conservative_gap_by_hand() -> None:
    # log 1/2 (e^0 / .5 + e^log 3 / .5) - 1 = log 4 - 1
    q, density = t(0, math.log(3)).view(1, 1, 2), torch.full((1, 2), 0.5)
    gap = conservative_gap(q, density.log(), t(1).view(1, 1))
    assert gap.tolist() == [[pytest.approx(math.log(4) - 1.0)]]


def test_conservative_gap_estimates_the_log_integral() -> None:
    # log of the integral of e^a over [-1, 1] = log(e - 1/e), whatever the actions are drawn from.
    generator = torch.Generator().manual_seed(0)
    uniform = 2.0 * torch.rand(200_000, generator=generator) - 1.0
    tilted = 1.0 - 2.0 * torch.rand(200_000, generator=generator).sqrt()  # density (1 - a) / 2
    for actions, density in [(uniform, torch.full_like(uniform, 0.5)), (tilted, (1 - tilted) / 2)]:
        gap = conservative_gap(actions.view(1, 1, -1), density.log().view(1, -1), t(0).view(1, 1))
        assert gap.item() == pytest.approx(math.log(math.e - 1 / math.e), abs=0.01)


BETA = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)  # the log's actions at one state
LOGGED = torch.tensor([0, 0, 1, 2])  # a batch in which they have exactly these shares
ALPHA = 0.3


def gap_gradient(q: Tensor, y: Tensor, sign: float, drawn: Tensor | None) -> Tensor:
    """Gradient of 1/2 E_beta (Q - y)^2 + sign * alpha * gap over a table Q [3].

    ``drawn`` None evaluates each action once (the log-integral); else [4] actions of pi, one a row.
    """
    q = q.clone().requires_grad_()
    if drawn is None:
        sampled, densities = q.expand(1, 4, 3), torch.full((4, 3), -math.log(3), dtype=q.dtype)
    else:
        sampled, densities = q[drawn].view(1, 4, 1), torch.zeros(4, 1, dtype=q.dtype)
    gap = conservative_gap(sampled, densities, q[LOGGED].unsqueeze(0))
    loss = 0.5 * (q - y)[LOGGED].square().mean() + sign * ALPHA * gap.mean()
    return torch.autograd.grad(loss, q)[0]


def test_gap_closed_form_in_its_expectation_form() -> None:
    """One action of pi per row: the gap is Q(a_pi) - Q(a_data), Q* = y - alpha (pi / beta - 1)."""
    y = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    drawn = torch.tensor([0, 1, 1, 2])
    pi = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    best = y - ALPHA * (pi / BETA - 1.0)
    assert gap_gradient(best, y, 1.0, drawn).abs().max() < 1e-12
    assert gap_gradient(best, y, -1.0, drawn).abs().max() > 0.1  # the flipped sign, elsewhere:
    risky = y + ALPHA * (pi / BETA - 1.0)
    assert gap_gradient(risky, y, -1.0, drawn).abs().max() < 1e-12
    # The value of pi is too low by alpha * chi2(pi || beta) for returns, too high for accidents.
    chi2 = ((pi - BETA).square() / BETA).sum()
    assert (pi @ best).item() == pytest.approx((pi @ y - ALPHA * chi2).item())
    assert (pi @ risky).item() == pytest.approx((pi @ y + ALPHA * chi2).item())


def test_gap_closed_form_in_its_log_integral_form() -> None:
    """All actions in one row: pi is softmax(Q) itself, Q* = y - alpha (softmax(Q*) / beta - 1)."""
    best = torch.tensor([0.4, -0.7, 1.1], dtype=torch.float64)
    shift = ALPHA * (best.softmax(0) / BETA - 1.0)
    assert gap_gradient(best, best + shift, 1.0, None).abs().max() < 1e-12
    assert gap_gradient(best, best + shift, -1.0, None).abs().max() > 0.05
    assert gap_gradient(best, best - shift, -1.0, None).abs().max() < 1e-12


# --- the safety critic's push-up ---


def push_gradient(q: Tensor, y: Tensor, w: Tensor, sign: float) -> Tensor:
    """Gradient of E_beta BCE(Q, y) + sign * alpha E_pi[-log Q] over the logits of a table Q [3]."""
    logits = q.logit().requires_grad_()
    td = accident_td_loss(logits[LOGGED].unsqueeze(0), y[LOGGED].unsqueeze(0), torch.ones(4))
    # w = pi / beta per logged row turns the mean over the log into one over pi.
    push = push_up_loss(logits[LOGGED].unsqueeze(0), w[LOGGED])
    return torch.autograd.grad((td + sign * ALPHA * push).sum(), logits)[0]


def test_push_up_closed_form() -> None:
    """Q* = (y + alpha w) / (1 + alpha w), w = pi / beta: from y to 1, near 1 where pi is new."""
    y = torch.tensor([0.1, 0.6, 0.0], dtype=torch.float64)
    w = torch.tensor([0.2, 0.4, 3.2], dtype=torch.float64)  # pi = (.1, .1, .8)
    best = (y + ALPHA * w) / (1.0 + ALPHA * w)
    assert push_gradient(best, y, w, 1.0).abs().max() < 1e-12
    assert push_gradient(best, y, w, -1.0).abs().max() > 0.01
    assert bool(((best > y) & (best < 1.0)).all())
    assert best[2].item() == pytest.approx(0.96 / 1.96)


def test_push_up_raises_risk() -> None:
    logits = t(-2.0, 3.0).view(1, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(push_up_loss(logits, torch.ones(2)).sum(), logits)
    assert bool((gradient < 0.0).all())  # descending raises both logits
    assert push_up_loss(logits, torch.ones(2)).item() == pytest.approx(
        0.5 * (math.log1p(math.e**2) + math.log1p(math.e**-3))
    )
    # 1 * log(1 + e^2) and 3 * log(1 + e^-3), by weight
    assert push_up_loss(logits, t(1, 3)).item() == pytest.approx(
        0.5 * (math.log1p(math.e**2) + 3.0 * math.log1p(math.e**-3))
    )


def test_accident_td_loss_is_a_weighted_cross_entropy() -> None:
    loss = accident_td_loss(t(0, 0).view(1, 2), t(1, 0).view(1, 2), t(0.5, 2.0))
    assert loss.tolist() == pytest.approx([0.5 * (0.5 + 2.0) * math.log(2)])
    # Minimiser: the weighted mean of the targets, (.5 * 1 + 2 * 0) / 2.5 = .2
    logit = torch.tensor(0.2).logit().requires_grad_()
    loss = accident_td_loss(logit.expand(1, 2), t(1, 0).view(1, 2), t(0.5, 2.0))
    assert torch.autograd.grad(loss.sum(), logit)[0].item() == pytest.approx(0.0, abs=1e-7)


def test_maximum_mean_discrepancy_by_hand() -> None:
    """Two states, two action dimensions; k(x, y) = exp(-|x - y|_1 / 4) for sigma = 2."""
    first = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 0.0]]])
    second = torch.tensor([[[1.0, 0.0], [1.0, -2.0]]])
    # First state: {0, 2} against {1}. Second: {(0, 0)} twice against {(1, -2)}, 3 away.
    squared = [
        (2.0 + 2.0 * math.exp(-0.5)) / 4.0 + 1.0 - 2.0 * math.exp(-0.25),
        1.0 + 1.0 - 2.0 * math.exp(-0.75),
    ]
    by_hand = [math.sqrt(x + 1e-6) for x in squared]
    found = maximum_mean_discrepancy(first, second, 2.0)
    assert found.tolist() == pytest.approx(by_hand, rel=1e-4)
    torch.testing.assert_close(maximum_mean_discrepancy(second, first, 2.0), found)


def test_the_same_samples_are_no_distance_apart_and_have_a_slope() -> None:
    x = torch.tensor([[[0.3]], [[-1.0]], [[2.0]]], requires_grad=True)
    found = maximum_mean_discrepancy(x, x.detach().flip(0), 20.0)
    assert found.item() == pytest.approx(1e-3, rel=0.1)  # the root of 1e-6
    assert bool(torch.autograd.grad(found.sum(), x)[0].isfinite().all())


def test_unequal_shapes_are_refused_not_broadcast() -> None:
    b, column = torch.zeros(4), torch.zeros(4, 1)
    for call in (
        lambda: td_target(b, b, column, 0.9),
        lambda: td_target(column, b, b, 0.9),
        lambda: first_accident_target(b, b, b, column),
        lambda: first_accident_target(b, column, b, b),
        lambda: conservative_gap(torch.zeros(2, 4, 3), torch.zeros(3, 4), torch.zeros(2, 4)),
        lambda: conservative_gap(torch.zeros(2, 4, 3), torch.zeros(4, 3), torch.zeros(4)),
        lambda: calibrate(torch.zeros(2, 4, 3), torch.zeros(3)),
        lambda: calibrate(torch.zeros(2, 4, 3), column),
        lambda: accident_td_loss(torch.zeros(2, 4), b, b),
        lambda: accident_td_loss(torch.zeros(2, 4), torch.zeros(2, 4), column),
        lambda: push_up_loss(torch.zeros(4, 4), column),
        lambda: maximum_mean_discrepancy(torch.zeros(2, 4, 1), torch.zeros(2, 1, 1), 1.0),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
