"""A plain ReLU network in torch, and the same in numpy, which acts without torch's overhead."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from safe_offrl.policies.protocol import Vector


def linear_layers(inputs: int, widths: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them, [B, I] -> [B, O]."""
    layers: list[nn.Module] = []
    size = inputs
    for width in widths:
        linear = nn.Linear(size, width, device=generator.device)
        bound = 1.0 / math.sqrt(size)
        with torch.no_grad():
            linear.weight.uniform_(-bound, bound, generator=generator)
            linear.bias.uniform_(-bound, bound, generator=generator)
        layers += [linear, nn.ReLU()]
        size = width
    return nn.Sequential(*layers[:-1])


class NumpyMLP:
    """Views of such a network's parameters: when it learns, this one computes accordingly.

    Of a network on a GPU it has copies.
    """

    def __init__(self, network: nn.Module) -> None:
        linears = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        self._weights = [layer.weight.detach().cpu().numpy().T for layer in linears]
        self._biases = [layer.bias.detach().cpu().numpy() for layer in linears]

    def __call__(self, x: Vector) -> Vector:
        """[..., I] -> [..., O]."""
        for weight, bias in zip(self._weights[:-1], self._biases[:-1], strict=True):
            x = np.maximum(x @ weight + bias, 0.0)
        return x @ self._weights[-1] + self._biases[-1]
