"""Offline policy extraction: mode-seeking, inside the support of the log, and away from accidents.

A Gaussian that imitates "pass left" and "pass right" drives into the obstacle between them. So the
log is imitated by a MIXTURE (a density network, Bishop 1994), which can hold both ways, weighted by
advantage (AWR, arXiv:1910.00177) and by the chance that the action ends well; and the actor is its
reverse-KL projection, which picks one mode and stays inside it, tilted by the critics:

    minimise E_{a ~ pi}[ -Q(s, a)/|Q| + sum lambda Q_C(s, a) ] + weight KL(pi || mixture)

(BRAC's value-free form, arXiv:1911.11361, with a weighted mixture for the behaviour). An action
outside the log's support has a log density that no blind spot of a critic can outweigh. Discrete
actions need no density network: a categorical holds any mixture of them, and the objective is then
exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safe_offrl.agents.aversion import Aversion, risk_averse
from safe_offrl.agents.behaviour import BehaviourMixture
from safe_offrl.agents.steering import Penalty, Steering, steered
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import EAGER, Compute, Descent
from safe_offrl.compute.state import Part
from safe_offrl.limits import Quantity
from safe_offrl.nn.losses import exponential_weight
from safe_offrl.policies.networks import Networks, QFunction
from safe_offrl.types import Batch


@dataclass(frozen=True)
class ExtractionConfig:
    """``weight`` of KL(pi || mixture) against the normalised critics; ``components`` it has.

    ``inverse_temperature`` and ``weight_limit`` are AWR's: exp(inverse_temperature * A), clipped.
    A logged action also weighs ``exp(-risk_aversion Q_C)``: at 10, one of risk .3 counts 1/20.
    ``relative_risk`` takes ``Q_C - V_C``, how much riskier it is than the policy's own action: an
    accident is to be kept away from, but in the middle of a cost the log must still teach the way
    out of it.
    """

    learning_rate: float = 3e-4
    weight: float = 0.1
    components: int = 6
    inverse_temperature: float = 3.0
    risk_aversion: float = 10.0
    relative_risk: bool = False
    weight_limit: float = 100.0

    @property
    def aversion(self) -> Aversion:
        """To what one limit is of."""
        return Aversion(self.risk_aversion, self.relative_risk)


def usual_aversion(quantity: Quantity) -> Aversion:
    """What is usual of a quantity, where no setting says more."""
    words = quantity.pretraining.get("extraction", {})
    return replace(ExtractionConfig(), **words).aversion


class Extraction:
    """Trains the actor of an offline agent that has values; owns the mixture, both optimisers."""

    def __init__(
        self,
        networks: Networks,
        config: ExtractionConfig,
        generator: torch.Generator,
        compute: Compute = EAGER,
        aversions: Sequence[Aversion] = (),
    ) -> None:
        """``aversions`` are one a penalty; without them the settings' is that of the only one."""
        self.networks = networks
        self.actor = networks.actor
        self.config = config
        self._aversions = tuple(aversions) or (config.aversion,)
        self.generator = generator
        user = "The KL from the log in iql, cql and calql"
        self.behaviour = BehaviourMixture(networks, config.components, generator, user)
        self.mixture = self.behaviour.network
        self.mixture_optimizer = Adam(self.mixture.parameters(), config.learning_rate)
        self.actor_optimizer = Adam(self.actor.parameters(), config.learning_rate)
        self._descend_mixture = Descent(self.mixture_loss, self.mixture_optimizer, compute)
        self._descend_actor = Descent(self.actor_loss, self.actor_optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps, besides the actor."""
        return {
            "mixture": self.mixture,
            "mixture_optimizer": self.mixture_optimizer,
            "actor_optimizer": self.actor_optimizer,
        }

    def mixture_loss(
        self,
        batch: Batch,
        advantages: Tensor,
        penalties: tuple[Penalty, ...],
        noise: Tensor | None,
    ) -> tuple[Tensor]:
        """Negative log likelihood of logged actions, weighted by advantage [B] and against risk.

        ``noise`` [B, A] drives the policy's own action, to which a relative risk is relative.
        """
        with torch.no_grad():
            policy = None if noise is None else self.actor(batch.observations).quadrature(noise)
        weight = exponential_weight(
            advantages, self.config.inverse_temperature, self.config.weight_limit
        )
        weight = risk_averse(weight, batch, penalties, self._aversions, policy)
        return (-(weight * self.behaviour(batch.observations).log_prob(batch.actions)).mean(),)

    def actor_loss(
        self, batch: Batch, noise: Tensor, critics: QFunction | None, penalties: tuple[Penalty, ...]
    ) -> tuple[Tensor, Tensor]:
        """The objective of this module's docstring; (loss, mean KL estimate).

        Without ``critics`` reward has no part in it.
        """
        distribution = self.actor(batch.observations)
        policy, log_ratio = self.behaviour(batch.observations).log_ratio(distribution, noise)
        loss = steered(policy, batch, critics, penalties)
        loss = policy.expect(loss + self.config.weight * log_ratio)
        return loss.mean(), policy.expect(log_ratio).detach().mean()

    def update(
        self, batch: Batch, advantages: Tensor | None, steering: Steering
    ) -> dict[str, Tensor]:
        """One step of the mixture, one of the actor.

        Without ``advantages`` neither asks for reward: what is extracted is the least risk.
        """
        size, penalties = batch.actions.shape[:-1], steering.penalties
        critics = None if advantages is None else self.networks.q
        if advantages is None:
            advantages = batch.rewards.new_zeros(size)
        relative = any(aversion.relative for aversion in self._aversions)
        own = self.actor.noise(size, self.generator) if relative else None
        (mixture_loss,) = self._descend_mixture(batch, advantages, penalties, own)
        noise = self.actor.noise(size, self.generator)
        actor_loss, divergence = self._descend_actor(batch, noise, critics, penalties)
        return {
            "actor/loss": actor_loss,
            "actor/kl_to_log": divergence,
            "actor/mixture_loss": mixture_loss,
        }
