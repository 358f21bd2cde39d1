"""Behaviour cloning: maximum likelihood of logged actions, of all or of safe episodes.

``bc`` fits a mixture to the whole log, of which a Gaussian would average "left" and "right".
``bc_safe`` fits a Gaussian to the safe episodes (BC-Safe, the baseline of DSRL, Liu et al. 2023,
arXiv:2306.09303, and of CDT, arXiv:2302.07351): what is below the limit in the log is all it can
know of safety. Neither learns values: the critics that the online phase starts from are learnt
afterwards, by alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import uniform_batches
from safe_offrl.errors import DataError
from safe_offrl.limits import Limit
from safe_offrl.policies.categorical import CATEGORICAL
from safe_offrl.policies.mixture import MIXTURE
from safe_offrl.policies.protocol import require_density
from safe_offrl.types import Batch


@dataclass(frozen=True)
class BCConfig:
    """Settings of behaviour cloning, which has no values to discount."""

    learning_rate: float = 3e-4
    discount: float | None = None


def safe_episodes(dataset: Dataset, limits: Sequence[Limit], agent: str = "bc_safe") -> Dataset:
    """The episodes within every limit: of an accident limit those without one.

    DataError if there is none to imitate.
    """
    safe = np.ones(dataset.episodes, dtype=bool)
    for limit in limits:
        costs = dataset.under(limit).episode_costs
        outcomes = limit.quantity.select(dataset.episode_accidents, costs)
        safe &= outcomes <= limit.value
    if not safe.any():
        which = "the limit" if len(limits) == 1 else "every limit"
        raise DataError(
            f"No episode of the dataset is within {which}, so {agent} has nothing to imitate. "
            "Raise the limit, or take another agent."
        )
    return dataset.subset(np.flatnonzero(safe))


class BC:
    """Maximum likelihood of logged actions."""

    Config = BCConfig
    Online: type[OnlineAgent] | None = None
    kinds = (MIXTURE, CATEGORICAL)

    def __init__(self, setup: Setup, config: BCConfig, name: str = "bc") -> None:
        self.actor = setup.networks.actor
        require_density(self.actor.kind, f"The likelihood that {name} maximises")
        self.optimizer = Adam(self.actor.parameters(), config.learning_rate)
        self._descend = Descent(self.loss, self.optimizer, setup.compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {"actor": self.actor, "actor_optimizer": self.optimizer}

    def loss(self, batch: Batch) -> tuple[Tensor]:
        """``-log pi(a|s)`` of logged actions, mean over the batch."""
        return (-self.actor.density(batch.observations).log_prob(batch.actions).mean(),)

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the actor; nothing else steers it."""
        return {"actor/loss": self._descend(batch)[0]}


class BCSafe:
    """The same of the actions in safe episodes, from which it draws its own batches."""

    Config = BCConfig
    Online: type[OnlineAgent] | None = None

    def __init__(self, setup: Setup, config: BCConfig, name: str = "bc_safe") -> None:
        self.bc = BC(setup, config, name)
        self.parts, self.generator = self.bc.parts, setup.generator
        self.imitated = safe_episodes(setup.dataset, setup.limits, name).on(self.generator.device)

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the actor, on a batch of safe episodes as large as this one."""
        rows, layout = self.imitated.rows, self.imitated.layout
        (safe,) = uniform_batches(rows, layout, 1, len(batch.rewards), self.generator)
        return self.bc.update(safe, steering)
