"""Settings of the offline phase."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from safe_offrl.agents import AgentConfigs, find_agent
from safe_offrl.agents.extraction import ExtractionConfig
from safe_offrl.agents.rlpd import RLPDConfig
from safe_offrl.compute.descent import CompileMode, Precision
from safe_offrl.compute.device import DeviceChoice
from safe_offrl.errors import ConfigError
from safe_offrl.policies.networks import NetworkConfig
from safe_offrl.safety.critic import SafetyCriticConfig
from safe_offrl.safety.multiplier import LagrangianConfig
from safe_offrl.spec import SafetySpec


@dataclass(frozen=True)
class FallbackConfig:
    """Settings of what the guard falls back to.

    ``steps`` gradient steps, no more than the agent's; at 0 nothing is learnt, and no guard acts.
    ``caution`` times the risk is minimised, with ``weight`` of the KL from the log; a logged action
    weighs ``exp(-caution (Q_C - V_C))``. A way out of what costs can be long: the critic of the
    fallback looks 1 / (1 - ``cost_discount``) steps ahead, whatever the other one does. At .95 the
    policies of two seeds in three could be stuck in a cost to the end (SafetyPointCircle1).
    Networks, batches and all else are the agent's and the safety critic's.
    """

    steps: int = 10_000
    caution: float = 100.0
    weight: float = 0.05
    cost_discount: float = 0.99

    def __post_init__(self) -> None:
        """Refuse what is no caution."""
        if not (
            self.steps >= 0 and 0.0 < self.caution < math.inf and 0.0 <= self.weight < math.inf
        ):
            raise ConfigError(
                "fallback.steps and fallback.weight must be at least 0 and fallback.caution above "
                "0. Try 10_000, 0.05 and 100."
            )
        if not 0.0 < self.cost_discount < 1.0:
            raise ConfigError(
                f"fallback.cost_discount is {self.cost_discount}, but a number strictly between 0 "
                "and 1 is needed. Try 0.99."
            )


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of the offline phase.

    ``steps`` gradient steps of the agent, then ``alignment_steps`` in which the actor is frozen and
    the reward and safety critics learn its own values (Marvel, arXiv:2412.04426): the online phase
    starts from critics that agree with the policy that will act. Without ``safety_constraint`` the
    agent is as published: its actor knows nothing of the safety critics, which learn all the same.
    ``held_out`` is the share of episodes kept for the calibration report. ``device`` (see
    :mod:`safe_offrl.compute.device`), ``compile`` and ``precision`` (see
    :mod:`safe_offrl.compute.descent`) say how losses are computed.
    """

    agent: str = "iql"
    env: str = "PointHazard-v0"
    dataset: str | None = None
    steps: int = 100_000
    alignment_steps: int = 5_000
    batch_size: int = 256
    held_out: float = 0.15
    seed: int = 0
    safety_constraint: bool = True
    log_every: int = 1000
    device: DeviceChoice = "auto"
    compile: CompileMode = "auto"
    precision: Precision = "fp32"
    safety: SafetySpec = field(default_factory=SafetySpec)
    networks: NetworkConfig = field(default_factory=NetworkConfig)
    critic: SafetyCriticConfig = field(default_factory=SafetyCriticConfig)
    lagrangian: LagrangianConfig = field(default_factory=LagrangianConfig)
    agents: AgentConfigs = field(default_factory=AgentConfigs)
    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)
    alignment: RLPDConfig = field(default_factory=RLPDConfig)
    fallback: FallbackConfig = field(default_factory=FallbackConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot run."""
        if ":" not in self.agent:  # else importing it must wait until the run is trusted
            key = self.agents.key(find_agent(self.agent))
            if self.agents.own and key != "own":
                raise ConfigError(
                    "agents.own holds settings of an agent of your own, but agent is "
                    f"{self.agent}. Leave them out, or set agents.{key}."
                )
        if self.steps < 1 or self.alignment_steps < 0 or self.batch_size < 2 or self.log_every < 1:
            raise ConfigError(
                "steps and log_every must be at least 1, alignment_steps at least 0 and batch_size "
                "at least 2. Raise the one that is too small."
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, but 0 or more is needed. Try 0.")
        if self.alignment.discount != discount_of(self):
            raise ConfigError(
                f"alignment.discount is {self.alignment.discount}, but the values that are aligned "
                f"are discounted by {discount_of(self)}. Set both to the same."
            )
        if not 0.0 < self.held_out < 0.9:
            raise ConfigError(
                f"held_out is {self.held_out}, but a share of episodes in (0, 0.9) is needed. "
                "Try 0.1."
            )

    @property
    def fallback_steps(self) -> int:
        """Gradient steps of the guard's fallback."""
        return min(self.fallback.steps, self.steps)


def discount_of(config: PretrainConfig) -> float:
    """Discount of the run's values: what return_to_go in the dataset must be computed with.

    That of the chosen agent; of one that learns no values, that of the alignment.
    """
    own = config.agents.discount(config.agent)
    return config.alignment.discount if own is None else own
