"""The limits of an offline phase: what their safety critics learn from, and what they estimate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_offrl.compute.state import seeded
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.sampling import RiskSampler, draw_indices, uniform_batches
from safe_offrl.policies.networks import Actor
from safe_offrl.safety.constrained import Constrained
from safe_offrl.safety.critic import RiskEstimate
from safe_offrl.train.pretrain_config import PretrainConfig
from safe_offrl.types import Batch, States

START_STATES = 64  # start states per update of the safety critic
ESTIMATE_STATES = 2000  # policy actions behind one estimate of what is constrained


class OfflineConstraints:
    """Each limit with the batches that its critic learns from."""

    def __init__(
        self,
        config: PretrainConfig,
        constraints: Sequence[Constrained],
        dataset: Dataset,
        logged: Dataset,
        generator: torch.Generator,
    ) -> None:
        """``dataset`` is normalised, and ``logged`` the same where the generator draws.

        ``config`` says the size of a batch, seed and confidence.
        """
        self._config, self._constraints, self._generator = config, constraints, generator
        self._layout = dataset.layout
        for limit, critic, _ in constraints:
            critic.start_from(critic.outlook.first_logit(dataset.under(limit)))
        self._risky = [
            RiskSampler.from_dataset(
                logged,
                steps=critic.outlook.steps,
                discount=critic.outlook.discount,
                limited=limit.quantity.signal,
                device=generator.device,
            )
            for limit, critic, _ in constraints
        ]
        self.rows = logged.rows
        self._starts = logged.initial_observations.to(generator.device)
        self._steps_per_episode = float(dataset.episode_lengths.mean())

    def update(self, index: int, actor: Actor, batch: Batch) -> dict[str, Tensor]:
        """One step of one limit's critic, for this actor; ``batch`` holds states of the log."""
        critic, generator = self._constraints[index].critic, self._generator
        drawn, weights, spans = self._risky[index].draw(
            self._config.batch_size, critic.config.positive_share, generator
        )
        starts = self._starts[draw_indices(len(self._starts), START_STATES, generator)]
        states = critic.outlook.estimate_states(starts, batch, self._steps_per_episode)
        return critic.update(drawn, weights, actor, states, generator, spans=spans)

    def estimate(self, index: int, actor: Actor, *, at_start: bool = False) -> RiskEstimate:
        """What is limited, under this actor: over the log's start states, or its states.

        The states of the log are those of its behaviours, not of the actor: for the expected cost
        the estimate is of first order in what sets them apart. ``at_start``: the critic's own value
        at start states.
        """
        config, critic = self._config, self._constraints[index].critic
        generator = seeded(config.seed, self._generator.device)
        starts = draw_indices(len(self._starts), ESTIMATE_STATES, generator)
        logged = None
        if critic.outlook.over_visits:
            (logged,) = uniform_batches(self.rows, self._layout, 1, ESTIMATE_STATES, generator)
        states = critic.outlook.estimate_states(
            self._starts[starts], logged, self._steps_per_episode
        )
        if at_start:
            states = States.at_start(self._starts[starts])
        return critic.estimate(actor, states, generator, config.safety.confidence)
