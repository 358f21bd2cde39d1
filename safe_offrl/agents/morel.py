"""MOReL (Kidambi et al. 2020, arXiv:2005.05951): a model that halts where its members disagree.

Where ``max_ij |f_i(s, a) - f_j(s, a)|`` (eq. 2) exceeds the most that it is on the log, the step
leads to HALT. There the paper pays -R_max in each step for ever; here HALT ends the episode and
pays, once, the most that a return to go of the log loses or wins, negated: no policy that stays in
the log is worth less, and critics need not span a hundred times what they learn. The paper plans by
natural policy gradient over long trajectories; here RLPD learns from short ones, see
:mod:`safe_offrl.agents.world_model`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from safe_offrl.agents.dynamics import Prediction, disagreement
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.agents.steering import Steering
from safe_offrl.agents.world_model import ModelConfig, WorldModel
from safe_offrl.compute.state import Part
from safe_offrl.policies.gaussian import GAUSSIAN
from safe_offrl.types import Batch


@dataclass(frozen=True)
class MOReLConfig:
    """Settings of MOReL: the critics' and actor's are those of MOPO."""

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    rollout_steps: int = 5
    real_share: float = 0.05
    model: ModelConfig = field(default_factory=ModelConfig)


class MOReL:
    """The model, and RLPD on what the actor does in it as far as it is known."""

    Config = MOReLConfig
    Online: type[OnlineAgent] | None = None
    kinds = (GAUSSIAN,)

    def __init__(self, setup: Setup, config: MOReLConfig) -> None:
        self.config = config
        learner = RLPDConfig(config.learning_rate, config.discount, config.tau)
        self.learner = RLPD(setup.networks, learner, setup.generator, setup.compute)
        self.model = WorldModel(setup, config.model)
        self.halting_reward = -float(setup.dataset.column("return_to_go").abs().max())
        most = torch.finfo(torch.float32).max  # a checkpoint has no infinity
        self.threshold = torch.tensor(most, device=setup.generator.device)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {**self.learner.parts(), **self.model.parts(), "threshold": self.threshold}

    def largest_disagreement(self) -> Tensor:
        """Of logged steps that no member has learnt from, a scalar."""
        logged = self.model.held_out
        with torch.no_grad():
            return disagreement(self.model.dynamics(logged.observations, logged.actions)).max()

    def halted(self, prediction: Prediction, step: Batch) -> Batch:
        """The step, or where too little is known of it the end, and what that pays."""
        unknown = disagreement(prediction) > self.threshold
        return step._replace(
            rewards=step.rewards.masked_fill(unknown, self.halting_reward),
            terminated=step.terminated.masked_fill(unknown, 1.0),
        )

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the model, or, when it has learnt, of critics and actor in it."""
        if self.model.learning:
            metrics = self.model.update(batch)
            if not self.model.learning:
                self.threshold.copy_(self.largest_disagreement())
            return metrics
        steps, share = self.config.rollout_steps, self.config.real_share
        mixed, _ = self.model.mixed(batch, steps, share, self.halted)
        metrics = self.learner.update_critics(mixed) | self.learner.update_actor(mixed, steering)
        return metrics | self.model.metrics(mixed)
