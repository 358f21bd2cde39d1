"""TD3+BC (Fujimoto & Gu 2021, arXiv:2106.06860) and ReBRAC (Tarasov et al. 2023, arXiv:2305.09836).

A deterministic policy tanh(m(s)) climbs the critics and stays near the log's action:

    minimise -Q(s, pi(s))/|Q| + sum lambda Q_C(s, pi(s)) + weight |pi(s) - a|^2

TD3+BC's weight is 1 / (alpha A) (its eq. 5 divided by alpha; A action dimensions, over which it
takes a mean). ReBRAC has a weight of its own, and a second one for the critics' target, which pays
for the distance of the next action from that which was logged next. Both learn as TD3
(arXiv:1802.09477): a target actor, noise on its actions, every second step without the actor.

A policy must have a density here (KL, shield): it is deployed as a Gaussian of constant deviation.
ReBRAC's third hidden layer and larger batches are settings (networks, batch_size), not defaults.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Penalty, Steering, steered
from safe_offrl.agents.td_values import TDValues
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.data.sampling import Following, SuccessiveSampler
from safe_offrl.errors import ConfigError
from safe_offrl.policies.gaussian import GAUSSIAN, LOG_STD_MAX, LOG_STD_MIN, Gaussian, raw_log_std
from safe_offrl.policies.networks import Actor, polyak_
from safe_offrl.policies.protocol import Quadrature, normal, require_density
from safe_offrl.types import Batch

SMOOTHING, SMOOTHING_LIMIT = 0.2, 0.5  # of the target actor's actions: deviation, and largest noise
ACTOR_EVERY = 2  # steps of the critics


@dataclass(frozen=True)
class TD3BCConfig:
    """Settings of TD3+BC as published; ``alpha`` weighs the critics against the log.

    ``deployment_noise`` is the deviation before tanh that the policy acts with (TD3 explores with
    .1).
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    alpha: float = 2.5
    deployment_noise: float = 0.1


@dataclass(frozen=True)
class ReBRACConfig:
    """Settings of ReBRAC, whose two weights are published for each task.

    ``actor_weight`` .001 to .1, of which the largest stays nearest to the log. ``critic_weight`` 0
    to .1, in units of reward: rewards here are of returns of about 1, so it is among the least.
    ``deployment_noise`` as TD3+BC's.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    actor_weight: float = 0.1
    critic_weight: float = 0.001
    deployment_noise: float = 0.1


class RegularisedTD3:
    """TD3 that pays for the squared distance from the log, in the actor's loss and the target."""

    def __init__(
        self,
        setup: Setup,
        config: TD3BCConfig | ReBRACConfig,
        *,
        actor_weight: float,
        critic_weight: float,
    ) -> None:
        self.networks, self.generator, self.config = setup.networks, setup.generator, config
        self.actor_weight, self.critic_weight = actor_weight, critic_weight
        self.actor = self.networks.actor
        require_density(self.actor.kind, "The deployment noise of td3bc and rebrac")
        constant_deviation_(self.actor, config.deployment_noise)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.values = TDValues(
            self.networks,
            self.generator,
            setup.compute,
            learning_rate=config.learning_rate,
            discount=config.discount,
            tau=config.tau,
            next_value=self.next_value,
        )
        self.actor_optimizer = Adam(self.actor.parameters(), config.learning_rate)
        self._descend_actor = Descent(self.actor_loss, self.actor_optimizer, setup.compute)
        self._updates = torch.zeros((), dtype=torch.int64)  # on the CPU: nobody waits for it

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            **self.values.parts(),
            "target_actor": self.target_actor,
            "actor_optimizer": self.actor_optimizer,
            "updates": self._updates,
        }

    def next_value(self, batch: Batch, noise: Tensor, following: Following | None = None) -> Tensor:
        """``min_e Q'_e(s', a') - critic_weight |a' - logged a'|^2``, [B].

        ``a' = clip(pi'(s') + clip(.2 noise, -.5, .5), -1, 1)`` of standard normal noise [B, A]. At
        an episode's end no next action was logged, and the distance is left out: behind a
        termination it would not count, behind a truncation (which ReBRAC's code drops) it is not
        known.
        """
        smoothing = (SMOOTHING * noise).clamp(-SMOOTHING_LIMIT, SMOOTHING_LIMIT)
        actions = deterministic(self.target_actor, batch.next_observations) + smoothing
        actions = actions.clamp(-1.0, 1.0)
        value = self.networks.target_q(batch.next_observations, actions).amin(0)
        if following is None:
            return value
        distance = (actions - following.actions).square().sum(-1)
        return value - self.critic_weight * following.known * distance

    def actor_loss(self, batch: Batch, penalties: tuple[Penalty, ...]) -> tuple[Tensor, Tensor]:
        """The objective of this module's docstring, mean over the batch; (loss, mean distance)."""
        actions = deterministic(self.actor, batch.observations)
        distance = (actions - batch.actions).square().sum(-1)
        loss = steered(Quadrature(actions), batch, self.networks.q, penalties)
        return (loss + self.actor_weight * distance).mean(), distance.detach().mean()

    def update(
        self, batch: Batch, steering: Steering, following: Following | None = None
    ) -> dict[str, Tensor]:
        """One step of the critics; in the first and every second one of the actor and targets."""
        noise = normal(batch.actions.shape, self.generator)
        given = (noise,) if following is None else (noise, following)
        metrics = self.values.step(batch, *given)
        due = int(self._updates) % ACTOR_EVERY == 0
        self._updates += 1
        if not due:
            return metrics
        loss, distance = self._descend_actor(batch, steering.penalties)
        self.values.follow()
        polyak_(self.target_actor, self.actor, self.config.tau)
        return metrics | {"actor/loss": loss, "actor/distance_to_log": distance}


