"""Pure losses and targets: tensors in, tensors out, nothing stepped, nothing stored.

Every per-sample scalar is [B]; shapes that differ are an error, never broadcast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def _require_same_shape(*tensors: Tensor) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"expected equal shapes, got {shapes}")


def td_target(rewards: Tensor, terminated: Tensor, next_values: Tensor, discount: float) -> Tensor:
    """Bellman target ``r + discount * (1 - terminated) * V(s')``. Truncation bootstraps.

    Shapes: [B] -> [B]. Unit: discounted reward.
    """
    _require_same_shape(rewards, terminated, next_values)
    return rewards + discount * (1.0 - terminated) * next_values


def first_accident_target(
    accidents: Tensor, terminated: Tensor, next_time_to_go: Tensor, next_values: Tensor
) -> Tensor:
    """Bellman target for "at least one accident from here to the horizon".

    ``c + (1 - c)(1 - terminated) 1[steps left] V_accident(s')``: undiscounted, the first accident
    is absorbing, and no step is left at the horizon, so values in [0, 1] stay there and are
    probabilities (CSC, arXiv:2010.14497, has the discounted form). An episode that was cut short
    of the horizon still bootstraps. Shapes: [..., B] -> [..., B]. Unit: probability.
    """
    _require_same_shape(accidents, terminated, next_time_to_go, next_values)
    # Rounding must not revive a last step: this is half of one in the longest horizon of float32.
    steps_left = (next_time_to_go > 1e-6).to(next_values.dtype)
    return accidents + (1.0 - accidents) * (1.0 - terminated) * steps_left * next_values


def cost_rate_target(
    costs: Tensor,
    terminated: Tensor,
    next_time_to_go: Tensor,
    next_values: Tensor,
    steps: Tensor,
    discount: float,
) -> Tensor:
    """n-step Bellman target for the discounted share of the largest cost, up to the horizon.

    ``(1 - discount) sum_k<n discount^k c_k + discount^n (1 - terminated) 1[steps left] rho(s_n)``:
    ``costs`` are the discounted sums of the n = ``steps`` costs on the way to s_n, in units of the
    largest cost of a step. A weighted mean of the costs ahead, so values stay in [0, 1] (costs
    beyond the largest are cut off); over the states of an episode they sum to its cost but for the
    first 1 / (1 - discount) steps, see :mod:`safe_offrl.safety.outlook`. Shapes: [..., B].
    """
    _require_same_shape(costs, terminated, next_time_to_go, next_values, steps)
    steps_left = (next_time_to_go > 1e-6).to(next_values.dtype)
    bootstrap = discount**steps
    seen = torch.minimum((1.0 - discount) * costs.clamp_min(0.0), 1.0 - bootstrap)
    return seen + bootstrap * (1.0 - terminated) * steps_left * next_values


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """Asymmetric square ``|expectile - 1(u < 0)| u^2`` (IQL, arXiv:2110.06169, eq. 5), [B]."""
    weight = torch.where(difference < 0.0, 1.0 - expectile, expectile)
    return weight * difference.square()


def exponential_weight(advantage: Tensor, inverse_temperature: float, limit: float) -> Tensor:
    """AWR's ``min(exp(inverse_temperature * A), limit)``, clipped after the exponential, [B]."""
    return (inverse_temperature * advantage).exp().clamp(max=limit)


def conservative_gap(sampled: Tensor, log_densities: Tensor, logged: Tensor) -> Tensor:
    """CQL's regulariser: ``log (1/K sum_k exp(Q_k) / density_k) - Q(s, a_data)`` (eq. 4, CQL(H)).

    Importance-sampled log-integral of exp Q over actions. ``sampled`` [E, B, K] are the critics at
    K actions of the current state, ``log_densities`` [B, K] those actions' log densities under what
    drew them (detached; the Qs are not), ``logged`` [E, B]. Returns [E, B]. Unit: that of Q.
    """
    if sampled.shape[1:] != log_densities.shape or sampled.shape[:2] != logged.shape:
        raise ValueError(
            f"expected sampled [E, B, K], log_densities [B, K], logged [E, B]; got "
            f"{tuple(sampled.shape)}, {tuple(log_densities.shape)}, {tuple(logged.shape)}"
        )
    log_integral = torch.logsumexp(sampled - log_densities.detach(), dim=-1)
    return log_integral - math.log(sampled.shape[-1]) - logged


def calibrate(values: Tensor, return_to_go: Tensor) -> Tensor:
    """Cal-QL's ``max(Q(s, a), return-to-go of the logged trajectory)`` (arXiv:2303.05479, eq. 5.2).

    ``values`` [E, B, K] at POLICY actions only, ``return_to_go`` [B].
    """
    if values.shape[1:2] != return_to_go.shape:
        raise ValueError(f"expected [E, B, K] and [B], got {values.shape}, {return_to_go.shape}")
    return torch.maximum(values, return_to_go[None, :, None])


def accident_td_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of accident logits with a soft target in [0, 1], weighted mean over the batch.

    Its minimiser is the (weighted) mean target, as for the squared error, but a rare accident
    reaches the logit with a gradient that does not vanish. logits [E, B], targets [E, B],
    weights [B] (importance weights of the sampling) -> [E].
    """
    _require_same_shape(logits, targets)
    _require_same_shape(logits[0], weights)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * weights).mean(-1)


def push_up_loss(policy_logits: Tensor, weights: Tensor) -> Tensor:
    """CSC's regulariser, flipped against CQL: risk goes UP at the policy's actions.

    Shapes: [E, B], importance weights [B] -> [E]. ``E_{s ~ D, a ~ pi} [-log Q_C(s, a)]``, the
    cross-entropy with "an accident happens": as if the policy's action had been tried ``alpha pi /
    beta`` more times and failed. With the TD term the minimiser is ``Q* = (y + alpha pi/beta) / (1
    + alpha pi/beta)``: at least y, at most 1, and close to 1 where the log has nothing to say. Only
    the push-up half of CSC (arXiv:2010.14497, eq. 3) is used: its other half lowers the risk of
    LOGGED actions below their target, and a shield compares single actions.
    """
    _require_same_shape(policy_logits[0], weights)
    return (F.softplus(-policy_logits) * weights).mean(-1)


def maximum_mean_discrepancy(first: Tensor, second: Tensor, sigma: float) -> Tensor:
    """How far apart two sets of samples are, 0 if they are the same: [N, B, A], [M, B, A] -> [B].

    ``sqrt(E k(x, x') + E k(y, y') - 2 E k(x, y))`` with the Laplacian kernel
    ``k(x, y) = exp(-|x - y|_1 / (2 sigma))``, over all pairs, a sample with itself included (BEAR,
    arXiv:1906.00949, eq. 1, as in its code, with 1e-6 under the root: its slope at 0 is finite).
    """
    if first.shape[1:] != second.shape[1:]:
        raise ValueError(f"expected [N, B, A] and [M, B, A], got {first.shape}, {second.shape}")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        distance = (x.unsqueeze(0) - y.unsqueeze(1)).abs().sum(-1)
        return (-distance / (2.0 * sigma)).exp().mean((0, 1))

    squared = kernel(first, first) + kernel(second, second) - 2.0 * kernel(first, second)
    return (squared + 1e-6).sqrt()
