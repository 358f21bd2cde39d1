"""How the safety critic sees what is constrained: what its values mean, learn, and add up to.

One class a quantity. Of the accident probability Q_C is the probability of an accident before the
horizon, undiscounted. Of the expected cost it is the discounted mean of the costs ahead, as a share
of the largest cost of a step: episodes of a thousand steps are too long for undiscounted
bootstrapping, and the expected cost of an episode is a weighted sum of these short-sighted values
over its states.

Transitions span ``steps`` steps, their costs discounted by ``discount``. ``over_visits``: an
estimate is over states of the policy's own episodes as well as over start states. ``spends``:
whether what has happened in an episode counts against its limit; ``ahead_at_one`` is what a value
of 1 says of what is ahead, in the unit of the limit.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safe_offrl.data.dataset import Dataset
from safe_offrl.nn.losses import cost_rate_target, first_accident_target
from safe_offrl.types import Batch, States

Floats = NDArray[np.float32]
UNLIKELY_LOGIT = (
    -3.0
)  # logit: accidents are rare, so values start from there instead of a coin flip


@dataclass(frozen=True)
class AccidentAhead:
    """The probability of an accident from here to the horizon."""

    horizon: int

    steps: ClassVar[int] = 1
    discount: ClassVar[float] = 1.0
    over_visits: ClassVar[bool] = False
    spends: ClassVar[bool] = False  # what has happened is over
    ahead_at_one: ClassVar[float] = 1.0

    def targets(self, batch: Batch, left: Tensor, next_values: Tensor, spans: Tensor) -> Tensor:
        """Bellman targets [E, B] of ``next_values`` [E, B], with ``left`` [B] of the horizon ahead.

        See :func:`safe_offrl.nn.losses.first_accident_target`.
        """
        accidents, ended, left = (
            values.expand(next_values.shape) for values in (batch.accidents, batch.terminated, left)
        )
        return first_accident_target(accidents, ended, left, next_values)

    def estimate_states(
        self, starts: Tensor, visited: Batch | None, steps_per_episode: float
    ) -> States:
        """States [S] whose weighted sum of Q_C is what is constrained: the start states alone."""
        return States.at_start(starts)

    def change_per_action(self, steps_per_episode: float) -> float:
        """What a mean change of Q_C over visited actions means for what is constrained.

        Performance difference: steps of an episode times the mean change of a value in its unit.
        """
        return steps_per_episode

    def first_logit(self, dataset: Dataset) -> float:
        """Where every value begins: unlikely."""
        return UNLIKELY_LOGIT

    def within(self, dataset: Dataset, values: Floats, window: int) -> tuple[Floats, Floats]:
        """What follows each logged step within ``window`` steps, [N] in [0, 1], and what of it was
        logged: 1 for an accident, 0 if the episode ends first, else ``values`` [N] of the critic.
        """
        outcome = _later(dataset, values, window)
        followed = accident_within(dataset, window)
        return np.where(followed, 1.0, outcome).astype(np.float32), followed.astype(np.float32)


@dataclass(frozen=True)
class CostAhead:
    """The discounted mean of the costs ahead, as a share of ``cost_max``, a step's largest."""

    horizon: int
    cost_max: float
    discount: float
    steps: int

    over_visits: ClassVar[bool] = True
    spends: ClassVar[bool] = True

    @property
    def ahead_at_one(self) -> float:
        """What is ahead at the largest cost in every step, discounted."""
        return self.cost_max / (1.0 - self.discount)

    def targets(self, batch: Batch, left: Tensor, next_values: Tensor, spans: Tensor) -> Tensor:
        """Bellman targets [E, B] of ``next_values`` [E, B] that lie ``spans`` [B] steps ahead.

        See :func:`safe_offrl.nn.losses.cost_rate_target`.
        """
        costs, ended, left, spans = (
            values.expand(next_values.shape)
            for values in (batch.costs / self.cost_max, batch.terminated, left, spans)
        )
        return cost_rate_target(costs, ended, left, next_values, spans, self.discount)

    def estimate_states(
        self, starts: Tensor, visited: Batch | None, steps_per_episode: float
    ) -> States:
        """Start states, and ``visited`` states of the policy's own episodes, of L steps on average.

        With n = 1 / (1 - discount) and the horizon H,
        ``J / (H cost_max) = ((n - 1) E_s0[rho] + L E_visited[rho]) / H``. In words: a cost at step
        j enters the values of the steps before it with the weights discount^k / n, which sum to
        1 - discount^(j + 1); what is missing of the early costs, the start states hold.
        """
        assert visited is not None
        ones = starts.new_ones(len(starts))
        reach = 1.0 / (1.0 - self.discount)
        share = (reach - 1.0) / self.horizon, steps_per_episode / self.horizon
        visits = visited.time_to_go
        return States(
            torch.cat([starts, visited.observations]),
            torch.cat([ones, visits]),
            torch.cat(
                [ones * (share[0] / len(ones)), torch.full_like(visits, share[1] / len(visits))]
            ),
        )

    def change_per_action(self, steps_per_episode: float) -> float:
        """The same; the value in its own unit is ``rho cost_max / (1 - discount)``."""
        return steps_per_episode / self.horizon / (1.0 - self.discount)

    def first_logit(self, dataset: Dataset) -> float:
        """Where every value begins: at the log's mean cost, or unlikely if that is none or all."""
        costs = dataset.episode_costs.sum() / self.cost_max / len(dataset.rows)
        return math.log(costs / (1.0 - costs)) if 0.0 < costs < 1.0 else UNLIKELY_LOGIT

    def within(self, dataset: Dataset, values: Floats, window: int) -> tuple[Floats, Floats]:
        """The same: ``(1 - g) sum_k<W g^k c_k + g^W V(s_W)``, c in units of cost_max."""
        return (
            self._ahead(dataset, values, window),
            self._ahead(dataset, np.zeros_like(values), window),
        )

    def _ahead(self, dataset: Dataset, values: Floats, window: int) -> Floats:
        discount = self.discount
        costs = np.clip(dataset.column("costs").numpy() / self.cost_max, 0.0, 1.0)
        outcome = np.zeros(len(values))
        for k in range(window):
            outcome += (1.0 - discount) * discount**k * _later(dataset, costs, k)
        outcome += discount**window * _later(dataset, values, window)
        return outcome.astype(np.float32)


Outlook = AccidentAhead | CostAhead


def _later(dataset: Dataset, values: NDArray[Any], steps: int) -> NDArray[Any]:
    """``values`` [N] of so many steps later in the same episode, 0 where it has ended by then."""
    end = np.repeat(dataset.episode_starts[1:], dataset.episode_lengths)
    later = np.arange(len(values)) + steps
    return np.where(later < end, values[np.minimum(later, len(values) - 1)], np.float32(0.0))


def accident_within(dataset: Dataset, window: int) -> NDArray[np.bool_]:
    """Whether an accident follows within ``window`` steps, this one included, [N].

    Or whatever else is dangerous in the eyes of a limit, see :attr:`Dataset.dangers`.
    """
    dangers = dataset.dangers
    result = np.zeros(len(dangers), dtype=bool)
    starts = dataset.episode_starts
    for first, end in itertools.pairwise(starts):
        for t in np.flatnonzero(dangers[first:end]):
            result[max(first, first + t - window + 1) : first + t + 1] = True
    return result
