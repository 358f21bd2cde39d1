"""The deployed policy as one function of tensors, from the environment's observation to its action.

What the loops do with numpy and a generator of random numbers (:mod:`safe_offrl.safety.shield`),
done with tensors alone, so that it can be written as a graph that runs without Python: randomness
is an argument, and nothing branches on a value.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor, nn

from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.errors import ConfigError
from safe_offrl.policies.networks import Actor, StackedMLP


class Inputs(NamedTuple):
    """What the graph takes, for B environments at once."""

    observation: Tensor  # [B, O] float32, flattened, as the environment gives it
    time_to_go: Tensor  # [B] float32, share of the horizon left: 1 at an episode's first step
    noise: Tensor  # [B, K, *noise_shape] float32, independent draws
    # [B] float32, cost of the episode so far, where a guard asks; [B, S] where it asks for several.
    spent: Tensor | None = None


class Outputs(NamedTuple):
    """What the graph gives."""

    action: Tensor  # [B, ...] in the environment's own units and shape; discrete: [B], its number
    intervened: Tensor  # [B] bool, whether the shield replaced the policy's first choice
    handed_over: Tensor | None = None  # [B] bool, whether the fallback acts; where a guard acts


class PolicyGraph(nn.Module):
    """A frozen copy of policy, shield, guard and scaling of observations.

    ``draws`` is K, ``spent`` names the S costs that the guard asks for. The noise is what the
    policy's sampler in numpy draws: a row makes an action, row 0 the first choice. Row 0 all zero
    makes that the mean action, or the most probable one. A shield that abstains has K = 1.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, policy: DeployedPolicy, action_space: spaces.Box | spaces.Discrete) -> None:
        super().__init__()
        shield, normalizer = policy.shield, policy.normalizer
        self.actor = copy.deepcopy(policy.actor).requires_grad_(False)
        self.risk_net = copy.deepcopy(shield.net)
        self.acts, self.draws, self.margin = shield.acts, shield.draws, shield.margin
        guard = policy.guard
        self.watches: tuple[tuple[float, float, float], ...] = ()  # weight, limit, 1 if it spends
        self.spent: tuple[str, ...] = () if guard is None else guard.spends
        if guard is not None:
            if guard.until_end:
                raise ConfigError(
                    "The guard of this run is a baseline's, which never hands an episode back, and "
                    "a graph has no memory. Act with safe_offrl.load_policy(..., guard=False)."
                )
            self.watches = tuple((guard.weight(w), w.limit, float(w.spends)) for w in guard.watches)
            self.fallbacks = nn.ModuleList(map(_frozen, guard.fallbacks))
            self.watch_nets = nn.ModuleList(_frozen(watch.net) for watch in guard.watches)
        self.register_buffer("mean", torch.tensor(normalizer.mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(normalizer.std, dtype=torch.float32))
        self.start: int | None = None  # the number of the first discrete action
        if isinstance(action_space, spaces.Discrete):
            self.start = int(action_space.start)
        else:
            self.register_buffer("low", torch.tensor(action_space.low, dtype=torch.float32))
            self.register_buffer("high", torch.tensor(action_space.high, dtype=torch.float32))
        self.eval()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of what it takes."""
        return Inputs._fields if self.spent else Inputs._fields[:3]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what it gives."""
        return Outputs._fields if self.watches else Outputs._fields[:2]

    def forward(
        self, observation: Tensor, time_to_go: Tensor, noise: Tensor, spent: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """:class:`Inputs` -> :class:`Outputs`.

        Without the last of each where no guard acts, and without ``spent`` where it does not ask.

        An observation or a result that is not finite makes the action NaN, or ``start - 1``, which
        is no action of the environment's: a graph cannot refuse, and must not act on nonsense.
        """
        states = self._states(observation, time_to_go)
        options = self._options(states[:, :-1], noise)
        finite = torch.isfinite(states).all(-1) & torch.isfinite(options).all(-1)  # [K, B]
        taken = torch.zeros_like(time_to_go, dtype=torch.int64)
        if self.acts:
            # Not every runtime lets a NaN through a ReLU: what is not finite is never the least.
            risks = torch.where(finite, self._risks(states, options), torch.inf)
            taken = (risks <= risks.amin(0) + self.margin).int().argmax(0)
        unit, usable = _at(options, taken), _at(finite[..., None], taken)[:, 0]
        if not self.watches:
            return self._own_action(unit, usable), taken > 0
        # The guard: its fallback acts, unless going on is affordable.
        spent = torch.zeros_like(time_to_go) if spent is None else spent
        instead, excess = self._guarded(states, unit, spent)
        over = ~((excess < 0.0).all(0) & usable)
        unit = torch.where(over[:, None], instead, unit)
        known = torch.isfinite(spent)
        usable = torch.isfinite(states).all(-1) & (known if known.ndim == 1 else known.all(-1))
        return self._own_action(unit, usable), (taken > 0) & ~over, over

    def closeness(self, inputs: Inputs) -> Tensor:
        """Least distance of a risk from the most that is let pass, [B]; infinite if nothing is
        compared.

        Where it is next to nothing, rounding decides whether an option passes.
        """
        states = self._states(inputs.observation, inputs.time_to_go)
        options = self._options(states[:, :-1], inputs.noise)
        close = torch.full_like(inputs.time_to_go, torch.inf)
        taken = torch.zeros_like(inputs.time_to_go, dtype=torch.int64)
        if self.acts:
            risks = self._risks(states, options)
            ordered = risks.sort(0).values  # the least one itself always passes
            close = (ordered[1:] - ordered[0] - self.margin).abs().amin(0)
            taken = (risks <= ordered[0] + self.margin).int().argmax(0)
        if self.watches:
            spent = inputs.spent
            spent = torch.zeros_like(inputs.time_to_go) if spent is None else spent
            _, excess = self._guarded(states, _at(options, taken), spent)
            actions, ahead = self._fallback(states)
            ordered = ahead.sort(0).values
            alike = (actions == actions[:1]).all(-1).all(0)  # then it does not matter which
            apart = torch.where(alike, torch.inf, (ordered[1:] - ordered[:-1]).amin(0))
            close = torch.stack([close, excess.abs().amin(0), apart]).amin(0)
        return close

    def _states(self, observation: Tensor, time_to_go: Tensor) -> Tensor:
        """What the safety critic knows of a state, [B, O + 1]."""
        return torch.cat([(observation - self.mean) / self.std, time_to_go[:, None]], dim=-1)

    def _options(self, standardised: Tensor, noise: Tensor) -> Tensor:
        """Actions that the noise [B, K, *noise_shape] makes of the policy, [K, B, A]."""
        return self.actor(standardised).act(noise.transpose(0, 1))

    def _risks(self, states: Tensor, options: Tensor) -> Tensor:
        """Q_C of actions [N, B, A] -> [N, B]."""
        assert self.risk_net is not None
        return torch.sigmoid(self.risk_net.over_actions(states, options)).mean(0)

    def _guarded(self, states: Tensor, unit: Tensor, spent: Tensor) -> tuple[Tensor, Tensor]:
        """What the fallback does [B, A], and by how much each limit asks for it, in limits [L, B].

        Where it is 0 or more the fallback acts: that much would be spent beyond the limit, or it is
        safer by that much more than the limit.
        """
        options, ahead = self._fallback(states)
        instead = _at(options, torch.where(ahead.isnan(), torch.inf, ahead).argmin(0))
        shares = self._shares(states, torch.stack([unit, instead]), spent)
        spends = torch.tensor([spends for *_, spends in self.watches])[:, None] > 0.0
        of_policy, of_fallback = shares.unbind(1)
        alone = spends | (of_policy < 1.0)  # nobody need be safer
        return instead, of_policy - torch.where(alone, 0.0, of_fallback) - 1.0

    def _fallback(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """What the fallback can do [K, B, A], and what it leads to [K, B], as shares of limits."""
        nothing = torch.zeros_like(states[:, 0])
        actions = torch.cat([_mean_action(policy, states[:, :-1]) for policy in self.fallbacks])
        return actions, self._shares(states, actions, nothing).sum(0)

    def _shares(self, states: Tensor, actions: Tensor, spent: Tensor) -> Tensor:
        """What is spent and what actions [K, B, A] lead to, as shares of the limits [L, K, B]."""
        shares: list[Tensor] = []
        columns = iter([spent] if spent.ndim == 1 else spent.unbind(-1))
        so_far = spent if spent.ndim == 1 else spent[:, 0]
        for (weight, limit, spends), net in zip(self.watches, self.watch_nets, strict=True):
            assert isinstance(net, StackedMLP)
            so_far = next(columns, so_far) if spends else so_far
            ahead = torch.sigmoid(net.over_actions(states, actions)).mean(0)
            shares.append((spends * so_far + weight * ahead) / limit)
        return torch.stack(shares)

    def _own_action(self, unit: Tensor, finite: Tensor) -> Tensor:
        """As :meth:`safe_offrl.env.adapter.AccidentEnv.own_action`: [B, A] -> [B, ...] or [B]."""
        if self.start is not None:
            return torch.where(finite, unit.argmax(-1), -1) + self.start
        share = (unit.clamp(-1.0, 1.0).reshape(-1, *self.low.shape) + 1.0) / 2.0
        own = self.low + share * (self.high - self.low)
        own = torch.minimum(torch.maximum(own, self.low), self.high)  # rounding
        return torch.where(finite.view(-1, *[1] * self.low.ndim), own, torch.nan)


def _frozen(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)


def _mean_action(policy: nn.Module, states: Tensor) -> Tensor:
    """What a policy makes of no noise: [B, O] -> [1, B, A]."""
    assert isinstance(policy, Actor)
    noise = states[:, 0].view(-1, *[1] * len(policy.noise_shape)).expand(-1, *policy.noise_shape)
    return policy(states).act(torch.zeros_like(noise)[None])


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows[b], b]: [N, B, A], [B] -> [B, A]."""
    b, a = values.shape[1:]
    return values.gather(0, rows[None, :, None].expand(1, b, a))[0]
