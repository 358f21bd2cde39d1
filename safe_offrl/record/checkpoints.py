"""Checkpoints: folders that are written whole or not at all, and verified when read.

::

    checkpoints/step-000012345/
      state.safetensors  tensors          info.json  everything else a loop continues from
      manifest.json      step, line counts, the sha256 of both files, and a CRC-32 of its own
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from safe_offrl.errors import RunError
from safe_offrl.files import fsync_folder, json_bytes, replacing, write_file

KEPT_CHECKPOINTS = 3  # one may be damaged and one half written, and a third is still there


class Checkpoint(NamedTuple):
    """One verified checkpoint: what a loop's ``load(tensors, info)`` takes, and its identity."""

    step: int
    tensors: dict[str, Tensor]
    info: dict[str, Any]
    sha256: str  # over the hashes of state.safetensors and info.json
    counts: dict[str, int]  # lines of metrics, iterations and ledger when it was written


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    counts: Mapping[str, int],
) -> Checkpoint:
    """Write ``folder/step-...`` whole or not at all; keeps the newest three.

    Serialised in memory first, so that a full disk cannot leave half a checkpoint. Checkpoints
    of later steps belong to a future that a fall-back threw away, and are removed.
    FloatingPointError, with nothing touched, if a tensor is not finite: three of these would leave
    no checkpoint that is worth continuing from.
    """
    # Finite tensors.
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FloatingPointError(
                f'"{name}" is not finite at step {step:,}: learning diverged. The checkpoints are '
                "from before. Start again with a lower learning rate"
            )
    # These are contiguous clones, because safetensors refuses tensors that share storage.
    copies = {
        k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()
    }
    # Content.
    state = safetensors.torch.save(copies)
    info_bytes = json_bytes(dict(info))
    hashes = {"state.safetensors": _digest(state), "info.json": _digest(info_bytes)}
    manifest: dict[str, Any] = {"step": step, "sha256": hashes, "counts": dict(counts)}
    manifest["crc32"] = zlib.crc32(json_bytes(manifest))

    # Folder.
    target = folder / f"step-{step:09d}"
    files = {
        "state.safetensors": state,
        "info.json": info_bytes,
        "manifest.json": json_bytes(manifest),
    }
    with replacing(target) as temporary:
        temporary.mkdir()
        # Three fsyncs at once take less time than one after the other.
        with ThreadPoolExecutor(len(files)) as pool:
            list(pool.map(write_file, map(temporary.joinpath, files), files.values()))
        fsync_folder(temporary)
        if target.exists():
            shutil.rmtree(target)
    # Checkpoints that are not kept.
    older = [p for p in _complete(folder) if p.name < target.name]
    for path in _complete(folder):
        if path.name > target.name or path in older[: -(KEPT_CHECKPOINTS - 1)]:
            shutil.rmtree(path, ignore_errors=True)
    return Checkpoint(step, dict(tensors), dict(info), _checkpoint_sha256(hashes), dict(counts))


def load_checkpoint(folder: Path, run: str) -> Checkpoint:
    """Read the newest checkpoint in ``folder`` whose hashes match.

    Raises RunError, in which ``run`` names the run, if none does: a damaged run is never silently
    started afresh.
    """
    problems = []
    for path in reversed(_complete(folder)):
        try:
            return _verified(path)
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            safetensors.SafetensorError,
        ) as error:
            problems.append(f"{path.name}: {error}")
    if problems:
        raise RunError(
            f'No checkpoint of the run "{run}" is intact ({"; ".join(problems)}). '
            "Restore one from a backup or start a new run."
        )
    raise RunError(
        f'The run "{run}" has no checkpoint. Restore one from a backup or start a new run.'
    )


@contextlib.contextmanager
def fitting(path: str | Path) -> Iterator[None]:
    """Turn torch's complaint about a state that does not fit into one sentence."""
    try:
        yield
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f'The checkpoint of "{path}" does not fit this version of safe-offrl ({reason}). '
            "Use the version in its versions.json, or make the run again."
        ) from error


def remove_unfinished(folder: Path) -> None:
    """Delete what a writer that was killed left behind, this version's or an earlier one's."""
    for leftover in folder.glob(".*tmp*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def _verified(path: Path) -> Checkpoint:
    """Read and verify one checkpoint; the bytes that are hashed are the bytes that are parsed."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    if manifest.pop("crc32") != zlib.crc32(json_bytes(manifest)):
        raise ValueError("manifest.json does not match its checksum")
    files = {name: (path / name).read_bytes() for name in ("state.safetensors", "info.json")}
    for name, data in files.items():
        if _digest(data) != manifest["sha256"][name]:
            raise ValueError(f"{name} does not match its sha256")
    return Checkpoint(
        step=int(manifest["step"]),
        tensors=safetensors.torch.load(files["state.safetensors"]),
        info=json.loads(files["info.json"]),
        sha256=_checkpoint_sha256({name: manifest["sha256"][name] for name in files}),
        counts={k: int(manifest["counts"][k]) for k in ("metrics", "iterations", "ledger")},
    )


def _checkpoint_sha256(hashes: Mapping[str, str]) -> str:
    return _digest("".join(f"{k}={hashes[k]}\n" for k in sorted(hashes)).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
