"""Tables for small discrete tasks: a log's counts, planning in their model, and their imitation.

States are the log's exact observations. The model is that of maximum likelihood; policy iteration
plans in it, each evaluation an exact linear solve. An actor imitates the policy that comes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from safe_offrl.agents.protocol import Setup
from safe_offrl.agents.steering import Penalty, Steering
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.data.dataset import Dataset
from safe_offrl.errors import DataError
from safe_offrl.policies.categorical import Categorical
from safe_offrl.types import Batch

Floats = NDArray[np.float64]
Improve = Callable[
    [Floats, Floats], Floats
]  # Q and the present policy, both [S, A] -> a better one

MOST_STATES = 1000  # whose model and its inverse fit into a few hundred MB
SETTLED = 1e-9  # a gain in value, in discounted reward, below which policy iteration ends
MOST_ITERATIONS = 1000


class Counts(NamedTuple):
    """What a log says of S states and A actions, by counting.

    ``transitions`` are shares of the N(s, a) steps that went on to a state; the rest terminated. A
    pair never logged leads nowhere and pays nothing. ``behaviour`` of a state in which nothing was
    logged, the end of a cut episode, is uniform.
    """

    observations: Tensor  # [S, O], float32
    pairs: Floats  # N(s, a) [S, A]
    transitions: Floats  # [S, A, S]
    rewards: Floats  # mean [S, A]
    behaviour: Floats  # pi_b(a|s) [S, A]
    states: NDArray[np.int64]  # of each transition of the log [N]


def count(dataset: Dataset, agent: str) -> Counts:
    """Count a log; DataError in the name of ``agent`` if it has more than MOST_STATES states."""
    # States by their observations.
    batch, a = dataset.transitions, dataset.layout.action_size
    both = torch.cat([batch.observations, batch.next_observations]).numpy()
    unique, index = np.unique(both, axis=0, return_inverse=True)
    if (s := len(unique)) > MOST_STATES:
        raise DataError(
            f"The log has {s:,} different observations, but {agent} keeps a table of them, at most "
            f"{MOST_STATES:,}: it is for small discrete tasks. Take bcq_discrete, or another agent."
        )
    states, following = index.reshape(2, -1)
    actions = batch.actions.numpy().argmax(1)
    # Sums over the steps of each pair.
    pairs, rewards, went_on = np.zeros((s, a)), np.zeros((s, a)), np.zeros((s, a, s))
    np.add.at(pairs, (states, actions), 1.0)
    np.add.at(rewards, (states, actions), batch.rewards.numpy().astype(np.float64))
    np.add.at(went_on, (states, actions, following), 1.0 - batch.terminated.numpy())
    # Shares of them.
    logged = np.maximum(pairs, 1.0)
    visits = pairs.sum(1, keepdims=True)
    behaviour = np.where(visits > 0.0, pairs / np.maximum(visits, 1.0), 1.0 / a)
    model = went_on / logged[..., None], rewards / logged
    return Counts(torch.from_numpy(unique), pairs, *model, behaviour, states)


def evaluate(counts: Counts, policy: Floats, discount: float) -> tuple[Floats, Floats]:
    """V [S] and Q [S, A] of a policy [S, A] in the model: ``(I - discount P_pi) V = r_pi``."""
    moves = np.einsum("sa,sat->st", policy, counts.transitions)
    paid = (policy * counts.rewards).sum(1)
    value = np.linalg.solve(np.eye(len(moves)) - discount * moves, paid)
    return value, counts.rewards + discount * counts.transitions @ value


def iterate(counts: Counts, discount: float, improve: Improve) -> Floats:
    """Policy iteration from the behaviour, until no state's value gains: the last policy [S, A]."""
    policy = counts.behaviour
    value, q = evaluate(counts, policy, discount)
    for _ in range(MOST_ITERATIONS):
        better = improve(q, policy)
        new_value, q = evaluate(counts, better, discount)
        if (new_value - value).max() < SETTLED:
            break
        policy, value = better, new_value
    return policy


class Imitation:
    """A categorical actor that learns a table by cross-entropy, on transitions of its own drawing.

    ``table`` are probabilities [S, A], ``states`` those of the log's transitions [N].
    """

    def __init__(self, setup: Setup, table: Floats, counts: Counts, learning_rate: float) -> None:
        self.actor, self.generator = setup.networks.actor, setup.generator
        device = self.generator.device
        self.table = torch.from_numpy(table).float().to(device)
        self.observations = counts.observations.to(device)
        self.states = torch.from_numpy(counts.states).to(device)
        self.time_to_go = setup.dataset.column("time_to_go").to(device)
        self.optimizer = Adam(self.actor.parameters(), learning_rate)
        self._descend = Descent(self.loss, self.optimizer, setup.compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps; the table follows from the log."""
        return {"actor": self.actor, "actor_optimizer": self.optimizer}

    def loss(
        self,
        observations: Tensor,
        time_to_go: Tensor,
        probabilities: Tensor,
        penalties: tuple[Penalty, ...],
    ) -> tuple[Tensor]:
        """``-sum_a p(a|s) log pi(a|s)``, p the table [B, A] times ``exp(-sum lambda Q_C)``, mean.

        p is normalised after the tilt.
        """
        distribution = self.actor(observations)
        assert isinstance(distribution, Categorical)
        with torch.no_grad():
            every, _ = distribution.scored()
            danger = torch.zeros_like(probabilities.T.flatten())
            for risk, multiplier in penalties:
                of_actions = risk(
                    every.repeat(observations), every.repeat(time_to_go), every.actions
                )
                danger = danger + multiplier * of_actions
            tilt = -danger.view_as(probabilities.T).T
            target = torch.softmax(probabilities.log() + tilt, -1)
        return (F.cross_entropy(distribution.log_probs, target),)

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the actor, on as many transitions as this batch has."""
        size, device = (len(batch.rewards),), self.generator.device
        drawn = torch.randint(len(self.states), size, generator=self.generator, device=device)
        state = self.states[drawn]
        (loss,) = self._descend(
            self.observations[state], self.time_to_go[drawn], self.table[state], steering.penalties
        )
        return {"actor/loss": loss}
