"""A plain ReLU network in torch, and the same in numpy, which acts without torch's overhead."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from safe_offrl.policies.protocol import Vector

NORM_EPSILON = np.float32(1e-5)  # that of torch.nn.LayerNorm


def linear_layers(
    inputs: int, widths: Sequence[int], generator: torch.Generator, *, layer_norm: bool = False
) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them, [B, I] -> [B, O].

    ``layer_norm`` puts a LayerNorm before every ReLU, without scale and shift of its own.
    """
    layers: list[nn.Module] = []
    size = inputs
    for width in widths:
        linear = nn.Linear(size, width, device=generator.device)
        bound = 1.0 / math.sqrt(size)
        with torch.no_grad():
            linear.weight.uniform_(-bound, bound, generator=generator)
            linear.bias.uniform_(-bound, bound, generator=generator)
        layers.append(linear)
        if layer_norm:
            layers.append(nn.LayerNorm(width, elementwise_affine=False))
        layers.append(nn.ReLU())
        size = width
    return nn.Sequential(*layers[: -2 if layer_norm else -1])


class NumpyMLP:
    """Views of such a network's parameters: when it learns, this one computes accordingly.

    Of a network on a GPU it has copies.
    """

    def __init__(self, network: nn.Module) -> None:
        linears = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        self._normed = any(isinstance(layer, nn.LayerNorm) for layer in network.modules())
        self._weights = [layer.weight.detach().cpu().numpy().T for layer in linears]
        self._biases = [layer.bias.detach().cpu().numpy() for layer in linears]

    def __call__(self, x: Vector) -> Vector:
        """[..., I] -> [..., O]."""
        for weight, bias in zip(self._weights[:-1], self._biases[:-1], strict=True):
            x = x @ weight + bias
            if self._normed:
                normalise(x)
            x = np.maximum(x, 0.0)
        return x @ self._weights[-1] + self._biases[-1]


def normalise(x: NDArray[np.float32]) -> None:
    """LayerNorm over the last axis, in place."""
    width = np.float32(x.shape[-1])
    x -= np.add.reduce(x, -1, keepdims=True) / width
    x /= np.sqrt(np.add.reduce(x * x, -1, keepdims=True) / width + NORM_EPSILON)
