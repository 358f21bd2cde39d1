"""The tanh-Gaussian policy as functions of (mean, log_std, noise); no distribution objects.

An action is ``tanh(mean + exp(log_std) * noise)``, one independent Gaussian per action dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_STD_MIN = -5.0
LOG_STD_MAX = 2.0


def sample(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Reparameterised action and its log density.

    Shapes: mean, log_std [..., A], noise broadcastable to them -> action [..., A], log_prob [...].
    The log-Jacobian of tanh is ``2 (log 2 - u - softplus(-2u))``, exact where ``log(1 - a^2)``
    underflows (SAC, arXiv:1801.01290, appendix C, in its stable form).
    """
    pre_tanh = mean + log_std.exp() * noise
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
    log_jacobian = 2.0 * (math.log(2.0) - pre_tanh - F.softplus(-2.0 * pre_tanh))
    return torch.tanh(pre_tanh), (gaussian - log_jacobian).sum(-1)


def log_prob(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """Log density of given actions [..., A] -> [...]; |a| is kept below 1 so that atanh is
    finite.
    """
    pre_tanh = torch.atanh(actions.clamp(-1.0 + 1e-5, 1.0 - 1e-5))
    noise = (pre_tanh - mean) / log_std.exp()
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
    log_jacobian = 2.0 * (math.log(2.0) - pre_tanh - F.softplus(-2.0 * pre_tanh))
    return (gaussian - log_jacobian).sum(-1)


def kl(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """KL(p || q) of two tanh-Gaussians in nats, [..., A] -> [...].

    tanh is a bijection, so this equals the KL of the Gaussians before it:
    ``log(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2``, summed over action dimensions.
    """
    variance_ratio = (2.0 * (log_std_p - log_std_q)).exp()
    shift = ((mean_p - mean_q) / log_std_q.exp()).square()
    return (log_std_q - log_std_p + 0.5 * (variance_ratio + shift - 1.0)).sum(-1)
