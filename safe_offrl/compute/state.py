"""Everything a learner must remember, as flat named tensors, so that a checkpoint is complete."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from safe_offrl.compute.adam import Adam

_LARGEST_SEED = 2**64 - 1  # torch takes no larger one

Part = nn.Module | Adam | torch.Generator | Tensor


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on ``device`` for any seed of 0 or more: one too large for torch is hashed."""
    if seed > _LARGEST_SEED:
        seed = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)


def named(owner: str, parts: Mapping[str, Part]) -> dict[str, Part]:
    """Parts as a checkpoint names them, ``owner.part``; one that has an owner already keeps it."""
    return {name if "." in name else f"{owner}.{name}": part for name, part in parts.items()}


def collect_state(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """Copy the state of modules, optimisers, generators and tensors under ``part/...`` names."""
    state: dict[str, Tensor] = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module | Adam):
            values = dict(part.state_dict())
        elif isinstance(part, torch.Generator):
            values = {"state": part.get_state()}
        else:
            values = {"value": part}
        state.update({f"{name}/{key}": v.detach().clone() for key, v in values.items()})
    return state


@torch.no_grad()
def restore_state(parts: Mapping[str, Part], state: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`collect_state`, in place.

    Raises KeyError or RuntimeError where a tensor is missing or has another shape. A generator
    whose state was kept on another kind of device, where numbers are drawn differently, stays as it
    is.
    """
    for name, part in parts.items():
        prefix = f"{name}/"
        values = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        if isinstance(part, nn.Module | Adam):
            part.load_state_dict(values)
        elif isinstance(part, torch.Generator):
            if len(values["state"]) == len(part.get_state()):
                part.set_state(values["state"])
        else:
            part.copy_(values["value"])


def arrays_sha256(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Hash of arrays by their names, types, shapes and bytes, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
