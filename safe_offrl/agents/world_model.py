"""A model of the environment: how an ensemble of dynamics is learnt, and what a policy does in it.

The first updates of an agent train the model alone; meanwhile the actor imitates the log, so that
lambda does not learn from a policy that has learnt nothing. Then each update imagines its own
transitions, by the actor of that moment, from states of its batch. The published learners keep them
in a buffer, of which most come from actors of the past.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_offrl.agents.dynamics import MEMBERS, Dynamics, Prediction
from safe_offrl.agents.protocol import Setup
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.data.sampling import draw_indices, uniform_batches
from safe_offrl.policies.protocol import normal, require_density
from safe_offrl.types import Batch

ELITES = 5
IMITATION_RATE = 3e-4  # as in behaviour cloning
HELD_OUT = 0.1  # of the episodes, which choose the elites
JUDGED_ROWS = 5_000  # transitions of them, about

# How a step is seen that the model imagined: (what the members expect, what was drawn) -> step.
Judgement = Callable[[Prediction, Batch], Batch]


@dataclass(frozen=True)
class ModelConfig:
    """Settings of the model as published for MOPO; ``share`` of the agent's updates are its own."""

    learning_rate: float = 1e-3
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    share: float = 0.2


class WorldModel:
    """The dynamics, the best members of it by held-out loss, and the actor's imitation."""

    def __init__(self, setup: Setup, config: ModelConfig) -> None:
        self.actor, self.generator = setup.networks.actor, setup.generator
        require_density(self.actor.kind, "The imitation that mopo, morel and combo begin with")
        self.horizon = setup.dataset.horizon
        train, held_out = setup.dataset.split(HELD_OUT, 0)
        if not held_out.episodes:  # there is only one
            held_out = train
        device = self.generator.device
        self.train = train.on(device)
        held_out = held_out.sample(JUDGED_ROWS, 0)
        self.held_out = Batch(*(field.to(device) for field in held_out.transitions.tensors))
        self.dynamics = Dynamics(train, config.hidden, self.generator)
        self.elites = torch.arange(ELITES, device=device)
        self.updates = torch.zeros((), dtype=torch.int64)
        self.learning_steps = round(config.share * setup.steps)
        self.optimizer = Adam(self.dynamics.parameters(), config.learning_rate)
        self._descend = Descent(self.dynamics.loss, self.optimizer, setup.compute)
        # Its moments would slow the actor down that learns from critics: likelihood is steeper.
        self.actor_optimizer = Adam(self.actor.parameters(), IMITATION_RATE)
        self._descend_actor = Descent(self.imitation_loss, self.actor_optimizer, setup.compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            "dynamics": self.dynamics,
            "dynamics_optimizer": self.optimizer,
            "imitation_optimizer": self.actor_optimizer,
            "elites": self.elites,
            "model_updates": self.updates,
        }

    @property
    def learning(self) -> bool:
        """Whether the next update is the model's."""
        return int(self.updates) < self.learning_steps

    def imitation_loss(self, batch: Batch) -> tuple[Tensor]:
        """``-log pi(a|s)`` of logged actions, mean over the batch."""
        return (-self.actor.density(batch.observations).log_prob(batch.actions).mean(),)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the actor on this batch, and of each member on one as large of its own.

        The last one chooses the elites.
        """
        rows, layout, size = self.train.rows, self.train.layout, len(batch.rewards)
        (drawn,) = uniform_batches(rows, layout, 1, MEMBERS * size, self.generator)
        own = Batch(*(field.unflatten(0, (MEMBERS, size)) for field in drawn.tensors))
        (loss,) = self._descend(own)
        (actor_loss,) = self._descend_actor(batch)
        self.updates += 1
        if not self.learning:
            self.elites.copy_(self.best_members())
        return {"model/loss": loss, "actor/loss": actor_loss}

    @torch.no_grad()
    def best_members(self) -> Tensor:
        """The members [ELITES] of the least loss on episodes that none has learnt from."""
        return self.dynamics.losses(self.held_out).argsort()[:ELITES]

    @torch.no_grad()
    def imagine(self, starts: Batch, steps: int, judge: Judgement) -> Batch:
        """``steps`` of the actor from each state of ``starts`` [B], as a batch [steps B].

        Each step is drawn from an elite. An episode that ends, by termination or at its horizon,
        begins anew where it began: no step follows the end, and all batches are of one size.
        """
        b, generator, steps_of = len(starts.rewards), self.generator, list[Batch]()
        now = starts
        for _ in range(steps):
            noise = self.actor.noise((b,), generator)
            now = now._replace(actions=self.actor(now.observations).quadrature(noise).actions)
            prediction = self.dynamics(now.observations, now.actions)
            members = self.elites[draw_indices(ELITES, b, generator)]
            noise = normal((b, prediction.mean.shape[-1]), generator)
            chance = torch.rand(b, generator=generator, device=generator.device)
            drawn = self.dynamics.step(now, prediction, members, noise, chance)
            steps_of.append(judge(prediction, drawn))
            now = self._after(steps_of[-1], starts)
        fields = zip(*(step.tensors for step in steps_of), strict=True)
        return Batch(*(torch.cat(field) for field in fields))

    def mixed(
        self, batch: Batch, steps: int, real_share: float, judge: Judgement
    ) -> tuple[Batch, int]:
        """A batch as large, and how many of its rows are logged: they come first, at least one.

        The others are imagined, ``steps`` from each of some states of the batch.
        """
        size = len(batch.rewards)
        n = max(1, min(int((1.0 - real_share) * size), size - 1) // steps)
        logged = max(1, size - steps * n)
        starts = Batch(*(field[-n:] for field in batch.tensors))
        imagined = self.imagine(starts, steps, judge)
        both = zip(batch.tensors, imagined.tensors, strict=True)
        return Batch(*(torch.cat([real[:logged], own]) for real, own in both)), logged

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        """What a step is like in a batch that is imagined, for the most part."""
        means = {"reward": batch.rewards, "accidents": batch.accidents, "cost": batch.costs}
        return {f"model/{name}": values.mean() for name, values in means.items()}

    def _after(self, step: Batch, starts: Batch) -> Batch:
        """Where each episode stands after a step, its actions still to come."""
        left = step.time_to_go - 1.0 / self.horizon
        over = (step.terminated > 0.0) | (left < 0.5 / self.horizon)
        return step._replace(
            observations=torch.where(
                over.unsqueeze(-1), starts.observations, step.next_observations
            ),
            time_to_go=torch.where(over, starts.time_to_go, left),
        )
