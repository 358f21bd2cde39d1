"""BCQ (Fujimoto et al. 2019, arXiv:1812.02900), with continuous actions: a variational autoencoder
proposes actions as the log has them, a network moves each by no more than phi, and the values ask
about no other (its algorithm 1 and eq. 13).

What it deploys there, the best of many such actions by Q, is here a policy that proposes: decoder
and perturbation are distilled into its generator, and the choice is learnt (agents/choice.py). For
that the latent code has A dimensions, not 2 A, of which each costs what it costs in the authors'
code. Their perturbation climbs the first critic, ours the least, less the risk.

A decoder is smoother than a flow: it has more actions between two ways, and of codes within .5
not the tails of what the log has. Both are as published.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safe_offrl.agents.choice import Choice
from safe_offrl.agents.flow import Distillation
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Penalty, Steering, steered
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import EAGER, Compute, Descent
from safe_offrl.compute.state import Part
from safe_offrl.nn.losses import td_target
from safe_offrl.policies.gaussian import Gaussian
from safe_offrl.policies.latent import generate
from safe_offrl.policies.mlp import linear_layers
from safe_offrl.policies.networks import Networks, polyak_
from safe_offrl.policies.proposals import PROPOSALS, ProposalNetwork
from safe_offrl.policies.protocol import Quadrature, normal
from safe_offrl.types import Batch

CODE_LIMIT = 0.5  # of a code that is drawn, in each dimension: near what the log has most of
LOG_STD_RANGE = (-4.0, 15.0)  # of a code, as in the authors' code
CODE_WEIGHT = 0.25  # of KL(code || N(0, I)), mean over A; the authors' is .5, mean over 2 A
NEXT_ACTIONS = 10  # among which a target takes the best
LEAST_WEIGHT = 0.75  # of the least critic in a target; the rest is the largest's


@dataclass(frozen=True)
class BCQConfig:
    """Settings of BCQ as published, and the ``temperature`` of the choice.

    ``perturbation`` is phi, the most by which an action is moved, in units of half its range.
    """

    learning_rate: float = 1e-3
    discount: float = 0.99
    tau: float = 5e-3
    perturbation: float = 0.05
    temperature: float = 0.05


class BCQValues:
    """Autoencoder, perturbation and critics, which learn of each other's actions alone."""

    def __init__(
        self,
        networks: Networks,
        config: BCQConfig,
        generator: torch.Generator,
        compute: Compute = EAGER,
    ) -> None:
        self.networks, self.config, self.generator = networks, config, generator
        (o, a), hidden = networks.layout.sizes, networks.sizes.actor_hidden
        self.encoder = linear_layers(o + a, (*hidden, 2 * a), generator)
        self.decoder = linear_layers(o + a, (*hidden, a), generator)
        self.perturbation = linear_layers(o + a, (*hidden, a), generator)
        self.target_perturbation = copy.deepcopy(self.perturbation).requires_grad_(False)
        lr = config.learning_rate
        both = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.autoencoder_optimizer = Adam(both, lr)
        self.critic_optimizer = Adam(networks.critics.parameters(), lr)
        self.perturbation_optimizer = Adam(self.perturbation.parameters(), lr)
        self._descend_autoencoder = Descent(
            self.autoencoder_loss, self.autoencoder_optimizer, compute
        )
        self._descend_critics = Descent(self.critic_loss, self.critic_optimizer, compute)
        self._descend_perturbation = Descent(
            self.perturbation_loss, self.perturbation_optimizer, compute
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {
            **self.networks.parts(),
            "encoder": self.encoder,
            "decoder": self.decoder,
            "perturbation": self.perturbation,
            "target_perturbation": self.target_perturbation,
            "autoencoder_optimizer": self.autoencoder_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "perturbation_optimizer": self.perturbation_optimizer,
        }

    def autoencoder_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor]:
        """``|decoder(s, z) - a|^2 + weight KL(code || N(0, I))``, means over batch and A.

        ``z`` is drawn from the code of (s, a) by normal noise [B, A].
        """
        mean, raw = self.encoder(torch.cat([batch.observations, batch.actions], -1)).chunk(2, -1)
        code = Gaussian(mean, raw.clamp(*LOG_STD_RANGE))
        error = generate(self.decoder, batch.observations, code.unsquashed(noise)) - batch.actions
        zeros = torch.zeros_like(mean)
        divergence = code.divergence(Gaussian(zeros, zeros)) / mean.shape[-1]
        return (error.square().mean() + CODE_WEIGHT * divergence.mean(),)

    def critic_loss(self, batch: Batch, z: Tensor) -> tuple[Tensor]:
        """Sum over members of the mean squared error to ``r + discount (1 - terminated) V(s')``.

        ``V = max_k [.75 min Q' + .25 max Q']`` over K actions of codes z [K, B, A] (eq. 13).
        """
        with torch.no_grad():
            actions = self.actions(batch.next_observations, z)
            q = self.networks.target_critics.over_actions(batch.next_observations, actions)
            mixed = LEAST_WEIGHT * q.amin(0) + (1.0 - LEAST_WEIGHT) * q.amax(0)
            next_value = mixed.amax(0)
            target = td_target(batch.rewards, batch.terminated, next_value, self.config.discount)
        q = self.networks.q(batch.observations, batch.actions)
        return ((q - target).square().mean(-1).sum(),)

    def perturbation_loss(
        self, batch: Batch, z: Tensor, penalties: tuple[Penalty, ...]
    ) -> tuple[Tensor]:
        """``-Q(s, a)/|Q| + sum lambda Q_C(s, a)``, mean, at what the codes z [B, A] are moved to.

        The deterministic policy gradient of the perturbation alone (eq. 12).
        """
        actions = self._moved(self.perturbation, batch.observations, z)
        return (steered(Quadrature(actions), batch, self.networks.q, penalties).mean(),)

    def actions(self, observations: Tensor, z: Tensor) -> Tensor:
        """What is proposed of codes [..., B, A], moved by the average perturbation."""
        return self._moved(self.target_perturbation, observations, z)

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """Autoencoder, critics, perturbation, then Polyak; scalars to log."""
        shape, generator, tau = batch.actions.shape, self.generator, self.config.tau
        noise, z = normal(shape, generator), normal(shape, generator)
        (autoencoder_loss,) = self._descend_autoencoder(batch, noise)
        next_z = normal((NEXT_ACTIONS, *shape), generator)
        (critic_loss,) = self._descend_critics(batch, next_z)
        (perturbation_loss,) = self._descend_perturbation(batch, z, steering.penalties)
        polyak_(self.networks.target_critics, self.networks.critics, tau)
        polyak_(self.target_perturbation, self.perturbation, tau)
        return {
            "agent/critic_loss": critic_loss,
            "agent/autoencoder_loss": autoencoder_loss,
            "agent/perturbation_loss": perturbation_loss,
        }

    def _moved(self, perturbation: nn.Module, observations: Tensor, z: Tensor) -> Tensor:
        with torch.no_grad():
            decoded = generate(self.decoder, observations, z.clamp(-CODE_LIMIT, CODE_LIMIT))
        seen = observations.expand(*z.shape[:-1], -1)
        shift = torch.tanh(perturbation(torch.cat([seen, decoded], dim=-1)))
        return (decoded + self.config.perturbation * shift).clamp(-1.0, 1.0)


class BCQ:
    """Values with what proposes, the generator that is taught it, and the choice."""

    Config = BCQConfig
    Online: type[OnlineAgent] | None = None
    kinds = (PROPOSALS,)

    def __init__(self, setup: Setup, config: BCQConfig) -> None:
        networks, self.generator, compute = setup.networks, setup.generator, setup.compute
        lr, network = config.learning_rate, networks.actor.layers
        assert isinstance(network, ProposalNetwork)
        self.values = BCQValues(networks, config, self.generator, compute)
        self.distillation = Distillation(network.generator, self.values.actions, lr, compute)
        self.choice = Choice(networks, lr, config.temperature, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {**self.values.parts(), **self.distillation.parts(), **self.choice.parts()}

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of each."""
        metrics = self.values.update(batch, steering)
        w = normal(batch.actions.shape, self.generator)
        distillation_loss = self.distillation.update(batch.observations, w)
        metrics |= self.choice.update(batch, steering, self.generator)
        return metrics | {"actor/distillation_loss": distillation_loss}
