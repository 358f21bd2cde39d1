"""Everything a learner must remember, as flat named tensors, so that a checkpoint is complete."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Part = nn.Module | torch.optim.Optimizer | torch.Generator | Tensor


def collect_state(parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """Copy the state of modules, optimisers, generators and tensors under ``part/...`` names."""
    state: dict[str, Tensor] = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            values = dict(part.state_dict())
        elif isinstance(part, torch.optim.Optimizer):
            values = {
                f"{i}.{key}": value
                for i, parameter in enumerate(_parameters(part))
                for key, value in part.state.get(parameter, {}).items()
            }
        elif isinstance(part, torch.Generator):
            values = {"state": part.get_state()}
        else:
            values = {"value": part}
        state.update({f"{name}/{key}": v.detach().clone() for key, v in values.items()})
    return state


@torch.no_grad()
def restore_state(parts: Mapping[str, Part], state: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`collect_state`, in place.

    Raises KeyError or RuntimeError where a tensor is missing or has another shape; an optimiser
    that had made no step has none to miss.
    """
    for name, part in parts.items():
        prefix = f"{name}/"
        values = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
        if isinstance(part, nn.Module):
            part.load_state_dict(values)
        elif isinstance(part, torch.optim.Optimizer):
            for i, parameter in enumerate(_parameters(part)):
                part.state[parameter] = {
                    key.split(".", 1)[1]: v.clone()
                    for key, v in values.items()
                    if key.split(".", 1)[0] == str(i)
                }
        elif isinstance(part, torch.Generator):
            part.set_state(values["state"])
        else:
            part.copy_(values["value"])


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
