"""How much less a logged action counts that is risky: the same for all who imitate the log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safe_offrl.agents.steering import Penalty
from safe_offrl.policies.protocol import Quadrature
from safe_offrl.types import Batch

LARGEST_EXPONENT = 60.0  # of a weight: a batch of them can still be summed in float32


class Aversion(NamedTuple):
    """Of one limit: a logged action weighs ``exp(-weight Q_C)``.

    ``relative`` takes ``Q_C - V_C``, how much riskier it is than the policy's own action.
    """

    weight: float
    relative: bool


@torch.no_grad()
def risk_averse(
    weights: Tensor,
    batch: Batch,
    penalties: Sequence[Penalty],
    aversions: Sequence[Aversion],
    policy: Quadrature | None,
) -> Tensor:
    """Weights [B] of a batch's logged actions times ``exp(-sum aversion Q_C)``, of mean 1.

    ``aversions`` are one a penalty; ``policy`` is the own action at the batch's observations, which
    a relative risk is relative to. Where there is no penalty the weights stay as they are.
    """
    if not penalties:
        return weights
    danger = torch.zeros_like(weights)
    for (risk, _), aversion in zip(penalties, aversions, strict=True):
        of_action = risk(batch.observations, batch.time_to_go, batch.actions)
        if aversion.relative:
            assert policy is not None
            observations = policy.repeat(batch.observations)
            time_to_go = policy.repeat(batch.time_to_go)
            of_action = of_action - policy.expect(risk(observations, time_to_go, policy.actions))
        danger = danger + aversion.weight * of_action
    # Normalised below: where some action is far less risky, no weight need overflow.
    danger = danger - (danger.min() + LARGEST_EXPONENT).clamp_max(0.0)
    weights = weights * (-danger).exp()
    return weights / weights.mean().clamp_min(1e-6)
