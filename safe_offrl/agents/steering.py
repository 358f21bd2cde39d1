"""What steers an actor besides its own objective: the same for every algorithm, in both phases."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from safe_offrl.policies.networks import Actor, Risk


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
