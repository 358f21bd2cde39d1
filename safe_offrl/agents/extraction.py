"""Offline policy extraction: mode-seeking, inside the support of the log, and away from accidents.

A Gaussian that imitates "pass left" and "pass right" drives into the obstacle between them. So the
log is imitated by a MIXTURE (a density network, Bishop 1994), which can hold both ways, weighted by
advantage (AWR, arXiv:1910.00177) and by the chance that the action ends well; and the actor is its
reverse-KL projection, which picks one mode and stays inside it, tilted by the critics:

    minimise E_{a ~ pi}[ -Q(s, a)/|Q| + lambda Q_C(s, a) ] + weight KL(pi || mixture)

(BRAC's value-free form, arXiv:1911.11361, with a weighted mixture for the behaviour). An action
outside the log's support has a log density that no blind spot of a critic can outweigh. Discrete
actions need no density network: a categorical holds any mixture of them, and the objective is then
exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safe_offrl.agents.steering import Steering
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import EAGER, Compute, Descent
from safe_offrl.compute.state import Part
from safe_offrl.nn.losses import exponential_weight
from safe_offrl.policies.distributions import (
    LOG_STD_MAX,
    LOG_STD_MIN,
    Gaussian,
    Policy,
    Quadrature,
    normal,
)
from safe_offrl.policies.networks import Networks, QFunction, Risk, linear_layers
from safe_offrl.types import Batch


@dataclass(frozen=True)
class ExtractionConfig:
    """``weight`` of KL(pi || mixture) against the normalised critics; ``components`` it has.

    ``inverse_temperature`` and ``weight_limit`` are AWR's: exp(inverse_temperature * A), clipped.
    A logged action also weighs ``exp(-risk_aversion Q_C)``: at 10, one of risk .3 counts 1/20.
    ``relative_risk`` takes ``Q_C - V_C``, how much riskier it is than the policy's own action: an
    accident is to be kept away from, but in the middle of a cost the log must still teach the way
    out of it.
    """

    learning_rate: float = 3e-4
    weight: float = 0.1
    components: int = 6
    inverse_temperature: float = 3.0
    risk_aversion: float = 10.0
    relative_risk: bool = False
    weight_limit: float = 100.0


class MixturePolicy(nn.Module):
    """Model of the log's behaviour: mixture of K diagonal Gaussians before tanh, p(u | s)."""

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: tuple[int, ...],
        components: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.components = components
        self.action_size = action_size
        outputs = components * (1 + 2 * action_size)
        self.layers = linear_layers(observation_size, (*hidden, outputs), generator)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Log density of logged actions [B, A], before tanh -> [B]."""
        # tanh saturates: |a| = 1 has no finite pre-image, so the edge is taken at 1 - 1e-3.
        return self._log_density(observations, torch.atanh(actions.clamp(-0.999, 0.999)))

    def relative(self, policy: Policy, observations: Tensor, noise: Tensor) -> Quadrature:
        """The policy's actions, with ``log pi - log mixture`` in the place of ``log pi``."""
        assert isinstance(policy, Gaussian)
        mean, log_std = policy
        pre_tanh = mean + log_std.exp() * noise
        density = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
        # Both densities are before tanh: its Jacobian cancels in the ratio.
        log_ratio = density.sum(-1) - self._log_density(observations, pre_tanh)
        return Quadrature(torch.tanh(pre_tanh), log_ratio)

    def _log_density(self, observations: Tensor, pre_tanh: Tensor) -> Tensor:
        """Log density of u [B, A] before tanh (no Jacobian) -> [B]."""
        k, a = self.components, self.action_size
        out = self.layers(observations)
        log_weights = torch.log_softmax(out[:, :k], dim=-1)
        mean, raw = out[:, k:].view(-1, k, 2 * a).chunk(2, dim=-1)
        log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(raw) + 1.0)
        noise = (pre_tanh.unsqueeze(1) - mean) / log_std.exp()
        density = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
        return torch.logsumexp(log_weights + density.sum(-1), dim=-1)