class TD3BC:
    """TD3+BC."""

    Config = TD3BCConfig
    Online: type[OnlineAgent] | None = None
    kinds = (GAUSSIAN,)

    def __init__(self, setup: Setup, config: TD3BCConfig) -> None:
        weight = 1.0 / (config.alpha * setup.networks.layout.action_size)
        self.td3 = RegularisedTD3(setup, config, actor_weight=weight, critic_weight=0.0)
        self.parts, self.update = self.td3.parts, self.td3.update


class ReBRAC:
    """ReBRAC, which draws its own batches: the log's next actions are not in those of others."""

    Config = ReBRACConfig
    Online: type[OnlineAgent] | None = None
    kinds = (GAUSSIAN,)

    def __init__(self, setup: Setup, config: ReBRACConfig) -> None:
        weights = {"actor_weight": config.actor_weight, "critic_weight": config.critic_weight}
        self.td3 = RegularisedTD3(setup, config, **weights)
        self.parts, self.generator = self.td3.parts, setup.generator
        self.logged = SuccessiveSampler(setup.dataset, self.generator.device)

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step, on a batch of the log as large as this one."""
        drawn, following = self.logged.draw(len(batch.rewards), self.generator)
        return self.td3.update(drawn, steering, following)


def deterministic(actor: Actor, observations: Tensor) -> Tensor:
    """tanh of a Gaussian's mean: [B, O] -> [B, A]."""
    policy = actor(observations)
    assert isinstance(policy, Gaussian)
    return torch.tanh(policy.mean)


def constant_deviation_(actor: Actor, deviation: float) -> None:
    """Make a Gaussian's network say this deviation everywhere; without a loss of it, for ever."""
    least, most = (math.exp(x) for x in (LOG_STD_MIN, LOG_STD_MAX))
    if not least < deviation < most:
        raise ConfigError(
            f"deployment_noise is {deviation}, but a deviation strictly between {least:.3g} and "
            f"{most:.3g} is needed. Try 0.1."
        )
    *_, last = actor.layers.modules()
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight[actor.action_size :] = 0.0
        last.bias[actor.action_size :] = raw_log_std(math.log(deviation))
