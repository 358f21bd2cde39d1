"""GAIL (Ho & Ermon 2016, arXiv:1606.03476): act so that nobody can tell it from demonstrations.

Offline it is behaviour cloning. Online a discriminator D learns which steps are demonstrations,

    minimise -E_demonstrations[log D(s, a)] - E_online[log(1 - D(s, a))]

(eq. 17; its D is our 1 - D), and RLPD learns from ``-log(1 - D) - log 2`` in place of the reward.
Without the constant this is above 0 everywhere, so that the longest episode pays most, whatever is
done in it; ``log D`` is below 0, and the shortest does (survival bias, DAC, arXiv:1809.02925, which
adds absorbing states instead). With it the end of an episode is worth as much as steps that cannot
be told apart. Logits are cut off at +-5: rewards are in [-.69, 4.32]. LayerNorm in D stands for
DAC's gradient penalty. The paper's TRPO forgets what was played; here, as in DAC, all of it is
replayed, and so is the log.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from safe_offrl.agents.bc import BC, BCConfig, BCSafe, safe_episodes
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.rlpd import RLPD
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import Compute, Descent
from safe_offrl.compute.state import Part
from safe_offrl.data.sampling import logged_rows, uniform_batches
from safe_offrl.policies.categorical import CATEGORICAL
from safe_offrl.policies.mixture import MIXTURE
from safe_offrl.policies.networks import Networks, StackedMLP
from safe_offrl.policies.protocol import require_entropy
from safe_offrl.types import Batch

LOGIT_LIMIT = 5.0
LEAST_SCALE = 1.0  # of values: those of a policy that cannot be told apart are 0, but for noise


@dataclass(frozen=True)
class GAILConfig:
    """Settings of GAIL; the learning rate is that of imitation and of the discriminator.

    ``safe_only``: the demonstrations are the log's episodes within every limit, as in bc_safe.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    safe_only: bool = False


class Discriminator:
    """D(s, a), the probability of a demonstration: a network as large as a critic."""

    def __init__(
        self,
        networks: Networks,
        learning_rate: float,
        generator: torch.Generator,
        compute: Compute,
    ) -> None:
        self.network = StackedMLP(
            1,
            sum(networks.layout.sizes),
            networks.sizes.critic_hidden,
            layer_norm=True,
            generator=generator,
        )
        self.optimizer = Adam(self.network.parameters(), learning_rate)
        self._descend = Descent(self.loss, self.optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {"discriminator": self.network, "discriminator_optimizer": self.optimizer}

    def logits(self, batch: Batch) -> Tensor:
        """``log D - log(1 - D)`` of steps, [B]."""
        both = torch.cat([batch.observations, batch.actions], dim=-1)
        logits: Tensor = self.network(both)[0]
        return logits

    def loss(self, demonstrated: Batch, online: Batch) -> tuple[Tensor]:
        """The objective of this module's docstring, in nats: 2 log 2 of who cannot tell."""
        misses = F.softplus(-self.logits(demonstrated)).mean()
        return (misses + F.softplus(self.logits(online)).mean(),)

    def update(self, demonstrated: Batch, online: Batch) -> Tensor:
        """One step; its loss."""
        (loss,) = self._descend(demonstrated, online)
        return loss

    @torch.no_grad()
    def rewards(self, batch: Batch) -> Tensor:
        """``-log(1 - D) - log 2`` of steps [B], with bounded logits."""
        logits = self.logits(batch).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        return F.softplus(logits) - math.log(2.0)


class OnlineGAIL:
    """The discriminator, and RLPD on its rewards.

    Its critics begin anew: what offline critics have learnt is the environment's reward. The
    warm-up, in which the actor stays as it is, is theirs and the discriminator's to learn in.
    """

    own_values = False
    return_discount: float | None = None
    fresh = (
        "critics",
        "target_critics",
        "critic_optimizer",
        "discriminator",
        "discriminator_optimizer",
    )

    def __init__(self, setup: Setup, config: GAILConfig) -> None:
        networks, self.generator, compute = setup.networks, setup.generator, setup.compute
        require_entropy(networks.actor.kind, "The entropy that gail keeps online")
        self.offline_share = setup.offline_share
        demonstrations = setup.dataset
        if config.safe_only:
            demonstrations = safe_episodes(demonstrations, setup.limits, "gail")
        self.demonstrations = demonstrations.on(self.generator.device)
        learner = replace(setup.learner, discount=config.discount)
        self.learner = RLPD(networks, learner, self.generator, compute, least_scale=LEAST_SCALE)
        lr = config.learning_rate
        self.discriminator = Discriminator(networks, lr, self.generator, compute)
        self.update_actor = self.learner.update_actor

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {**self.learner.parts(), **self.discriminator.parts()}

    def update_critics(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the discriminator on the batch's online rows and as many demonstrations.

        Then one of the critics, on all rows and the rewards of that discriminator.
        """
        n = logged_rows(len(batch.rewards), self.offline_share)
        online = Batch(*(field[n:] for field in batch.tensors))
        rows, layout = self.demonstrations.rows, self.demonstrations.layout
        (demonstrated,) = uniform_batches(rows, layout, 1, len(online.rewards), self.generator)
        loss = self.discriminator.update(demonstrated, online)
        rewards = self.discriminator.rewards(batch)
        metrics = self.learner.update_critics(batch._replace(rewards=rewards))
        return metrics | {
            "learner/discriminator_loss": loss,
            "learner/imitation_reward": rewards[n:].mean(),
        }


class GAIL:
    """GAIL before it has played: behaviour cloning of the demonstrations."""

    Config = GAILConfig
    Online: type[OnlineAgent] | None = OnlineGAIL
    kinds = (MIXTURE, CATEGORICAL)
    goes_on = True

    def __init__(self, setup: Setup, config: GAILConfig) -> None:
        imitation = BCSafe if config.safe_only else BC
        self.imitation = imitation(setup, BCConfig(config.learning_rate), "gail")
        self.parts, self.update = self.imitation.parts, self.imitation.update
