"""The types every layer shares. Shape letters, used in all docstrings:

B batch, N transitions of a dataset, M episodes, O observation size, A action size, E ensemble
members, U update-to-data ratio (UTD), K candidate actions or cost signals, D columns of a stored
transition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Batch(NamedTuple):
    """Aligned transitions: a mini-batch, a whole dataset and the buffer's storage alike.

    ``accidents``, ``terminated`` are 0/1 floats. ``time_to_go`` is the share of the horizon that
    was left BEFORE the action: 1 at the first step, 1/horizon at the last. ``return_to_go`` is the
    discounted sum of rewards from this step to the end of the logged episode (Cal-QL's bound).
    """

    observations: Tensor  # [B, O]
    actions: Tensor  # [B, A], in [-1, 1]; one-hot rows where actions are discrete
    rewards: Tensor  # [B]
    accidents: Tensor  # [B]
    costs: Tensor  # [B], the environment's own number
    next_observations: Tensor  # [B, O]
    terminated: Tensor  # [B]
    time_to_go: Tensor  # [B]
    return_to_go: Tensor  # [B]
    signals: Tensor | None = None  # [B, K], the named costs beside the one; None if there are none

    @property
    def tensors(self) -> Iterator[Tensor]:
        """The fields that there are, in their order."""
        return (field for field in self if field is not None)


# Rows hold the numbers of a Batch in this order, in checkpoints and cached files too.
SCALARS = ("rewards", "accidents", "costs", "terminated", "time_to_go", "return_to_go")


def signal_column(name: str) -> str:
    """The column of a named cost signal, in rows and in files: "costs_hazards" of "hazards"."""
    return f"costs_{name}"


class Layout(NamedTuple):
    """Where each field of a :class:`Batch` stands in one row of contiguous storage [N, D].

    Nobody else writes a position: whoever fills a row names its fields. ``signals`` [K] are the
    names of the costs beside the one, whose columns end a row. ``limited`` is the signal whose
    costs are read as the costs, as a limit of it sees the rows; "" of none.
    """

    observation_size: int
    action_size: int
    signals: tuple[str, ...] = ()
    limited: str = ""

    @property
    def sizes(self) -> tuple[int, int]:
        """Of an observation and an action: what networks are made for."""
        return self.observation_size, self.action_size

    def column(self, rows: Tensor, name: str) -> Tensor:
        """One of :attr:`scalars` of rows [..., D], [...]: a view."""
        names, name = self.scalars, self.stored(name)
        return rows[..., self.width - len(names) + names.index(name)]

    def stored(self, name: str) -> str:
        """The name of the column that is read as this one of :attr:`scalars`."""
        return signal_column(self.limited) if self.limited and name == "costs" else name

    @property
    def event(self) -> str:
        """Above 0 in the steps that a safety critic must see often: an accident, or the cost."""
        return "costs" if self.limited else "accidents"

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the numbers that end a row."""
        return (*SCALARS, *map(signal_column, self.signals))

    @property
    def width(self) -> int:
        """Columns D of a row."""
        return 2 * self.observation_size + self.action_size + len(self.scalars)

    def unpack(self, rows: Tensor) -> Batch:
        """View rows [..., D] as a Batch of [..., O], [..., A] and [...]; copies nothing.

        What follows the scalars is signals, also for whoever does not know their names.
        """
        o, a = self.observation_size, self.action_size
        sizes = [o, a, o, len(SCALARS), rows.shape[-1] - 2 * o - a - len(SCALARS)]
        # Two calls make all nine views, because slicing one by one takes half as long again.
        observations, actions, following, scalars, *rest = rows.split(
            sizes if sizes[-1] else sizes[:-1], dim=-1
        )
        batch = Batch(
            observations=observations,
            actions=actions,
            next_observations=following,
            **dict(zip(SCALARS, scalars.unbind(-1), strict=True)),
            signals=rest[0] if rest else None,
        )
        if self.limited:
            return batch._replace(costs=rest[0][..., self.signals.index(self.limited)])
        return batch

    def pack(self, batch: Batch) -> Tensor:
        """Copy a Batch into rows [N, D]; the inverse of :meth:`unpack`."""
        assert not self.limited  # what is read as the costs would be written over them
        scalars = torch.stack([getattr(batch, name) for name in SCALARS], dim=-1)
        if batch.signals is not None:
            scalars = torch.cat([scalars, batch.signals], dim=-1)
        return self.join(batch.observations, batch.actions, batch.next_observations, scalars)

    @staticmethod
    def join(
        observations: Tensor, actions: Tensor, next_observations: Tensor, scalars: Tensor
    ) -> Tensor:
        """Rows [N, D] of their parts; ``scalars`` [N, 6 + K] are in the order of a row."""
        return torch.cat([observations, actions, next_observations, scalars], dim=-1)

    @staticmethod
    def row(
        observation: np.ndarray,
        action: np.ndarray,
        next_observation: np.ndarray,
        signals: Sequence[float] = (),
        **scalars: float,
    ) -> np.ndarray:
        """One transition as a row [D]; ``scalars`` by their names, all of SCALARS."""
        tail = np.asarray([*(scalars[name] for name in SCALARS), *signals], dtype=np.float32)
        return np.concatenate([observation, action, next_observation, tail])


class States(NamedTuple):
    """What the safety critic takes for states, observations with the time to go: over them a
    weighted sum of values is an estimate, of V_accident(s0) or of the cost.
    """

    observations: Tensor  # [S, O]
    time_to_go: Tensor  # [S]
    weights: Tensor | None = None  # [S]; None is a plain mean

    @classmethod
    def at_start(cls, observations: Tensor) -> States:
        """Start states [S, O] with the whole horizon ahead."""
        return cls(observations, observations.new_ones(len(observations)))

    def total(self, values: Tensor) -> Tensor:
        """The estimate from values of the states, [..., S] -> [...]."""
        return values.mean(-1) if self.weights is None else values @ self.weights

    @property
    def squared_weights(self) -> float | Tensor:
        """Sum of the squared weights: the estimate's variance for values of variance 1."""
        return 1.0 / len(self.time_to_go) if self.weights is None else self.weights.square().sum()


class Visited(NamedTuple):
    """Transitions [B] of the latest episodes, and what of them an expectation over states is of.

    ``counted`` is 0 where the constrained event is over: behind the first accident, if accidents
    are constrained. ``per_episode`` is how many counted steps an episode has on average.
    """

    batch: Batch
    counted: Tensor  # [B], 0 or 1
    per_episode: float


class Normalizer(NamedTuple):
    """From the units of a log to those of learning: observations (o - mean) / std, each [O], and
    rewards times ``reward_scale``.

    ``offset`` [O], float64, is what the log's observations are less already, and what the adapter
    of the environment has to subtract from its own, see :mod:`safe_offrl.data.offsets`.
    """

    mean: np.ndarray
    std: np.ndarray
    reward_scale: float = 1.0  # a float32
    offset: np.ndarray | None = None

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """Standardise observations [..., O], float32."""
        return (observation - self.mean) / self.std

    def parts(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        offset = {} if self.offset is None else {"normalizer_offset": torch.from_numpy(self.offset)}
        return {
            "normalizer_mean": torch.from_numpy(self.mean),
            "normalizer_std": torch.from_numpy(self.std),
            "normalizer_reward_scale": torch.tensor(self.reward_scale, dtype=torch.float64),
            **offset,
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> Normalizer:
        """From the tensors of a checkpoint. Earlier versions learnt from rewards as they are."""
        mean, std = (tensors[f"normalizer_{key}/value"].numpy() for key in ("mean", "std"))
        scale, offset = (
            tensors.get(f"normalizer_{key}/value") for key in ("reward_scale", "offset")
        )
        return cls(
            mean,
            std,
            1.0 if scale is None else float(scale),
            None if offset is None else offset.numpy(),
        )


class Episode(NamedTuple):
    """One complete episode of the environment, as the loops yield it and the ledger records it."""

    index: int  # type: ignore[assignment]  # 0-based within the run
    seed: int  # what the environment was reset with
    steps: int  # environment interactions charged
    total_steps: int  # interactions charged so far, this episode included
    episode_return: float  # undiscounted
    cost: float  # the environment's own cost, summed
    accident: bool  # at least one accident
    accident_steps: int  # steps flagged as accidents
    version: int  # of the deployed policy that acted; 0 is the pretrained policy
    phase: str  # "warmup" or "online"
    shield_interventions: int  # steps whose action the shield replaced
    # "complete"; "fault" (the environment failed) or "lost" (the process died): whether there was
    # an accident is then unknown, and it counts as one. In the ledger alone, also "reserved".
    outcome: str = "complete"
    content: str = ""  # hash of all that happened, of a frozen policy's complete episode
    signal_costs: Mapping[str, float] = {}  # sums of the named cost signals, by their names
    guarded_steps: int = 0  # steps in which the guard's fallback acted


class Record(NamedTuple):
    """Numbers to log: ``step`` is the x axis (interactions charged, or gradient steps offline)."""

    step: int
    values: dict[str, float]


class Constraint(NamedTuple):
    """A measured value and its limit. Strictly below is satisfied, so a NaN is a violation."""

    name: str
    value: float
    limit: float

    @property
    def satisfied(self) -> bool:
        """Whether value < limit."""
        return self.value < self.limit
