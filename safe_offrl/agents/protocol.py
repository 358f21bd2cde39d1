"""What an algorithm is to the loops: a class that is built from a Setup and its own settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from safe_offrl.agents.aversion import Aversion
from safe_offrl.agents.extraction import ExtractionConfig
from safe_offrl.agents.rlpd import RLPDConfig
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.descent import EAGER, Compute
from safe_offrl.compute.state import Part
from safe_offrl.data.dataset import Dataset
from safe_offrl.limits import Limit
from safe_offrl.policies.networks import Networks
from safe_offrl.types import Batch

# The actions [n, A] that a controller of the environment takes at observations [n, O].
Labeller = Callable[[Tensor], Tensor]


class Setup(NamedTuple):
    """What an agent is built from; it takes of it what it needs."""

    networks: Networks  # actor and critics, which outlive the agent
    dataset: Dataset  # the log, normalised
    limits: tuple[Limit, ...]  # at least one
    generator: torch.Generator  # of all that is drawn
    compute: Compute = EAGER
    extraction: ExtractionConfig = ExtractionConfig()  # where it trains its actor by Extraction
    aversions: tuple[Aversion, ...] = ()  # its, one a limit; none: the settings' to the only one
    learner: RLPDConfig = RLPDConfig()  # where it trains its actor as RLPD does
    steps: int = 0  # updates that an offline agent will have
    offline_share: float = 0.5  # of a batch online: so many of its rows are logged, the first ones
    controller: Labeller | None = None  # online, where the agent's settings name one


class OnlineAgent(Protocol):
    """What the online loop knows of a learner.

    One whose batches are of chunks says what these span: a Reach, as ``reach``. One that goes on
    from its offline form alone says ``from_scratch = False``.
    One that has parts of which nothing is learnt offline names them as ``fresh``.
    """

    own_values: bool  # it goes on from what its offline form has learnt, not from what was aligned
    return_discount: float | None  # of the returns-to-go that its batches need; None: it needs none

    def __init__(self, setup: Setup, config: Any) -> None:
        """``config`` is the offline form's."""

    def update_critics(self, batch: Batch) -> dict[str, Tensor]:
        """One step of all values; scalars to log."""
        ...

    def update_actor(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the actor; scalars to log."""
        ...

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        ...


class Agent(Protocol):
    """What the offline loop knows of an algorithm.

    ``Config`` is a frozen dataclass with a learning rate and the ``discount`` of the values, None
    where it learns none. ``Online`` is its form that goes on online, None where only RLPD does. A
    class that trains certain kinds of policies names them, each a Kind, as ``kinds``; one whose
    online form is what it is for sets ``goes_on``. Settings with a ``controller`` name one of the
    environment's (env/controllers.py), which its online form is given; "" the only one.
    """

    Config: type[Any]
    Online: type[OnlineAgent] | None

    def __init__(self, setup: Setup, config: Any) -> None:
        """``config`` is of the type ``Config``."""

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of values and actor; scalars to log."""
        ...

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps; an online form with ``own_values`` finds its parts by name."""
        ...
