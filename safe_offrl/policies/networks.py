"""Networks: ensembles as one batched matrix product, and the actor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from safe_offrl.compute.state import Part
from safe_offrl.policies.gaussian import GAUSSIAN
from safe_offrl.policies.protocol import (
    ActionDistribution,
    DensityPolicy,
    Kind,
    Quadrature,
    ScoredPolicy,
    normal,
)
from safe_offrl.types import Layout

# Q(s, a) of all critics: [B, O], [B, A] -> [E, B]
QFunction = Callable[[Tensor, Tensor], Tensor]
# Q_C(s, time to go, a): [B, O], [B], [B, A] -> [B]
Risk = Callable[[Tensor, Tensor, Tensor], Tensor]

Members = slice | Tensor
EVERY = slice(None)


def timed_inputs(observations: Tensor, time_to_go: Tensor, actions: Tensor) -> Tensor:
    """What a network takes that sees the time: [B, O], [B], [B, A] -> [B, O + 1 + A]."""
    return torch.cat([observations, time_to_go.unsqueeze(-1), actions], dim=-1)


class StackedLinear(nn.Module):
    """E independent linear layers in one batched matrix product: [E, B, in] -> [E, B, out]."""

    def __init__(self, members: int, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        # Each member begins as torch.nn.Linear does, uniform in +-1/sqrt(inputs).
        bound = 1.0 / math.sqrt(inputs)
        device = generator.device
        weight = torch.empty(members, inputs, outputs, device=device)
        bias = torch.empty(members, 1, outputs, device=device)
        weight.uniform_(-bound, bound, generator=generator)
        bias.uniform_(-bound, bound, generator=generator)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor, members: Members = EVERY) -> Tensor:
        """[M, B, in] -> [M, B, out] for the M ``members`` asked for."""
        # baddbmm would be slower: it writes the bias out before it multiplies.
        return torch.bmm(x, self.weight[members]) + self.bias[members]


class StackedMLP(nn.Module):
    """E independent ReLU networks with one scalar output each: inputs [B, I] -> [E, B].

    ``layer_norm`` puts a LayerNorm before every ReLU (RLPD, arXiv:2302.02948, section 4.2): it
    bounds what the critic says about actions nobody has tried. It has no scale and shift of its
    own: the next layer can express the same, and their gradients were a quarter of an update's
    time.
    """

    def __init__(
        self,
        members: int,
        inputs: int,
        hidden: Sequence[int],
        *,
        layer_norm: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.members, self.widths = members, hidden
        layers: list[nn.Module] = []
        size = inputs
        for width in hidden:
            layers.append(StackedLinear(members, size, width, generator))
            if layer_norm:
                layers.append(nn.LayerNorm(width, elementwise_affine=False))
            layers.append(nn.ReLU())
            size = width
        self.hidden = nn.Sequential(*layers)
        self.output = StackedLinear(members, size, 1, generator)

    def forward(self, inputs: Tensor, members: Members = EVERY) -> Tensor:
        """[B, I] -> [M, B] of the M members asked for, all by default."""
        x = inputs.expand(len(self.output.bias[members]), *inputs.shape)
        return self._through(list(self.hidden), x, members)

    def features(self, inputs: Tensor, members: Members = EVERY) -> Tensor:
        """What the output layers are linear in: [B, I] -> [M, B, width of the last hidden]."""
        x = inputs.expand(len(self.output.bias[members]), *inputs.shape)
        for layer in self.hidden:
            x = layer(x, members) if isinstance(layer, StackedLinear) else layer(x)
        return x

    def over_actions(self, states: Tensor, actions: Tensor) -> Tensor:
        """Many actions [K, B, A] at the same states [B, S] -> [E, K, B].

        What the first layer makes of a state is computed once, not K times.
        """
        (k, b, _), size = actions.shape, states.shape[-1]
        if not self.hidden:
            both = torch.cat([states.expand(k, b, size), actions], dim=-1)
            return self(both.flatten(0, 1)).unflatten(1, (k, b))
        first, *rest = self.hidden
        assert isinstance(first, StackedLinear)
        of_states = torch.bmm(states.expand(self.members, b, size), first.weight[:, :size])
        rows = actions.flatten(0, 1).expand(self.members, k * b, -1)
        of_actions = torch.bmm(rows, first.weight[:, size:]).unflatten(1, (k, b))
        x = (of_actions + (of_states + first.bias).unsqueeze(1)).flatten(1, 2)
        return self._through(rest, x, EVERY).unflatten(1, (k, b))

    def select(self, members: slice) -> StackedMLP:
        """A copy of these members alone."""
        net = copy.deepcopy(self)
        for layer in net.modules():
            if isinstance(layer, StackedLinear):
                layer.weight = nn.Parameter(layer.weight[members].detach().clone())
                layer.bias = nn.Parameter(layer.bias[members].detach().clone())
        net.members = len(net.output.bias)
        return net

    def _through(self, layers: list[nn.Module], x: Tensor, members: Members) -> Tensor:
        for layer in layers:
            x = layer(x, members) if isinstance(layer, StackedLinear) else layer(x)
        # A product with one column is bound by memory: a sum can be fused with what precedes it.
        column = self.output.weight[members].transpose(1, 2)
        return (x * column).sum(-1) + self.output.bias[members].squeeze(-1)


class Actor(nn.Module):
    """The policy's network: observations [B, O] -> a distribution of its ``kind`` over actions."""

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        hidden: Sequence[int],
        generator: torch.Generator,
        kind: Kind = GAUSSIAN,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.layers = kind.network(observation_size, action_size, hidden, generator)
        self.noise_shape = kind.noise_shape(action_size)
        self.observation_size, self.action_size, self.hidden = observation_size, action_size, hidden

    def __call__(self, observations: Tensor) -> ActionDistribution:
        """Typed entry to ``forward``; torch declares Any."""
        return super().__call__(observations)

    def forward(self, observations: Tensor) -> ActionDistribution:
        return self.kind.distribution(self.layers, observations)

    def scored(self, observations: Tensor) -> ScoredPolicy:
        """The same, for whoever has asked for an entropy by :func:`protocol.require_entropy`."""
        return cast(ScoredPolicy, self(observations))

    def density(self, observations: Tensor) -> DensityPolicy:
        """The same, for whoever has asked for a density by :func:`protocol.require_density`."""
        return cast(DensityPolicy, self(observations))

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """What drives the actions of observations [*shape, O]: [*shape, *noise_shape]."""
        return normal((*shape, *self.noise_shape), generator)


