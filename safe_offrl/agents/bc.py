"""BC-Safe: behaviour cloning of the log's safe episodes (the baseline of DSRL, Liu et al. 2023,
arXiv:2306.09303, and of CDT, arXiv:2302.07351).

Offline only: it learns no values, and what is below the limit in the log is all it can know of
safety. The critics that the online phase starts from are learnt afterwards, by alignment.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import EAGER, Compute, Descent
from safe_offrl.compute.state import Part
from safe_offrl.policies.networks import Actor
from safe_offrl.types import Batch


@dataclass(frozen=True)
class BCConfig:
    """Settings of behaviour cloning."""

    learning_rate: float = 3e-4


class BC:
    """Maximum likelihood of logged actions."""

    def __init__(self, actor: Actor, config: BCConfig, compute: Compute = EAGER) -> None:
        self.actor = actor
        self.optimizer = Adam(actor.parameters(), config.learning_rate)
        self._descend = Descent(self.loss, self.optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {"actor": self.actor, "actor_optimizer": self.optimizer}

    def loss(self, batch: Batch) -> tuple[Tensor]:
        """``-log pi(a|s)`` of logged actions, mean over the batch."""
        return (-self.actor(batch.observations).log_prob(batch.actions).mean(),)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the actor."""
        return {"actor/loss": self._descend(batch)[0]}
