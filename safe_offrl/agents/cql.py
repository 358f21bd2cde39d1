"""CQL(H) (Kumar et al. 2020, arXiv:2006.04779) and Cal-QL (Nakamoto et al. 2023, arXiv:2303.05479).

Both press the critics down at actions the log does not hold. Cal-QL differs by one ``max``: at the
policy's actions the pressure stops at the return that the logged trajectory really got, which cures
the dip at the switch to online. Offline the actor comes from agents/extraction.py.

Where actions are discrete, the log-integral over them is a sum over all of them, exact. Cal-QL then
takes its ``max`` at every action: the policy behind CQL(H) is softmax(Q), which has all of them,
and ``logsumexp_a max(Q, G)`` is what eq. 5.1 of the paper becomes under it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safe_offrl.agents.extraction import Extraction
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.rlpd import RLPD
from safe_offrl.agents.steering import Steering
from safe_offrl.compute.adam import Adam
from safe_offrl.compute.descent import EAGER, Compute, Descent
from safe_offrl.compute.state import Part, named
from safe_offrl.errors import ConfigError
from safe_offrl.nn.losses import calibrate, conservative_gap, td_target
from safe_offrl.policies.networks import Networks, polyak_
from safe_offrl.policies.protocol import DensityPolicy, require_density
from safe_offrl.types import Batch

PART_ROWS = 64  # transitions at a time: their 31 actions and 10 critics make 20 MiB a layer


@dataclass(frozen=True)
class CQLConfig:
    """Settings of CQL as published, without the Lagrange version; shared by Cal-QL.

    ``alpha`` weighs the conservative gap (5 on AntMaze, 1 on Adroit in Cal-QL); ``actions`` are
    drawn per observation from each of: uniform, policy at s, policy at s'. Discrete actions are not
    drawn but enumerated.
    """

    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 5e-3
    alpha: float = 5.0
    actions: int = 10


class ConservativeCritics:
    """The critics of CQL; ``calibrated``, those of Cal-QL."""

    def __init__(
        self, networks: Networks, config: CQLConfig, compute: Compute = EAGER, *, calibrated: bool
    ) -> None:
        self.networks = networks
        kind = networks.actor.kind
        require_density(kind, "The log-integral over actions in cql and calql")
        if not (kind.exact or kind.sampled):
            raise ConfigError(
                "The log-integral over actions in cql and calql is of actions drawn one by one, "
                f'but a policy of the kind "{kind.name}" gives weighted ones. Take another learner.'
            )
        self._enumerated = kind.exact
        self.config = config
        self.calibrated = calibrated
        self.critic_optimizer = Adam(networks.critics.parameters(), config.learning_rate)
        self._descend_critics = Descent(self.critic_loss, self.critic_optimizer, compute)

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {**self.networks.parts(), "critic_optimizer": self.critic_optimizer}

    def critic_loss(
        self, batch: Batch, next_noise: Tensor, noise: tuple[Tensor, Tensor], uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``MSE(Q, r + g (1-d) min Q'(s', a')) + alpha * gap``, summed over members; (loss, gap).

        ``next_noise`` [B, A] is for the backup; ``noise`` 2 x [K, B, A] and ``uniform`` [K, B, A]
        in [-1, 1] for the 3K actions, all evaluated at the CURRENT observation. Discrete actions
        need none of it (K = 0).
        """
        actor = self.networks.actor
        with torch.no_grad():
            # Bellman target.
            here = actor.density(batch.observations)
            there = actor.density(batch.next_observations)
            following = there.quadrature(next_noise)
            next_value = self.networks.target_value(batch.next_observations, following)
            target = td_target(batch.rewards, batch.terminated, next_value, self.config.discount)
            # Actions of the gap, the logged one first.
            if self._enumerated:
                proposed, log_densities = _every_action(here, next_noise)
            else:
                proposed, log_densities = _proposals(here, there, noise, uniform)
            actions = torch.cat([batch.actions[None], *proposed])
        # Critics at all of them, calibrated for Cal-QL.
        q = self.networks.q_of_actions(batch.observations, actions)
        logged, sampled = q[:, 0], q[:, 1:].transpose(1, 2)
        if self.calibrated:
            n = sampled.shape[-1] - len(uniform)  # all but the uniform ones are the policy's
            sampled = torch.cat(
                [calibrate(sampled[..., :n], batch.return_to_go), sampled[..., n:]], -1
            )
        # Conservative gap and squared error.
        gap = conservative_gap(sampled, log_densities, logged)
        mse = (logged - target).square()
        return (mse + self.config.alpha * gap).mean(-1).sum(), gap.detach().mean()

    def update(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Critics, then Polyak; (advantages [B] over the policy's own action, scalars to log)."""
        metrics, noise = self.update_critics(batch, generator)
        with torch.no_grad():
            policy = self.networks.actor(batch.observations).quadrature(noise)
            logged = self.networks.target_q(batch.observations, batch.actions).amin(0)
            advantages = logged - self.networks.target_value(batch.observations, policy)
        return advantages, metrics

    def update_critics(
        self, batch: Batch, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Critics, then Polyak; (scalars to log, the noise [B, A] of the backup's actions)."""
        actor, (b, a) = self.networks.actor, batch.actions.shape
        k = 0 if self._enumerated else self.config.actions
        uniform = torch.rand((k, b, a), generator=generator, device=generator.device) * 2.0 - 1.0
        noise = actor.noise((k, b), generator), actor.noise((k, b), generator)
        next_noise = actor.noise((b,), generator)
        loss, gap = self._descend_critics.in_parts(_parts(batch, next_noise, noise, uniform))
        polyak_(self.networks.target_critics, self.networks.critics, self.config.tau)
        return {"agent/critic_loss": loss, "agent/conservative_gap": gap}, next_noise


class CQL:
    """CQL offline, or ``calibrated`` Cal-QL: its critics, and the actor extracted from them."""

    Config = CQLConfig
    Online: type[OnlineAgent] | None = None

    def __init__(self, setup: Setup, config: CQLConfig, *, calibrated: bool = False) -> None:
        networks, generator, compute = setup.networks, setup.generator, setup.compute
        self.generator = generator
        self.values = ConservativeCritics(networks, config, compute, calibrated=calibrated)
        self.extraction = Extraction(
            networks, setup.extraction, generator, compute, setup.aversions
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return self.values.parts() | named("extraction", self.extraction.parts())

    def update(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """The critics, then the actor by their advantages."""
        advantages, metrics = self.values.update(batch, self.generator)
        return metrics | self.extraction.update(batch, advantages, steering)


class OnlineCalQL:
    """Cal-QL that goes on online (section 6 of its paper): its critics, and SAC's actor.

    The actor is RLPD's, whose critics are left alone.
    """

    own_values = False

    def __init__(self, setup: Setup, config: CQLConfig) -> None:
        networks, self.generator = setup.networks, setup.generator
        self.return_discount: float | None = config.discount
        self.values = ConservativeCritics(networks, config, setup.compute, calibrated=True)
        self.actor = RLPD(networks, setup.learner, setup.generator, setup.compute)
        self.update_actor = self.actor.update_actor

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {**self.actor.parts(), **self.values.parts()}

    def update_critics(self, batch: Batch) -> dict[str, Tensor]:
        """The conservative critics."""
        return self.values.update_critics(batch, self.generator)[0]


class CalQL:
    """Cal-QL offline: CQL with calibrated critics."""

    Config = CQLConfig
    Online: type[OnlineAgent] | None = OnlineCalQL

    def __init__(self, setup: Setup, config: CQLConfig) -> None:
        self.cql = CQL(setup, config, calibrated=True)
        self.parts, self.update = self.cql.parts, self.cql.update


def _parts(
    batch: Batch, next_noise: Tensor, noise: tuple[Tensor, Tensor], uniform: Tensor
) -> list[tuple[float, tuple[object, ...]]]:
    """The arguments of ``critic_loss`` for PART_ROWS transitions at a time, and their shares.

    On a GPU all at a time: there is no such cache to overflow.
    """
    b = len(batch.rewards)
    n = b if batch.rewards.is_cuda else PART_ROWS
    fields = zip(*(field.split(n) for field in batch.tensors), strict=True)
    by_state = [x.split(n, dim=1) for x in (*noise, uniform)]
    return [
        (len(next_part) / b, (Batch(*part), next_part, (here, there), uniform_part))
        for part, next_part, here, there, uniform_part in zip(
            fields, next_noise.split(n), *by_state, strict=True
        )
    ]


def _every_action(policy: DensityPolicy, noise: Tensor) -> tuple[list[Tensor], Tensor]:
    """All A actions [A, B, A] as if drawn evenly, log densities [B, A].

    So the importance-sampled log-integral is the exact ``logsumexp_a Q(s, a)``.
    """
    every = policy.quadrature(noise).actions
    b = len(noise)
    actions = every.unflatten(0, (-1, b))
    a = len(actions)
    return [actions], every.new_full((b, a), -math.log(a))


def _proposals(
    here: DensityPolicy, there: DensityPolicy, noise: tuple[Tensor, Tensor], uniform: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Actions to press Q down at, 3 x [K, B, A], and their log densities [B, 3 K].

    The policy's come first, then the uniform ones.
    """
    (at_here, log_here), (at_there, log_there) = here.scored(noise[0]), there.scored(noise[1])
    # The uniform density on [-1, 1]^A is 2^-A.
    log_uniform = torch.full_like(log_here, -uniform.shape[-1] * math.log(2.0))
    log_densities = torch.cat([log_here, log_there, log_uniform]).T
    return [at_here.actions, at_there.actions, uniform], log_densities
