"""COMBO (Yu et al. 2021, arXiv:2102.08363): conservative critics instead of an uncertainty.

Where MOPO takes from the reward what the model does not know, COMBO presses the critics down on
imagined steps and up on logged ones (eq. 2), beside the TD error on both:

    1/2 (Q - r - discount (1 - terminated) Q')^2 + beta (E_imagined[Q] - E_logged[Q])

Q' is the least of the target critics at the actor's own action. The actor is RLPD's, with
penalties.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from safe_offrl.agents.dynamics import Prediction
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.rlpd import RLPD, RLPDConfig
from safe_offrl.agents.steering import Steering
from safe_offrl.agents.world_model import ModelConfig, WorldModel
from safe_offrl.compute.descent import Descent
from safe_offrl.compute.state import Part
from safe_offrl.policies.gaussian import GAUSSIAN
from safe_offrl.policies.networks import EVERY, polyak_
from safe_offrl.types import Batch


@dataclass(frozen=True)
class COMBOConfig:
    """Settings of COMBO as published: ``rollout_steps`` 1 or 5, ``beta`` .5, 1 or 5.

    ``real_share`` of a batch is logged.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    beta: float = 0.5
    rollout_steps: int = 5
    real_share: float = 0.5
    model: ModelConfig = field(default_factory=ModelConfig)


class COMBO:
    """The model, critics that trust the log more than it, and RLPD's actor."""

    Config = COMBOConfig
    Online: type[OnlineAgent] | None = None
    kinds = (GAUSSIAN,)

    def __init__(self, setup: Setup, config: COMBOConfig) -> None:
        self.networks, self.generator, self.config = setup.networks, setup.generator, config
        learner = RLPDConfig(config.learning_rate, config.discount, config.tau)
        self.learner = RLPD(setup.networks, learner, setup.generator, setup.compute)
        self.model = WorldModel(setup, config.model)
        self._descend_critics = Descent(
            self.critic_loss, self.learner.critic_optimizer, setup.compute
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {**self.learner.parts(), **self.model.parts()}

    def critic_loss(self, batch: Batch, logged: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The objective of this module's docstring, summed over members; (loss, mean gap).

        The first ``logged`` rows of the batch are real; ``noise`` [B, A] is for the backup.
        """
        (errors,) = self.learner.critic_loss(batch, noise, EVERY)
        q = self.networks.q(batch.observations, batch.actions)
        gap = q[:, logged:].mean(-1) - q[:, :logged].mean(-1)
        return 0.5 * errors + self.config.beta * gap.sum(), gap.detach().mean()

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the model, or, when it has learnt, of critics and actor in it."""
        if self.model.learning:
            return self.model.update(batch)
        steps, share = self.config.rollout_steps, self.config.real_share
        mixed, logged = self.model.mixed(batch, steps, share, as_imagined)
        noise = self.networks.actor.noise(mixed.actions.shape[:-1], self.generator)
        loss, gap = self._descend_critics(mixed, logged, noise)
        polyak_(self.networks.target_critics, self.networks.critics, self.config.tau)
        metrics = {"agent/critic_loss": loss, "agent/conservative_gap": gap}
        return metrics | self.learner.update_actor(mixed, steering) | self.model.metrics(mixed)


def as_imagined(prediction: Prediction, step: Batch) -> Batch:
    """A step as it is: that it is imagined is what the critics count."""
    return step
