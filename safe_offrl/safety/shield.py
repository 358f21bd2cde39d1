"""The shield: of a few actions that the policy draws, the first that is not clearly riskier.

It compares actions of one state, so it is worth exactly what the critic's ranking is worth: until
held-out episodes have shown that the critic ranks actions it abstains. What it compares the policy
has drawn itself. An argmin over actions that nobody has tried would find the critic's blind spots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from safe_offrl.compute.state import arrays_sha256
from safe_offrl.errors import ConfigError
from safe_offrl.policies.acting import NumpyRisk, Sampler
from safe_offrl.policies.networks import StackedMLP
from safe_offrl.policies.protocol import Vector
from safe_offrl.safety.critic import SafetyCritic


@dataclass(frozen=True)
class ShieldConfig:
    """``candidates``: how many draws of the policy it chooses among, K.

    ``margin``: what an action's risk may lie above the least of the K, as a share of the limit.
    At 0 the least risky is always taken, and the policy gives up return for differences that do not
    matter. Whatever the critic says, a choice among K draws makes no action more than K times as
    probable as under the policy.
    """

    candidates: int = 4
    margin: float = 0.02

    def __post_init__(self) -> None:
        """Refuse a shield that has nothing to choose among, and a margin that is none."""
        if self.candidates < 2:
            raise ConfigError(
                f"shielding.candidates is {self.candidates}, but a choice takes 2 at least. Try 4, "
                "or --no-shield."
            )
        if not 0.0 <= self.margin < 1.0:
            raise ConfigError(
                f"shielding.margin is {self.margin}, but a share of the limit in [0, 1) is needed. "
                "Try 0.02."
            )


class Shield:
    """Frozen networks of risk, and how far above the least risk of its draws an action may be.

    ``margin`` is in the critic's unit. A shield that does not ``act`` lets the policy's first draw
    pass unseen; then it needs no ``net``.
    """

    def __init__(
        self, net: StackedMLP | None, candidates: int, margin: float, *, acts: bool
    ) -> None:
        self.net = net
        self._risk = None if net is None else NumpyRisk(net)
        self.candidates = candidates
        self.margin = margin
        self.acts = acts

    @classmethod
    def from_critic(
        cls, critic: SafetyCritic, config: ShieldConfig, limit: float, *, acts: bool
    ) -> Shield:
        """Of a copy of the critic's plain members; ``limit`` is what is constrained, in its unit.

        The others are pushed up at the policy's actions: no comparison of actions.
        """
        net = critic.net.select(critic.plain).requires_grad_(False).cpu()
        return cls(net, config.candidates, config.margin * limit, acts=acts)

    @classmethod
    def abstaining(cls) -> Shield:
        """One that never acts."""
        return cls(None, 1, 0.0, acts=False)

    def choose(
        self,
        actor: Sampler,
        observation: Vector,
        time_to_go: float,
        rng: np.random.Generator,
        *,
        mean_action: bool = False,
    ) -> tuple[Vector, bool]:
        """The action to execute [A], and whether it differs from the policy's first choice.

        The first choice is a draw, or the mean action; the other candidates are always draws.
        """
        drawn = actor.draw(observation, self.draws - mean_action, rng)
        options = np.stack([actor.mean_action(observation), *drawn]) if mean_action else drawn
        if not self.acts:
            return options[0], False
        assert self._risk is not None
        risk = self._risk(observation, time_to_go, options)
        # Not a number is never least; if there is nothing else, nothing is known.
        least = np.fmin.reduce(risk)
        taken = int(np.argmax(risk <= least + self.margin))
        return options[taken], taken > 0

    @property
    def draws(self) -> int:
        """How many actions an action is chosen among: one where the shield abstains."""
        return self.candidates if self.acts else 1

    @property
    def sha256(self) -> str:
        """Hash of networks, margin and number of draws."""
        nets = {} if self.net is None else self.net.state_dict()
        numbers = np.asarray([self.margin, self.draws], dtype=np.float64)
        return arrays_sha256({k: v.numpy() for k, v in nets.items()} | {"n": numbers})
