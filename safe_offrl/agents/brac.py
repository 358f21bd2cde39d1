"""BRAC-p and BRAC-v (Wu et al. 2019, arXiv:1911.11361): actor-critic that pays for leaving the log.

    minimise E_{a ~ pi}[ -Q(s, a)/|Q| + sum lambda Q_C(s, a) ] + weight KL(pi || pi_b)

with pi_b a model of the log's behaviour, a mixture. The KL is the reverse one, which seeks a mode,
estimated by one action of each state (its "primal" form); the critics of -p know nothing of it,
those of -v pay for it too, as a policy's entropy is paid for in SAC:

    y = r + discount (1 - terminated) (E_{a' ~ pi(s')} min_e Q'_e(s', a') - critic_weight KL(s'))

Published with one weight for both: here Q is divided by |Q| for the actor and not for the target.
pi_b is fitted in the same steps, not beforehand; target actions are of the actor as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from safe_offrl.agents.behaviour import FittedBehaviour
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Penalty, Steering, steered
from safe_offrl.agents.td_values import TDValues
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.types import Batch


@dataclass(frozen=True)
class BRACConfig:
    """Settings of BRAC, shared by -p and -v.

    ``actor_weight`` of the KL in nats against the normalised critics, as in extraction;
    ``critic_weight``, of -v alone, in reward for a nat: rewards here are of returns of about 1.
    ``components`` of the mixture.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    actor_weight: float = 0.1
    critic_weight: float = 0.001
    components: int = 6


class BRAC:
    """BRAC-p; with ``in_target`` BRAC-v."""

    Config = BRACConfig
    Online: type[OnlineAgent] | None = None

    def __init__(self, setup: Setup, config: BRACConfig, *, in_target: bool = False) -> None:
        networks, self.generator, self.config = setup.networks, setup.generator, config
        self.networks, self.actor = networks, networks.actor
        self.behaviour = FittedBehaviour(
            networks,
            config.components,
            config.learning_rate,
            self.generator,
            setup.compute,
            "The KL from the log in brac_p and brac_v",
        )
        self.values = TDValues(
            networks,
            self.generator,
            setup.compute,
            learning_rate=config.learning_rate,
            discount=config.discount,
            tau=config.tau,
            next_value=self.next_value if in_target else None,
        )
        self.actor_optimizer = Adam(self.actor.parameters(), config.learning_rate)
        self._descend_actor = Descent(self.actor_loss, self.actor_optimizer, setup.compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        own = {"actor_optimizer": self.actor_optimizer}
        return {**self.values.parts(), **self.behaviour.parts(), **own}

    def next_value(self, batch: Batch, noise: Tensor) -> Tensor:
        """``E_{a' ~ pi(s')}[min_e Q'_e(s', a') - critic_weight log pi/pi_b]``, [B], of -v."""
        observations = batch.next_observations
        model = self.behaviour.model(observations)
        policy, log_ratio = model.log_ratio(self.actor(observations), noise)
        q = self.networks.target_q(policy.repeat(observations), policy.actions).amin(0)
        return policy.expect(q - self.config.critic_weight * log_ratio)

    def actor_loss(
        self, batch: Batch, noise: Tensor, penalties: tuple[Penalty, ...]
    ) -> tuple[Tensor, Tensor]:
        """The objective of this module's docstring, mean over the batch; (loss, mean KL)."""
        model = self.behaviour.model(batch.observations)
        policy, log_ratio = model.log_ratio(self.actor(batch.observations), noise)
        loss = steered(policy, batch, self.networks.q, penalties)
        loss = policy.expect(loss + self.config.actor_weight * log_ratio)
        return loss.mean(), policy.expect(log_ratio).detach().mean()

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of each: the model of the behaviour, values, actor."""
        metrics = self.behaviour.update(batch) | self.values.update(batch)
        noise = self.actor.noise(batch.actions.shape[:-1], self.generator)
        loss, divergence = self._descend_actor(batch, noise, steering.penalties)
        return metrics | {"actor/loss": loss, "actor/kl_to_log": divergence}


class BRACValue:
    """BRAC-v: the critics too pay for the distance from the log."""

    Config = BRACConfig
    Online: type[OnlineAgent] | None = None

    def __init__(self, setup: Setup, config: BRACConfig) -> None:
        self.brac = BRAC(setup, config, in_target=True)
        self.parts, self.update = self.brac.parts, self.brac.update
