"""Minari datasets written with h5py alone: the layout of :mod:`safe_offrl.data_formats.minari`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from safe_offrl.data.content import Arrays, Metadata, metadata_text, signals_in
from safe_offrl.data.derived import find_episodes
from safe_offrl.data.offsets import OBSERVATIONS, in_own_units
from safe_offrl.data_formats.minari import DATA_FILE, INFOS, datasets_folder
from safe_offrl.data_formats.stored import ATTRIBUTE, RowProgress
from safe_offrl.data_formats.validation import validate_arrays
from safe_offrl.files import json_bytes, replacing, write_file
from safe_offrl.types import signal_column

VERSION = "0.5.0"  # of the layout that is written; every later Minari reads it


def write_minari(
    path: Path, arrays: Arrays, metadata: Metadata, progress: RowProgress | None = None
) -> list[str]:
    """Validate and write the folder, complete or not at all; returns what it cannot hold."""
    validate_arrays(arrays)
    arrays, metadata, wide = in_own_units(arrays, metadata)
    with replacing(path) as temporary:
        (temporary / "data").mkdir(parents=True)
        discrete = metadata.get("action_count") is not None
        lost = _write_episodes(temporary / "data" / DATA_FILE, arrays, discrete, wide, progress)
        size = (temporary / "data" / DATA_FILE).stat().st_size / 1e6
        described = _describe(_dataset_id(path), arrays, metadata, wide)
        described["dataset_size"] = round(size, 1)
        write_file(temporary / "data" / "metadata.json", json_bytes(described))
    return lost


def _write_episodes(
    path: Path, arrays: Arrays, discrete: bool, wide: np.dtype[Any], progress: RowProgress | None
) -> list[str]:
    # Episodes.
    starts, terminated, _ = find_episodes(arrays)
    behaviours = arrays["episode_behaviours"][:] if "episode_behaviours" in arrays else None
    jumps = 0
    with h5py.File(path, "w", track_order=True) as file:
        for k, part in enumerate(map(slice, starts[:-1], starts[1:])):
            group = file.create_group(f"episode_{k}")
            group.attrs.update({"id": k, "total_steps": part.stop - part.start})
            if behaviours is not None:
                group.attrs["behaviour"] = int(behaviours[k])
            # Observations.
            first, following = (np.asarray(arrays[key][part], wide) for key in OBSERVATIONS)
            jumps += int((first[1:] != following[:-1]).any(axis=1).sum())
            group["observations"] = np.concatenate([first, following[-1:]])
            # Actions, rewards and ends.
            actions = np.asarray(arrays["actions"][part], np.float32)
            group["actions"] = actions.argmax(axis=1) if discrete else actions
            group["rewards"] = np.asarray(arrays["rewards"][part], np.float32)
            group["terminations"] = terminated[part]
            timeouts = arrays["timeouts"][part].astype(bool)
            timeouts[-1] |= not terminated[part][-1]
            group["truncations"] = timeouts
            # Infos, of which the first is that of the reset.
            infos = group.create_group("infos")
            signals = {f"cost_{name}": signal_column(name) for name in signals_in(arrays)}
            for key, ours in (INFOS | signals).items():
                if ours in arrays:
                    values = arrays[ours][part].astype(bool if key == "accident" else np.float32)
                    infos[key] = np.concatenate([np.zeros(1, values.dtype), values])
            if progress is not None:
                progress(int(part.stop), int(starts[-1]))
        file.flush()
    return [f"the next observation of {jumps} steps, which is not the following row's"] * (
        jumps > 0
    )


def _dataset_id(path: Path) -> str:
    """What Minari calls the dataset in a folder: below its own folder with the namespace."""
    root, place = datasets_folder().resolve(), path.resolve()
    parts = place.relative_to(root).parts if place.is_relative_to(root) else (path.name,)
    label = "/".join(re.sub(r"[^-\w]", "-", part) for part in parts)
    return label if re.search(r"-v\d+$", label) else f"{label}-v0"


def _describe(name: str, arrays: Arrays, metadata: Metadata, wide: np.dtype[Any]) -> dict[str, Any]:
    """What Minari wants to know of a dataset."""
    size = arrays["actions"].shape[1]
    discrete = metadata.get("action_count") is not None
    described: dict[str, Any] = {
        "dataset_id": name,
        "total_episodes": len(find_episodes(arrays).lengths),
        "total_steps": len(arrays["rewards"]),
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "minari_version": VERSION,
        "observation_space": _box(arrays["observations"].shape[1], math.inf, wide.name),
        "action_space": _discrete(size) if discrete else _box(size, 1.0),
        ATTRIBUTE: metadata_text(metadata),
    }
    if isinstance(metadata.get("env_id"), str):
        horizon = metadata.get("horizon")
        described["env_spec"] = json.dumps(
            {
                "id": metadata["env_id"],
                "entry_point": None,
                "max_episode_steps": horizon if isinstance(horizon, int) else None,
                "kwargs": {},
                "additional_wrappers": [],
                "vector_entry_point": None,
            }
        )
    return described


def _discrete(count: int) -> str:
    """A Discrete space as Minari serialises it."""
    return json.dumps({"type": "Discrete", "dtype": "int64", "start": 0, "n": count})


def _box(size: int, bound: float, kind: str = "float32") -> str:
    """A Box as Minari serialises it."""
    low, high = [-bound] * size, [bound] * size
    return json.dumps({"type": "Box", "dtype": kind, "shape": [size], "low": low, "high": high})
