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


class Inputs(NamedTuple):
    """What the graph takes, for B environments at once."""

    observation: Tensor  # [B, O] float32, flattened, as the environment gives it
    time_to_go: Tensor  # [B] float32, share of the horizon left: 1 at an episode's first step
    noise: Tensor  # [B, K, *noise_shape] float32, independent draws


class Outputs(NamedTuple):
    """What the graph gives."""

    action: Tensor  # [B, ...] in the environment's own units and shape; discrete: [B], its number
    intervened: Tensor  # [B] bool, whether the shield replaced the policy's first choice


class PolicyGraph(nn.Module):
    """A frozen copy of policy, shield and scaling of observations.

    ``draws`` is K. The noise is what the policy's sampler in numpy draws: a row makes an action,
    row 0 the first choice. Row 0 all zero makes that the mean action, or the most probable one. A
    shield that abstains has K = 1.
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
        self.register_buffer("mean", torch.tensor(normalizer.mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(normalizer.std, dtype=torch.float32))
        self.start: int | None = None  # the number of the first discrete action
        if isinstance(action_space, spaces.Discrete):
            self.start = int(action_space.start)
        else:
            self.register_buffer("low", torch.tensor(action_space.low, dtype=torch.float32))
            self.register_buffer("high", torch.tensor(action_space.high, dtype=torch.float32))
        self.eval()

    def forward(self, observation: Tensor, time_to_go: Tensor, noise: Tensor) -> Outputs:
        """:class:`Inputs` -> :class:`Outputs`.

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
        action = self._own_action(_at(options, taken), _at(finite[..., None], taken)[:, 0])
        return Outputs(action, taken > 0)

    def closeness(self, inputs: Inputs) -> Tensor:
        """Least distance of a risk from the most that is let pass, [B]; infinite without a shield.

        Where it is next to nothing, rounding decides whether an option passes.
        """
        if not self.acts:
            return torch.full_like(inputs.time_to_go, torch.inf)
        states = self._states(inputs.observation, inputs.time_to_go)
        risks = self._risks(states, self._options(states[:, :-1], inputs.noise))
        ordered = risks.sort(0).values  # the least one itself always passes
        return (ordered[1:] - ordered[0] - self.margin).abs().amin(0)

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

    def _own_action(self, unit: Tensor, finite: Tensor) -> Tensor:
        """As :meth:`safe_offrl.env.adapter.AccidentEnv.own_action`: [B, A] -> [B, ...] or [B]."""
        if self.start is not None:
            return torch.where(finite, unit.argmax(-1), -1) + self.start
        share = (unit.clamp(-1.0, 1.0).reshape(-1, *self.low.shape) + 1.0) / 2.0
        own = self.low + share * (self.high - self.low)
        own = torch.minimum(torch.maximum(own, self.low), self.high)  # rounding
        return torch.where(finite.view(-1, *[1] * self.low.ndim), own, torch.nan)


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows[b], b]: [N, B, A], [B] -> [B, A]."""
    b, a = values.shape[1:]
    return values.gather(0, rows[None, :, None].expand(1, b, a))[0]
