"""The deployed policy as one function of tensors, from the environment's observation to its action.

What the loops do with numpy, a generator of random numbers and a memory (:mod:`safe_offrl.shield`),
done with tensors alone, so that it can be written as a graph that runs without Python: randomness
and memory are arguments, and nothing branches on a value.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor, nn

from safe_offrl.distributions import Categorical
from safe_offrl.errors import ConfigError
from safe_offrl.nets import Actor
from safe_offrl.shield import Shield
from safe_offrl.types import Normalizer


class Inputs(NamedTuple):
    """What the graph takes, for B environments at once."""

    observation: Tensor  # [B, O] float32, flattened, as the environment gives it
    time_to_go: Tensor  # [B] float32, share of the horizon left: 1 at an episode's first step
    previous: Tensor  # [B, A] float32, of the step before; anything if there is none
    has_previous: Tensor  # [B] bool, of the step before; False at an episode's first step
    noise: Tensor  # [B, K, A] float32, independent draws


class Outputs(NamedTuple):
    """What the graph gives."""

    action: Tensor  # [B, ...] in the environment's own units and shape; discrete: [B], its number
    next_previous: Tensor  # [B, A], to hand back at the next step
    next_has_previous: Tensor  # [B] bool, to hand back at the next step
    intervened: Tensor  # [B] bool, whether the shield replaced the policy's first choice


class PolicyGraph(nn.Module):
    """A frozen copy of policy, shield and scaling of observations.

    ``draws`` is K. Gaussian policies take standard normal noise: row 0 makes the first choice, the
    others the shield's further candidates. Discrete ones take standard Gumbel noise, -log(-log(u)):
    row 0 makes the first choice, row 1 the order in which the shield tries all actions. Row 0 all
    zero makes the first choice the mean action, or the most probable one. A shield that abstains
    has K = 1.

    Raises ConfigError for a shield with a safe controller, which is a function in Python.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        actor: Actor,
        shield: Shield,
        normalizer: Normalizer,
        action_space: spaces.Box | spaces.Discrete,
    ) -> None:
        super().__init__()
        if shield.safe_controller is not None:
            raise ConfigError(
                "The shield falls back on a safe controller, a Python function that no graph can "
                "hold. Export the policy without it."
            )
        self.actor = copy.deepcopy(actor).requires_grad_(False)
        self.risk_net = shield.net.select(slice(shield.reference, None)).requires_grad_(False)
        self.threshold = shield.threshold
        self.register_buffer("mean", torch.tensor(normalizer.mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(normalizer.std, dtype=torch.float32))
        if isinstance(action_space, spaces.Discrete):
            self.action_size, candidates = int(action_space.n), 2
            self.start = int(action_space.start)
        else:
            self.action_size = math.prod(action_space.shape)
            candidates = shield.config.candidates
            self.register_buffer("low", torch.tensor(action_space.low, dtype=torch.float32))
            self.register_buffer("high", torch.tensor(action_space.high, dtype=torch.float32))
        self.draws = 1 if self.threshold is None else candidates
        self.eval()

    def forward(
        self,
        observation: Tensor,
        time_to_go: Tensor,
        previous: Tensor,
        has_previous: Tensor,
        noise: Tensor,
    ) -> Outputs:
        """:class:`Inputs` -> :class:`Outputs`.

        An observation or a result that is not finite makes the action NaN, or ``start - 1``, which
        is no action of the environment's: a graph cannot refuse, and must not act on nonsense.
        """
        states = self._states(observation, time_to_go)
        options = self._options(states[:, :-1], previous, noise)
        finite = torch.isfinite(states).all(-1) & torch.isfinite(options).all(-1)  # [N, B]
        if self.threshold is None:
            taken = torch.zeros_like(has_previous, dtype=torch.int64)
            intervened = torch.zeros_like(has_previous)
        else:
            # Not every runtime lets a NaN through a ReLU: what is not finite never passes.
            passes = (self._risks(states, options) <= self.threshold) & finite
            passes = torch.cat([passes[:-1], passes[-1:] & has_previous])
            accepted, intervened = passes.any(0), ~passes[0]
            # The first that passes, else the mean action, which is the last but one.
            taken = torch.where(accepted, passes.int().argmax(0), options.shape[0] - 2)
            previous = torch.where(accepted[:, None], _at(options, taken), previous)
            has_previous = has_previous | accepted
        action = self._own_action(_at(options, taken), _at(finite[..., None], taken)[:, 0])
        return Outputs(action, previous, has_previous, intervened)

    def margin(self, inputs: Inputs) -> Tensor:
        """Least distance of an option's risk from the threshold, as a share of the threshold, [B].

        Where it is next to nothing, rounding decides whether the option passes.
        """
        if self.threshold is None:
            return torch.full_like(inputs.time_to_go, torch.inf)
        states = self._states(inputs.observation, inputs.time_to_go)
        options = self._options(states[:, :-1], inputs.previous, inputs.noise)
        return (self._risks(states, options) / self.threshold - 1.0).abs().amin(0)

    def _states(self, observation: Tensor, time_to_go: Tensor) -> Tensor:
        """What the safety critic knows of a state, [B, O + 1]."""
        return torch.cat([(observation - self.mean) / self.std, time_to_go[:, None]], dim=-1)

    def _options(self, standardised: Tensor, previous: Tensor, noise: Tensor) -> Tensor:
        """Actions in the order in which the shield tries them, [N, B, A].

        The first choice, the other candidates, the mean action, and the previous one (anything if
        there is none).
        """
        policy, noise = self.actor(standardised), noise.transpose(0, 1)
        if isinstance(policy, Categorical):
            one_hot = torch.eye(policy.log_probs.shape[-1])
            scores = policy.log_probs + noise
            candidates = one_hot[scores[:1].argmax(-1)]
            if self.draws > 1:
                ranking = scores[1].argsort(dim=-1, descending=True)
                candidates = torch.cat([candidates, one_hot[ranking].transpose(0, 1)])
            mean = one_hot[policy.log_probs.argmax(-1)]
        else:
            candidates = torch.tanh(policy.mean + policy.log_std.exp() * noise)
            mean = torch.tanh(policy.mean)
        return torch.cat([candidates, mean[None], previous[None]])

    def _risks(self, states: Tensor, options: Tensor) -> Tensor:
        """Q_C of actions [N, B, A] -> [N, B]."""
        return torch.sigmoid(self.risk_net.over_actions(states, options)).mean(0)

    def _own_action(self, unit: Tensor, finite: Tensor) -> Tensor:
        """As :meth:`safe_offrl.env.AccidentEnv.own_action`: [B, A] -> [B, ...] or numbers [B]."""
        if self.actor.discrete:
            return torch.where(finite, unit.argmax(-1), -1) + self.start
        share = (unit.clamp(-1.0, 1.0).reshape(-1, *self.low.shape) + 1.0) / 2.0
        own = self.low + share * (self.high - self.low)
        own = torch.minimum(torch.maximum(own, self.low), self.high)  # rounding
        return torch.where(finite.view(-1, *[1] * self.low.ndim), own, torch.nan)


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows[b], b]: [N, B, A], [B] -> [B, A]."""
    b, a = values.shape[1:]
    return values.gather(0, rows[None, :, None].expand(1, b, a))[0]
