"""The shield: actions that the safety critic calls dangerous are drawn again, or replaced.

It compares actions of one state, so it is worth exactly what the critic's ranking is worth: without
a threshold from a passed calibration report it abstains, and never picks the least dangerous of
many actions it knows nothing about (an argmin over unsupported actions finds the critic's blind
spots).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from safe_offrl.acting import Sampler
from safe_offrl.errors import ConfigError
from safe_offrl.safety_critic import SafetyCritic

Vector = NDArray[np.float32]
Controller = Callable[[Vector], Vector]


@dataclass(frozen=True)
class ShieldConfig:
    """``candidates``: how many samples of the policy may be tried before falling back.

    Discrete actions are all tried, in an order drawn from the policy.
    """

    candidates: int = 16

    def __post_init__(self) -> None:
        """Refuse a shield that would draw no action."""
        if self.candidates < 1:
            raise ConfigError(
                f"shielding.candidates is {self.candidates}, but at least 1 is needed. Try 16."
            )


class Shield:
    """A frozen copy of the safety critic, a threshold, and a chain of fall-backs.

    First of K samples below the threshold; else the policy's mean action, the previously accepted
    action, the user's safe controller, in this order, whichever is below the threshold first; else
    the controller's action, or without a controller the mean action.
    """

    def __init__(
        self,
        critic: SafetyCritic,
        threshold: float | None,
        config: ShieldConfig,
        safe_controller: Controller | None = None,
    ) -> None:
        self.threshold = threshold
        self.config = config
        self.safe_controller = safe_controller
        self.net = copy.deepcopy(critic.net).requires_grad_(False)
        self.reference = critic.config.reference  # members that learn by plain TD have no say
        self.previous: Vector | None = None  # action that was accepted last in this episode

    @property
    def abstains(self) -> bool:
        """Whether every action passes unseen, for want of a calibrated threshold."""
        return self.threshold is None

    def start_episode(self) -> None:
        """Forget the previous episode's action."""
        self.previous = None

    def choose(
        self,
        actor: Sampler,
        observation: Vector,
        time_to_go: float,
        rng: np.random.Generator,
        *,
        mean_action: bool = False,
    ) -> tuple[Vector, bool]:
        """The action to execute [A], and whether it differs from the policy's first choice."""
        first = actor.mean_action(observation) if mean_action else actor.sample(observation, rng)
        if self.threshold is None:
            return first, False
        if self._risk(observation, time_to_go, first[None])[0] <= self.threshold:
            self.previous = first
            return first, False
        fallbacks = [actor.mean_action(observation)]
        if self.previous is not None:
            fallbacks.append(self.previous)
        if self.safe_controller is not None:
            fallbacks.append(self.safe_controller(observation))
        candidates = actor.candidates(observation, self.config.candidates - 1, rng)
        options = np.stack([*candidates, *fallbacks])
        passing = np.flatnonzero(self._risk(observation, time_to_go, options) <= self.threshold)
        if len(passing):
            self.previous = options[passing[0]]
            return options[passing[0]], True
        return (fallbacks[-1] if self.safe_controller is not None else fallbacks[0]), True

    def _risk(
        self, observation: Vector, time_to_go: float, actions: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        with torch.no_grad():
            observations = torch.from_numpy(observation).expand(len(actions), -1)
            left = torch.full((len(actions), 1), time_to_go)
            inputs = torch.cat([observations, left, torch.from_numpy(actions)], dim=-1)
            return torch.sigmoid(self.net(inputs)[self.reference :]).mean(0).numpy()
