"""MOPO (Yu et al. 2020, arXiv:2005.13239): policy optimisation in a model that punishes what it
does not know.

    r~(s, a) = r(s, a) - penalty u(s, a),   u = max_i |Sigma_i(s, a)|

u is in standard deviations of the log's changes and the penalty in those of its rewards, so that
neither depends on a task's units. The actor-critic is RLPD's where SAC's is published: it has more
critics. Accidents and terminations are the model's too, see :mod:`safe_offrl.agents.dynamics`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from safe_offrl.agents.dynamics import Prediction, uncertainty
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.agents.steering import Steering
from safe_offrl.agents.world_model import ModelConfig, WorldModel
from safe_offrl.compute.state import Part
from safe_offrl.policies.gaussian import GAUSSIAN
from safe_offrl.types import Batch


@dataclass(frozen=True)
class MOPOConfig:
    """Settings of MOPO as published: ``rollout_steps`` 1 or 5, ``penalty`` 1 to 5.

    ``real_share`` of a batch is logged.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    penalty: float = 1.0
    rollout_steps: int = 5
    real_share: float = 0.05
    model: ModelConfig = field(default_factory=ModelConfig)


class MOPO:
    """The model, and RLPD on what the actor does in it."""

    Config = MOPOConfig
    Online: type[OnlineAgent] | None = None
    kinds = (GAUSSIAN,)

    def __init__(self, setup: Setup, config: MOPOConfig) -> None:
        self.config = config
        learner = RLPDConfig(config.learning_rate, config.discount, config.tau)
        self.learner = RLPD(setup.networks, learner, setup.generator, setup.compute)
        self.model = WorldModel(setup, config.model)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {**self.learner.parts(), **self.model.parts()}

    def penalised(self, prediction: Prediction, step: Batch) -> Batch:
        """The step with ``penalty u`` less of a reward."""
        unit = self.config.penalty * self.model.dynamics.scale[-1]
        return step._replace(rewards=step.rewards - unit * uncertainty(prediction))

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the model, or, when it has learnt, of critics and actor in it."""
        if self.model.learning:
            return self.model.update(batch)
        steps, share = self.config.rollout_steps, self.config.real_share
        mixed, _ = self.model.mixed(batch, steps, share, self.penalised)
        metrics = self.learner.update_critics(mixed) | self.learner.update_actor(mixed, steering)
        return metrics | self.model.metrics(mixed)
