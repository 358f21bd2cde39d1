"""What steers an actor besides its own objective: the same for every algorithm, in both phases."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from safe_offrl.policies.networks import Actor, QFunction, Risk
from safe_offrl.policies.protocol import Quadrature
from safe_offrl.types import Batch


class Penalty(NamedTuple):
    """What one limit asks of an actor: ``multiplier`` times ``risk``, lambda Q_C."""

    risk: Risk
    multiplier: Tensor  # lambda, a scalar


class Steering(NamedTuple):
    """``penalties``, one a limit, and ``kl_weight`` times ``KL(actor || anchor)``.

    There is no penalty where safety does not steer; without an ``anchor`` that term is left out.
    """

    penalties: tuple[Penalty, ...] = ()
    anchor: Actor | None = None
    kl_weight: Tensor | float = 0.0


def steered(
    policy: Quadrature,
    batch: Batch,
    critics: QFunction | None,
    penalties: tuple[Penalty, ...],
    executed: int | None = None,
) -> Tensor:
    """``-min Q / |Q| + sum lambda Q_C`` of each of a policy's actions at a batch, [K B].

    Q is divided by its mean magnitude under the policy (TD3+BC, arXiv:2106.06860, eq. 5). Without
    ``critics`` reward has no part in it. Of a plan a risk sees the first numbers alone, so many as
    are ``executed``, all by default.
    """
    observations = policy.repeat(batch.observations)
    time_to_go = policy.repeat(batch.time_to_go)
    loss = torch.zeros_like(time_to_go)
    if critics is not None:
        q = critics(observations, policy.actions).amin(0)
        scale = policy.expect(q.detach().abs()).detach().mean().clamp_min(1e-6)
        loss = -q / scale
    for risk, multiplier in penalties:
        loss = loss + multiplier * risk(observations, time_to_go, policy.actions[:, :executed])
    return loss