@torch.no_grad()
def polyak_(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Move the target's parameters towards the online ones: ``target += tau (online - target)``."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes every agent shares: RLPD's 10 LayerNorm critics and networks of 256x256 by default.

    Without ``layer_norm`` the reward critics and IQL's state value are as SAC, CQL and IQL were
    published. The safety critic always has it.
    """

    actor_hidden: tuple[int, ...] = (256, 256)
    critic_hidden: tuple[int, ...] = (256, 256)
    critics: int = 10
    layer_norm: bool = True


class Networks:
    """Actor, critic ensemble and its target, shared by the offline and the online learner."""

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        config: NetworkConfig,
        generator: torch.Generator,
        kind: Kind = GAUSSIAN,
    ) -> None:
        self.layout = Layout(observation_size, action_size)
        self.sizes = config
        self.actor = Actor(observation_size, action_size, config.actor_hidden, generator, kind)
        self.critics = StackedMLP(
            config.critics,
            observation_size + action_size,
            config.critic_hidden,
            layer_norm=config.layer_norm,
            generator=generator,
        )
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)

    def q(self, observations: Tensor, actions: Tensor) -> Tensor:
        """All critics: [B, O], [B, A] -> [E, B]."""
        q: Tensor = self.critics(torch.cat([observations, actions], dim=-1))
        return q

    def q_of_actions(self, observations: Tensor, actions: Tensor) -> Tensor:
        """All critics at many actions of the same observations: [B, O], [K, B, A] -> [E, K, B]."""
        return self.critics.over_actions(observations, actions)

    @torch.no_grad()
    def target_q(self, observations: Tensor, actions: Tensor, members: Members = EVERY) -> Tensor:
        """Target critics: [B, O], [B, A] -> [M, B], without gradient."""
        q: Tensor = self.target_critics(torch.cat([observations, actions], dim=-1), members)
        return q

    def target_value(
        self, observations: Tensor, policy: Quadrature, members: Members = EVERY
    ) -> Tensor:
        """E_pi of the least of these target critics, over a policy's actions there, [B]."""
        q = self.target_q(policy.repeat(observations), policy.actions, members)
        return policy.expect(q.amin(0))

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {"actor": self.actor, "critics": self.critics, "target_critics": self.target_critics}
