"""Models of the log's behaviour: a mixture density network (Bishop 1994) of several ways to act.

A Gaussian that imitates "pass left" and "pass right" drives into the obstacle between them; a
mixture of them holds both. Discrete actions need none: a categorical holds any mixture of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Compute, Descent
from safe_offrl.compute.state import Part
from safe_offrl.policies.mlp import linear_layers
from safe_offrl.policies.networks import Networks
from safe_offrl.policies.protocol import BehaviourModel, require_density
from safe_offrl.types import Batch


class BehaviourMixture:
    """The network of a model, as large as the actor's, and what it says."""

    def __init__(
        self, networks: Networks, components: int, generator: torch.Generator, user: str
    ) -> None:
        """ConfigError in the name of its ``user`` where policies have no density."""
        self._density = require_density(networks.actor.kind, user)
        self._components = components
        o, a = networks.layout.sizes
        outputs = self._density.behaviour_outputs(a, components)
        widths = (*networks.sizes.actor_hidden, outputs)
        # The name is that which its parameters have in a checkpoint.
        self.network = nn.ModuleDict({"layers": linear_layers(o, widths, generator)})

    def __call__(self, observations: Tensor) -> BehaviourModel:
        """The model at observations [B, O]."""
        return self._density.behaviour(self.network["layers"](observations), self._components)


class FittedBehaviour:
    """One that learns by maximum likelihood of all logged actions, each as much as any other."""

    def __init__(
        self,
        networks: Networks,
        components: int,
        learning_rate: float,
        generator: torch.Generator,
        compute: Compute,
        user: str,
    ) -> None:
        self.model = BehaviourMixture(networks, components, generator, user)
        self.optimizer = Adam(self.model.network.parameters(), learning_rate)
        self._descend = Descent(self.loss, self.optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {"behaviour": self.model.network, "behaviour_optimizer": self.optimizer}

    def loss(self, batch: Batch) -> tuple[Tensor]:
        """``-log pi_b(a|s)`` of logged actions, mean over the batch."""
        return (-self.model(batch.observations).log_prob(batch.actions).mean(),)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step; scalars to log."""
        return {"agent/behaviour_loss": self._descend(batch)[0]}
