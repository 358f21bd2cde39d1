"""Tables for small discrete tasks: a log's counts, planning in their model, and its imitation.

States are the log's exact observations, the model is that of maximum likelihood, and each
evaluation of policy iteration is an exact linear solve. How a policy may differ from the behaviour
is the planner's: see agents/spibb.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from safe_offrl.agents.protocol import Setup
from safe_offrl.agents.steering import Steering, steered
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.data.dataset import Dataset
from safe_offrl.errors import DataError
from safe_offrl.policies.categorical import Categorical
from safe_offrl.policies.protocol import Quadrature
from safe_offrl.types import Batch

# Values [B, A] of every action and the states [B] that they are of -> the best policy [B, A] that
# is allowed there.
Improve = Callable[[Tensor, Tensor], Tensor]

MOST_STATES = 1000  # whose model and its inverse fit into a few hundred MB
SETTLED = 1e-9  # a gain in value, in discounted reward, below which policy iteration ends
MOST_ITERATIONS = 1000


class Counts(NamedTuple):
    """What a log says of S states and A actions, by counting; float64 but for the observations.

    ``transitions`` are shares of the N(s, a) steps that went on to a state; the rest terminated. A
    pair never logged leads nowhere and pays nothing. ``behaviour`` of a state in which nothing was
    logged, the end of a cut episode, is uniform.
    """

    observations: Tensor  # [S, O]
    pairs: Tensor  # N(s, a) [S, A]
    transitions: Tensor  # [S, A, S]
    rewards: Tensor  # mean [S, A]
    behaviour: Tensor  # pi_b(a|s) [S, A]
    states: Tensor  # of each transition of the log [N], indices

    @classmethod
    def of(cls, dataset: Dataset, agent: str) -> Counts:
        """Count; DataError in the name of ``agent`` if there are more than MOST_STATES states."""
        # States by their observations.
        batch, a = dataset.transitions, dataset.layout.action_size
        both = torch.cat([batch.observations, batch.next_observations]).numpy()
        unique, index = np.unique(both, axis=0, return_inverse=True)
        if (s := len(unique)) > MOST_STATES:
            raise DataError(
                f"The log has {s:,} different observations, but {agent} keeps a table of them, of "
                f"{MOST_STATES:,} at most: it is for small discrete tasks. Take bcq_discrete, or "
                "another agent."
            )
        states, following = torch.from_numpy(index).view(2, -1)
        # Sums over the steps of each pair.
        pair = states * a + batch.actions.argmax(1)
        zeros = torch.zeros(s * a, dtype=torch.float64)
        pairs = zeros.index_add(0, pair, torch.ones(len(pair), dtype=torch.float64))
        rewards = zeros.index_add(0, pair, batch.rewards.double())
        went_on = torch.zeros(s * a * s, dtype=torch.float64)
        went_on.index_add_(0, pair * s + following, 1.0 - batch.terminated.double())
        # Shares of them.
        logged = pairs.clamp_min(1.0)
        transitions = (went_on.view(s * a, s) / logged.unsqueeze(-1)).view(s, a, s)
        pairs = pairs.view(s, a)
        visits = pairs.sum(1, keepdim=True)
        behaviour = torch.where(visits > 0.0, pairs / visits.clamp_min(1.0), 1.0 / a)
        mean = (rewards / logged).view(s, a)
        return cls(torch.from_numpy(unique), pairs, transitions, mean, behaviour, states)


def values_of(counts: Counts, policy: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    """V [S] and Q [S, A] of a policy [S, A] in the model: ``(I - discount P_pi) V = r_pi``."""
    moves = torch.einsum("sa,sat->st", policy, counts.transitions)
    paid = (policy * counts.rewards).sum(1)
    system = torch.eye(len(moves), dtype=moves.dtype) - discount * moves
    value = torch.linalg.solve(system, paid)
    return value, counts.rewards + discount * counts.transitions @ value


def iterate(counts: Counts, discount: float, improve: Improve) -> tuple[Tensor, Tensor]:
    """Policy iteration from the behaviour, until no value gains; (policy, its Q), both [S, A].

    A state keeps its policy where the new one is no better, without which it need not end.
    """
    policy, every = counts.behaviour, torch.arange(len(counts.pairs))
    value, q = values_of(counts, policy, discount)
    for _ in range(MOST_ITERATIONS):
        found = improve(q, every)
        gains = ((found - policy) * q).sum(1, keepdim=True) > 0.0
        better = torch.where(gains, found, policy)
        new_value, new_q = values_of(counts, better, discount)
        if bool((new_value - value).max() < SETTLED):
            break
        policy, value, q = better, new_value, new_q
    return policy, q


class Imitation:
    """A categorical actor that learns a planned policy by cross-entropy, at the log's transitions.

    With limits what it learns is the last step of planning, taken anew with
    ``Q/|Q| - sum lambda Q_C`` for Q: the best of the policies that were allowed without them.
    """

    def __init__(
        self,
        setup: Setup,
        counts: Counts,
        improve: Improve,
        discount: float,
        learning_rate: float,
    ) -> None:
        self.actor, self.generator, self.improve = setup.networks.actor, setup.generator, improve
        self.policy, self.q = iterate(counts, discount, improve)
        self.observations, self.states = counts.observations, counts.states
        self.time_to_go = setup.dataset.column("time_to_go")
        self.optimizer = Adam(self.actor.parameters(), learning_rate)
        self._descend = Descent(self.loss, self.optimizer, setup.compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps; the tables follow from the log."""
        return {"actor": self.actor, "actor_optimizer": self.optimizer}

    def loss(self, observations: Tensor, target: Tensor) -> tuple[Tensor]:
        """``-sum_a p(a) log pi(a|s)``, p the target [B, A], mean over the batch."""
        distribution = self.actor(observations)
        assert isinstance(distribution, Categorical)
        return (-(target * distribution.log_probs).sum(-1).mean(),)

    @torch.no_grad()
    def target(self, batch: Batch, states: Tensor, steering: Steering) -> Tensor:
        """What is imitated [B, A] at transitions of these states [B]."""
        policy = self.policy[states].to(batch.rewards)
        if not steering.penalties:
            return policy
        every = torch.eye(policy.shape[1], device=policy.device).repeat_interleave(len(states), 0)
        q = self.q[states].to(policy).T.reshape(1, -1)
        loss = steered(Quadrature(every, policy.T), batch, lambda *_: q, steering.penalties)
        values = -loss.view(policy.shape[::-1]).T
        return self.improve(values.to(self.q), states).to(policy)

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the actor, on as many transitions of its own drawing as this batch has."""
        device, size = self.generator.device, (len(batch.rewards),)
        drawn = torch.randint(len(self.states), size, generator=self.generator, device=device).cpu()
        states = self.states[drawn]
        observations = self.observations[states].to(device)
        own = batch._replace(
            observations=observations, time_to_go=self.time_to_go[drawn].to(device)
        )
        (loss,) = self._descend(observations, self.target(own, states, steering))
        return {"actor/loss": loss}
