"""BEAR (Kumar et al. 2019, arXiv:1906.00949): the best policy within the support of the log.

    maximise E_{a ~ pi} min_e Q_e(s, a)   subject to   MMD(pi, pi_b) - MMD(pi_b, pi_b) <= threshold

by gradient steps on ``-Q/|Q| + sum lambda Q_C + multiplier MMD`` and dual ones on the multiplier.
The MMD, of a few samples before tanh, hardly sees densities: a policy may put all its weight on one
of the log's actions. Of so few it is never 0: two sets of ten of one wide behaviour are .09 apart.
What the behaviour's own are apart is therefore taken off, or the published threshold of .05 could
not be kept by the behaviour itself. Critics learn from the best of ten of the policy's, valued with
some caution:

    y = r + discount (1 - terminated) max_{10 a' ~ pi(s')} [ .75 min_e Q'_e + .25 max_e Q'_e ]

Published with a VAE for pi_b: here it is a mixture, fitted in the same steps. Published, the
policy acts by the best of ten samples, has a target actor, and first learns from the MMD alone:
here it acts as it is, for KL and shield need its density, and learns from both at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safe_offrl.agents.behaviour import FittedBehaviour
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Penalty, Steering, steered
from safe_offrl.agents.td_values import TDValues
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import EAGER, Descent
from safe_offrl.compute.state import Part
from safe_offrl.nn.losses import maximum_mean_discrepancy
from safe_offrl.policies.gaussian import GAUSSIAN, Gaussian, Mixture
from safe_offrl.policies.protocol import Quadrature, normal
from safe_offrl.types import Batch

TARGET_ACTIONS = 10  # at s', of which the best counts
TRUST_IN_THE_LEAST = 0.75  # of the critics; the rest is for the largest
LOG_MULTIPLIER_MIN, LOG_MULTIPLIER_MAX = -5.0, 10.0


@dataclass(frozen=True)
class BEARConfig:
    """Settings of BEAR as published, ``sigma`` of its Laplacian kernel 10 on some tasks.

    ``samples`` of each of policy and behaviour make an MMD, 4 to 10; it is to be below
    ``threshold``. ``components`` of the mixture that is the behaviour.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    threshold: float = 0.05
    sigma: float = 20.0
    samples: int = 10
    multiplier_learning_rate: float = 1e-3
    components: int = 6


class BEAR:
    """Model of the behaviour, values, actor and multiplier, each with an optimiser of its own."""

    Config = BEARConfig
    Online: type[OnlineAgent] | None = None
    kinds = (GAUSSIAN,)

    def __init__(self, setup: Setup, config: BEARConfig) -> None:
        self.networks, self.generator, self.config = setup.networks, setup.generator, config
        lr, self.actor, compute = config.learning_rate, self.networks.actor, setup.compute
        user = "The log's behaviour in bear"
        self.behaviour = FittedBehaviour(
            self.networks, config.components, lr, self.generator, compute, user
        )
        self.values = TDValues(
            self.networks,
            self.generator,
            compute,
            learning_rate=lr,
            discount=config.discount,
            tau=config.tau,
            next_value=self.next_value,
        )
        self.log_multiplier = torch.zeros((), device=self.generator.device, requires_grad=True)
        self.actor_optimizer = Adam(self.actor.parameters(), lr)
        self.multiplier_optimizer = Adam([self.log_multiplier], config.multiplier_learning_rate)
        self._descend_actor = Descent(self.actor_loss, self.actor_optimizer, compute)
        self._descend_multiplier = Descent(
            self.multiplier_loss, self.multiplier_optimizer, replace(EAGER, device=compute.device)
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            **self.values.parts(),
            **self.behaviour.parts(),
            "log_multiplier": self.log_multiplier,
            "actor_optimizer": self.actor_optimizer,
            "multiplier_optimizer": self.multiplier_optimizer,
        }

    def next_value(self, batch: Batch, noise: Tensor) -> Tensor:
        """The maximum of this module's docstring [B], over the actions of noise [K, B, A]."""
        actions = self.actor(batch.next_observations).act(noise)
        q = self.networks.target_critics.over_actions(batch.next_observations, actions)
        trusted = TRUST_IN_THE_LEAST * q.amin(0) + (1.0 - TRUST_IN_THE_LEAST) * q.amax(0)
        return trusted.amax(0)

    def actor_loss(
        self,
        batch: Batch,
        noise: Tensor,
        logged_noise: Tensor,
        uniform: Tensor,
        penalties: tuple[Penalty, ...],
    ) -> tuple[Tensor, Tensor]:
        """The actor's objective, mean over the batch; (loss, mean MMD).

        ``noise`` [N, B, A] drives the policy's samples, of which critics see the first;
        ``logged_noise`` [2 N, B, A] and ``uniform`` [2 N, B] two sets of the log's behaviour.
        """
        policy = self.actor(batch.observations)
        with torch.no_grad():
            behaviour = self.behaviour.model(batch.observations)
            assert isinstance(behaviour, Mixture)
            logged, again = behaviour.unsquashed(logged_noise, uniform).chunk(2)
            its_own = maximum_mean_discrepancy(logged, again, self.config.sigma)
        assert isinstance(policy, Gaussian)
        sampled = policy.unsquashed(noise)
        distance = maximum_mean_discrepancy(sampled, logged, self.config.sigma) - its_own
        loss = steered(Quadrature(torch.tanh(sampled[0])), batch, self.networks.q, penalties)
        loss = loss + self.log_multiplier.detach().exp() * distance
        return loss.mean(), distance.detach().mean()

    def multiplier_loss(self, distance: Tensor) -> tuple[Tensor]:
        """``-multiplier (MMD - threshold)`` of a mean MMD, a scalar: too far away, it rises."""
        return (-self.log_multiplier.exp() * (distance - self.config.threshold),)

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of each: the model of the behaviour, values, actor, multiplier."""
        (b, a), generator, n = batch.actions.shape, self.generator, self.config.samples
        metrics = self.behaviour.update(batch)
        metrics |= self.values.update(batch, normal((TARGET_ACTIONS, b, a), generator))
        noise, logged_noise = normal((n, b, a), generator), normal((2 * n, b, a), generator)
        uniform = torch.rand((2 * n, b), generator=generator, device=generator.device)
        drawn = noise, logged_noise, uniform
        loss, distance = self._descend_actor(batch, *drawn, steering.penalties)
        self._descend_multiplier(distance)
        with torch.no_grad():
            self.log_multiplier.clamp_(LOG_MULTIPLIER_MIN, LOG_MULTIPLIER_MAX)
        return metrics | {
            "actor/loss": loss,
            "actor/mmd_to_log": distance,
            "actor/mmd_multiplier": self.log_multiplier.detach().exp(),
        }
