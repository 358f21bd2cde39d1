"""CRR (Wang et al. 2020, arXiv:2006.15134): imitation of what beats the policy itself.

    maximise E_{(s, a) ~ log}[ f(A) log pi(a|s) ],  A = Q(s, a) - E_{a' ~ pi} Q(s, a')

with f(A) = 1[A > 0], "binary", or min(exp(A / temperature), 20), "exp" (algorithm 1). The paper
takes the mean of m = 4 actions for the expectation, which is noise in A; ours is exact over the
components of the policy. Its critics are distributional; ours learn the mean alone, and Q is the
least of them. Its evaluation, in which the critic chooses among actions, is left out: what acts is
what has imitated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.agents.td_values import TDValues
from safe_offrl.agents.weighted_imitation import WeightedImitation
from safe_offrl.compute.state import Part
from safe_offrl.nn.losses import exponential_weight
from safe_offrl.policies.categorical import CATEGORICAL
from safe_offrl.policies.mixture import MIXTURE
from safe_offrl.policies.protocol import Quadrature
from safe_offrl.types import Batch


@dataclass(frozen=True)
class CRRConfig:
    """Settings of CRR as published; ``temperature`` (its beta, in units of Q) is of "exp" alone."""

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    weighting: Literal["exp", "binary"] = "exp"
    temperature: float = 1.0
    weight_limit: float = 20.0


class CRR:
    """Critics by temporal differences, and the actor by their advantages."""

    Config = CRRConfig
    Online: type[OnlineAgent] | None = None
    kinds = (MIXTURE, CATEGORICAL)

    def __init__(self, setup: Setup, config: CRRConfig) -> None:
        self.config, lr = config, config.learning_rate
        self.imitation = WeightedImitation(setup, "crr", self.weights, lr)
        self.values = TDValues(
            setup.networks,
            setup.generator,
            setup.compute,
            learning_rate=lr,
            discount=config.discount,
            tau=config.tau,
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return self.values.parts() | self.imitation.parts()

    def weights(self, batch: Batch, policy: Quadrature) -> Tensor:
        """f of this module's docstring, of logged actions [B]."""
        advantages = self.values.advantages(batch, policy)
        if self.config.weighting == "binary":
            return (advantages > 0.0).to(advantages.dtype)
        return exponential_weight(
            advantages, 1.0 / self.config.temperature, self.config.weight_limit
        )

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """The critics, then the actor."""
        metrics = self.values.update(batch)
        return metrics | {"actor/loss": self.imitation.update(batch, steering)}
