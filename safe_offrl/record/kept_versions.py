"""Every version that acted in a run, kept with ``keep_versions``: one file each, whole or absent.

``versions/000012.safetensors`` holds the tensors of the policy and its shield, and in its metadata
the rest as JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from safe_offrl.deploy.policy import DeployedPolicy
from safe_offrl.errors import RunError
from safe_offrl.files import write_atomic
from safe_offrl.record.checkpoints import fitting

VERSIONS_FOLDER = "versions"
REPLAY = "replay.json"  # what each of them is in truth, after `safe-offrl replay`
_KEY = "policy"


def keep_version(run: Path, policy: DeployedPolicy) -> None:
    """Write what acts into the folder of its run; a version that is there already is replaced.

    That happens after a resume, where episodes are played again, and changes nothing.
    """
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in policy.tensors().items()
    }
    data = safetensors.torch.save(tensors, metadata={_KEY: json.dumps(policy.words())})
    folder = run / VERSIONS_FOLDER
    folder.mkdir(exist_ok=True)
    write_atomic(folder / f"{policy.version:06d}.safetensors", data)


def kept_versions(run: Path) -> list[Path]:
    """The files of all versions that are kept of a run, in the order in which they acted."""
    return sorted((run / VERSIONS_FOLDER).glob("[0-9]*.safetensors"))


def load_version(path: Path) -> DeployedPolicy:
    """A version from its file; RunError if that is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            words = json.loads(file.metadata()[_KEY])
        tensors = safetensors.torch.load_file(path)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise RunError(
            f'"{path}" is damaged ({" ".join(str(error).split())}). Restore it, or remove it: the '
            "other versions can be played without it."
        ) from error
    with fitting(path):
        return DeployedPolicy.restored(tensors, words)
