"""The actor of the agents that learn Q of discrete actions: a categorical that nears the argmax.

As published they act by ``argmax_a Q(s, a)``. Here a policy is to be random and has a KL, so an
actor learns softmax(Q / temperature), which becomes the argmax as the temperature goes to 0:

    minimise E_{a ~ pi}[ -Q(s, a)/|Q| + sum lambda Q_C(s, a) + temperature log pi(a|s) ]

which is ``temperature KL(pi || softmax((Q/|Q| - sum lambda Q_C) / temperature))`` plus a constant,
exact over all actions. Where a mask allows only some of them, pi is what the actor is on those, and
``-log`` of its mass there is added: then neither Q nor a limit can pay for an action outside.

Q is, as published, that of acting by Q alone ever after. Where limits turn the actor away it
promises more than the actor gets, so that two states can send it to and fro between them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from safe_offrl.agents.steering import Penalty, Steering, steered
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Compute, Descent
from safe_offrl.compute.state import Part
from safe_offrl.nn.losses import td_target
from safe_offrl.policies.categorical import Categorical
from safe_offrl.policies.networks import Actor, QFunction
from safe_offrl.types import Batch

Mask = Callable[[Tensor], Tensor]  # observations [B, O] -> whether each action is allowed, [B, A]
IMPOSSIBLE = -1e9  # a log probability whose product with its probability, 0, is 0


def of_every_action(q: QFunction, observations: Tensor, actions: int) -> Tensor:
    """Q of each of A discrete actions at B observations, [E, A, B]."""
    every = torch.eye(actions, device=observations.device)
    rows = every.repeat_interleave(len(observations), 0)
    return q(observations.repeat(actions, 1), rows).unflatten(-1, (actions, -1))


def td_targets(batch: Batch, next_values: Tensor, discount: float) -> Tensor:
    """``r + discount (1 - terminated) V_k(s')`` of K next values of each transition, [K, B]."""
    k = len(next_values)
    rewards, terminated = batch.rewards.tile(k), batch.terminated.tile(k)
    return td_target(rewards, terminated, next_values.flatten(), discount).view_as(next_values)


class GreedyActor:
    """Trains a categorical actor by Q, which may be of one member or the least of several."""

    def __init__(
        self,
        actor: Actor,
        q: QFunction,
        temperature: float,
        learning_rate: float,
        compute: Compute,
        mask: Mask | None = None,
    ) -> None:
        self.actor, self.q, self.mask = actor, q, mask
        self.temperature = temperature
        self.optimizer = Adam(actor.parameters(), learning_rate)
        self._descend = Descent(self.loss, self.optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps, besides the actor."""
        return {"actor_optimizer": self.optimizer}

    def loss(self, batch: Batch, penalties: tuple[Penalty, ...]) -> tuple[Tensor, Tensor]:
        """The objective of this module's docstring, mean over the batch; (loss, mean entropy)."""
        distribution = self.actor(batch.observations)
        assert isinstance(distribution, Categorical)
        log_mass = torch.zeros_like(batch.time_to_go)
        if self.mask is not None:
            allowed = self.mask(batch.observations)
            masked = distribution.log_probs.masked_fill(~allowed, IMPOSSIBLE)
            log_mass = masked.logsumexp(-1)
            distribution = Categorical(masked - log_mass.unsqueeze(-1))
        policy, log_probs = distribution.scored()
        loss = steered(policy, batch, self.q, penalties) + self.temperature * log_probs
        loss = policy.expect(loss) - log_mass
        return loss.mean(), -policy.expect(log_probs).detach().mean()

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the actor."""
        loss, entropy = self._descend(batch, steering.penalties)
        return {"actor/loss": loss, "actor/entropy": entropy}
