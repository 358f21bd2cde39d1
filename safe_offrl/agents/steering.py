"""What steers an actor besides its own objective: the same for every algorithm, in both phases."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from safe_offrl.policies.networks import Actor, Risk


class Steering(NamedTuple):
    """``multiplier`` times ``risk``, and ``kl_weight`` times ``KL(actor || anchor)``.

    Without a ``risk`` or an ``anchor`` that term is left out; offline there is always a risk.
    """

    risk: Risk | None
    multiplier: Tensor  # lambda, a scalar
    anchor: Actor | None = None
    kl_weight: Tensor | float = 0.0
