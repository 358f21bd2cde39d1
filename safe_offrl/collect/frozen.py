"""Actors of Stable-Baselines3 as plain numpy arrays, to act with and to send between processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from safe_offrl.collect.behaviours import Controller, Vector


@dataclass(frozen=True)
class FrozenPolicy:
    """An actor of Stable-Baselines3 as numpy arrays: ten times faster a step than its predict().

    ``layers``: (weight, bias) of the hidden layers and of the mean (or the logits). ``log_std``:
    of a Gaussian [A], or (weight, bias) of a layer beside the mean's. "tanh" is PPO's hidden
    activation, "relu" SAC's, which also squashes its actions. Samples like the actor itself.
    """

    layers: tuple[tuple[Any, Any], ...]
    log_std: Any
    activation: str = "tanh"
    discrete: bool = False

    def __call__(self, rng: np.random.Generator) -> Controller:
        """The controller of one episode."""
        *hidden, (weight, bias) = self.layers
        squashed = self.activation == "relu"
        std = None if self.discrete or squashed else np.exp(self.log_std)

        def act(observation: Vector) -> Vector:
            x = observation
            for w, b in hidden:
                x = np.maximum(w @ x + b, 0.0) if squashed else np.tanh(w @ x + b)
            mean = weight @ x + bias
            if self.discrete:  # the largest of logits + Gumbel noise is a sample of the softmax
                chosen = (mean + rng.gumbel(size=len(mean))).argmax()
                return np.eye(len(mean), dtype=np.float32)[chosen]
            if std is not None:
                return np.asarray(mean + std * rng.standard_normal(len(mean)), dtype=np.float32)
            scale = np.exp(np.clip(self.log_std[0] @ x + self.log_std[1], -20.0, 2.0))
            sample = mean + scale * rng.standard_normal(len(mean))
            return np.asarray(np.tanh(sample), dtype=np.float32)

        return act


def freeze(model: Any) -> FrozenPolicy:
    """A snapshot of a model's actor: training on does not move it."""
    policy = model.policy
    if hasattr(policy, "actor"):  # SAC
        hidden = [m for m in policy.actor.latent_pi if isinstance(m, torch.nn.Linear)]
        layers = tuple(_arrays(m) for m in (*hidden, policy.actor.mu))
        return FrozenPolicy(layers, _arrays(policy.actor.log_std), activation="relu")
    hidden = [m for m in policy.mlp_extractor.policy_net if isinstance(m, torch.nn.Linear)]
    layers = tuple(_arrays(m) for m in (*hidden, policy.action_net))
    if isinstance(model.action_space, spaces.Discrete):
        return FrozenPolicy(layers, None, discrete=True)
    return FrozenPolicy(layers, policy.log_std.detach().numpy().copy())


def _arrays(linear: torch.nn.Linear) -> tuple[Any, Any]:
    return linear.weight.detach().numpy().copy(), linear.bias.detach().numpy().copy()