class CategoricalMixture(nn.Module):
    """Model of the log's behaviour where actions are discrete: p(a | s), one-hot a [B, A]."""

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: tuple[int, ...],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.layers = linear_layers(observation_size, (*hidden, action_size), generator)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Log probability of logged actions [B, A] -> [B]."""
        return (self._log_probs(observations) * actions).sum(-1)

    def relative(self, policy: Policy, observations: Tensor, noise: Tensor) -> Quadrature:
        """All actions, with ``log pi - log p`` in the place of ``log pi``."""
        every = policy.quadrature(noise)
        return every._replace(log_probs=every.log_probs - self._log_probs(observations).T.flatten())

    def _log_probs(self, observations: Tensor) -> Tensor:
        return torch.log_softmax(self.layers(observations), dim=-1)


class Extraction:
    """Trains the actor of an offline agent that has values; owns the mixture, both optimisers."""

    def __init__(
        self,
        networks: Networks,
        config: ExtractionConfig,
        generator: torch.Generator,
        compute: Compute = EAGER,
    ) -> None:
        self.networks = networks
        self.actor = networks.actor
        self.config = config
        self.generator = generator
        sizes = (*networks.layout, networks.sizes.actor_hidden)
        self.mixture = (
            CategoricalMixture(*sizes, generator)
            if self.actor.discrete
            else MixturePolicy(*sizes, config.components, generator)
        )
        self.mixture_optimizer = Adam(self.mixture.parameters(), config.learning_rate)
        self.actor_optimizer = Adam(self.actor.parameters(), config.learning_rate)
        self._descend_mixture = Descent(self.mixture_loss, self.mixture_optimizer, compute)
        self._descend_actor = Descent(self.actor_loss, self.actor_optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps, besides the actor."""
        return {
            "mixture": self.mixture,
            "mixture_optimizer": self.mixture_optimizer,
            "actor_optimizer": self.actor_optimizer,
        }

    def mixture_loss(
        self, batch: Batch, advantages: Tensor, risk: Risk, noise: Tensor | None
    ) -> tuple[Tensor]:
        """Negative log likelihood of logged actions, weighted by advantage [B] and against risk.

        With ``noise`` [B, A] the risk is relative to that of the policy's own action.
        """
        with torch.no_grad():
            danger = risk(batch.observations, batch.time_to_go, batch.actions)
            if noise is not None:
                policy = self.actor(batch.observations).quadrature(noise)
                observations = policy.repeat(batch.observations)
                time_to_go = policy.repeat(batch.time_to_go)
                danger = danger - policy.expect(risk(observations, time_to_go, policy.actions))
        weight = exponential_weight(
            advantages, self.config.inverse_temperature, self.config.weight_limit
        )
        weight = weight * (-self.config.risk_aversion * danger).exp()
        weight = weight / weight.mean().clamp_min(1e-6)
        return (-(weight * self.mixture.log_prob(batch.observations, batch.actions)).mean(),)

    def actor_loss(
        self, batch: Batch, noise: Tensor, critics: QFunction, risk: Risk, multiplier: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The objective of this module's docstring; (loss, mean KL estimate)."""
        distribution = self.actor(batch.observations)
        policy = self.mixture.relative(distribution, batch.observations, noise)
        log_ratio = policy.log_probs
        observations = policy.repeat(batch.observations)
        q = critics(observations, policy.actions).amin(0)
        danger = risk(observations, policy.repeat(batch.time_to_go), policy.actions)
        scale = policy.expect(q.detach().abs()).detach().mean().clamp_min(1e-6)
        loss = policy.expect(-q / scale + multiplier * danger + self.config.weight * log_ratio)
        return loss.mean(), policy.expect(log_ratio).detach().mean()

    def update(self, batch: Batch, advantages: Tensor, steering: Steering) -> dict[str, Tensor]:
        """One step of the mixture, one of the actor."""
        size, (risk, multiplier) = batch.actions.shape, steering[:2]
        assert risk is not None
        relative = normal(size, self.generator) if self.config.relative_risk else None
        (mixture_loss,) = self._descend_mixture(batch, advantages, risk, relative)
        noise, critics = normal(size, self.generator), self.networks.q
        actor_loss, divergence = self._descend_actor(batch, noise, critics, risk, multiplier)
        return {
            "actor/loss": actor_loss,
            "actor/kl_to_log": divergence,
            "actor/mixture_loss": mixture_loss,
        }
