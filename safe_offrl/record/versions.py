"""What a bitwise repetition needs to be the same: packages, git state, platform, threads."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from safe_offrl.compute.device import Device


def versions(
    env_versions: Mapping[str, Any] | None = None, device: Device = "cpu"
) -> dict[str, Any]:
    """What a bitwise repetition needs: packages, environment, git state, platform and threads."""
    packages = ("safe-offrl", "torch", "numpy", "gymnasium", "scipy", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "environment": dict(env_versions or {}),
        "git": _git_state(Path(__file__).parent),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
    }


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether the tree differs from it; None when this file is not tracked by git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"commit": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
