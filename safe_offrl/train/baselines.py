"""What the baselines of a benchmark change in the online phase; our method leaves all of it off.

They run through the same loop, networks, buffers and ledger as our method, so that a difference is
the algorithm's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from safe_offrl.agents import AgentConfigs, find_online
from safe_offrl.errors import ConfigError
from safe_offrl.safety.multiplier import PIDConfig


@dataclass(frozen=True)
class BaselineConfig:
    """Settings that only baselines need.

    ``learner`` goes on online: "rlpd", or an agent that has an online form, such as "calql" or
    "iql" (which needs a policy pretrained by it); ``agents`` are the settings of those. After an
    agent that goes on itself, such as "gail", or as "fql", whose policies have no entropy, it is
    that one by default.
    ``from_scratch`` forgets the pretrained policy and critics, and makes the warm-up uniformly
    random, as RLPD was published. ``multiplier`` other than "ours" is a Lagrangian method: lambda
    follows what recent episodes showed, by "dual" ascent or "pid", and the learner is deployed
    after every episode, untested. Its lambda begins at ``multiplier_init``, or where the offline
    phase left it. ``sooper`` makes the guard that of SOOPER (arXiv:2601.19612) without its model:
    the pretrained policy is the fallback, as its own safety critic sees it, acts to the end of the
    episode, and there the episode ends for the learner.
    """

    learner: str = "rlpd"
    from_scratch: bool = False
    multiplier: Literal["ours", "dual", "pid"] = "ours"
    multiplier_init: float | None = None
    sooper: bool = False
    pid: PIDConfig = field(default_factory=PIDConfig)
    agents: AgentConfigs = field(default_factory=AgentConfigs)

    @property
    def gains(self) -> PIDConfig | None:
        """Of PID control of lambda, if that is asked for."""
        return self.pid if self.multiplier == "pid" else None

    def __post_init__(self) -> None:
        """Refuse a learner that is unknown or has nothing to begin with, and a start of lambda
        that nothing would use or is below 0.
        """
        if self.learner != "rlpd" and ":" not in self.learner:
            online = find_online(self.learner)
            if self.from_scratch and not getattr(online, "from_scratch", True):
                raise ConfigError(
                    f'baseline.from_scratch: the agent "{self.learner}" learns offline alone what '
                    "proposes its actions. Set baseline.learner=rlpd."
                )
        if self.multiplier_init is not None and (
            self.multiplier == "ours" or self.multiplier_init < 0.0
        ):
            raise ConfigError(
                f"baseline.multiplier_init is {self.multiplier_init}, but it needs "
                "baseline.multiplier dual or pid, and a number of at least 0. Leave it out."
            )
