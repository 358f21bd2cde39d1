"""Datasets on disk: HDF5 in the DSRL layout, with our metadata as one JSON attribute.

A file may come from anywhere, and HDF5 can point to other files on this machine. Only plain,
contiguous or chunked arrays of numbers that lie in the file itself are read, and only after their
size has been added up.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from safe_offrl.data.validation import REQUIRED, validate_arrays
from safe_offrl.errors import DataError
from safe_offrl.safety import SafetySpec
from safe_offrl.types import Batch, Dataset, Layout

Arrays = Mapping[str, NDArray[Any]]

ATTRIBUTE = "safe_offrl"
# accidents [N] (bool) is the accident rule's verdict, episode_behaviours [M] (int32) the index into
# metadata["behaviours"] of the behaviour that logged each episode.
OPTIONAL = ("accidents", "episode_behaviours")
_BOOLEAN = ("terminals", "timeouts", "accidents")
MAX_BYTES = 8 * 2**30  # several times the largest public DSRL file


def write_dataset(path: str | Path, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
    """Validate and write a dataset; a reader sees the old file or the complete new one.

    ``arrays``: those of :data:`REQUIRED`, optionally :data:`OPTIONAL`. ``metadata`` must be
    JSON-able; load_dataset reads env_id, accident, cost_threshold, horizon and behaviours from it.
    """
    validate_arrays(arrays)
    text = json.dumps(metadata, sort_keys=True, allow_nan=False)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            for key in (*REQUIRED, *OPTIONAL):
                if key in arrays:
                    file.create_dataset(key, data=arrays[key].astype(_stored_type(key)))
            file.attrs[ATTRIBUTE] = text
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_dataset(
    path: str | Path, *, discount: float, spec: SafetySpec, horizon: int | None = None
) -> Dataset:
    """Read and validate a dataset file into one contiguous store.

    An episode ends at terminals or timeouts (terminals win where both are set); a last episode
    without an end counts as truncated. ``horizon`` (else ``spec.horizon``, else the file's) scales
    ``time_to_go`` and must cover the longest episode. ``discount`` is that of ``return_to_go``.
    Accidents are the file's own if its rule is that of ``spec``; otherwise they are derived from
    costs or terminals. Works for DSRL files without our metadata too. Raises DataError.
    """
    arrays, metadata = _read(Path(path))
    validate_arrays(arrays)
    terminated = arrays["terminals"].astype(bool)
    ends = terminated | arrays["timeouts"].astype(bool)
    ends[-1] = True
    starts = np.concatenate([[0], np.flatnonzero(ends) + 1]).astype(np.int64)
    lengths = np.diff(starts)
    horizon = _horizon(horizon or spec.horizon or metadata.get("horizon"), lengths)
    accidents = _accidents(arrays, metadata, spec)
    steps = np.arange(len(ends)) - np.repeat(starts[:-1], lengths)
    columns = {
        "observations": arrays["observations"],
        "actions": np.clip(arrays["actions"], -1.0, 1.0),  # the tolerance of the validation
        "rewards": arrays["rewards"],
        "accidents": accidents,
        "costs": arrays["costs"],
        "next_observations": arrays["next_observations"],
        "terminated": terminated,
        "time_to_go": 1.0 - steps / horizon,
        "return_to_go": _returns_to_go(arrays["rewards"], ends, discount),
    }
    tensors = {key: torch.from_numpy(value.astype(np.float32)) for key, value in columns.items()}
    layout = Layout(arrays["observations"].shape[1], arrays["actions"].shape[1])
    identity = dataset_sha256(arrays, metadata)
    _count_behaviours(arrays, metadata, np.logical_or.reduceat(accidents, starts[:-1]))
    return Dataset(
        rows=layout.pack(Batch(**tensors)),
        layout=layout,
        episode_starts=starts,
        truncated=ends & ~terminated,
        horizon=horizon,
        sha256=identity,
        metadata=metadata,
    )


def dataset_sha256(arrays: Arrays, metadata: Mapping[str, Any]) -> str:
    """Identity of a dataset's content: names, types, shapes and values, and the metadata.

    The bytes of the HDF5 container do not enter: they change with the library's version.
    """
    digest = hashlib.sha256()
    for key in (*REQUIRED, *OPTIONAL):
        if key in arrays:
            array = np.ascontiguousarray(arrays[key].astype(_stored_type(key)))
            digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.data)
    digest.update(json.dumps(metadata, sort_keys=True).encode())
    return digest.hexdigest()


def _stored_type(key: str) -> np.dtype[Any]:
    kind = "?" if key in _BOOLEAN else "<i4" if key == "episode_behaviours" else "<f4"
    return np.dtype(kind)


def _read(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Read the known arrays and the metadata; everything else in the file is left alone."""
    if not path.is_file():
        raise DataError(
            f'There is no dataset file "{path}". Check the path, or log a dataset with '
            "`safe-offrl collect`."
        )
    try:
        with h5py.File(path, "r") as file:
            found = {
                key: dataset
                for key in (*REQUIRED, *OPTIONAL)
                if (dataset := _plain_dataset(file, key)) is not None
            }
            size = sum(
                int(np.prod(d.shape, dtype=object)) * d.dtype.itemsize for d in found.values()
            )
            if size > MAX_BYTES:
                raise DataError(
                    f'The dataset "{path}" would take {size / 2**30:.0f} GiB, more than the limit '
                    f"of {MAX_BYTES / 2**30:.0f} GiB. Split it into smaller files."
                )
            return {key: dataset[()] for key, dataset in found.items()}, _metadata(file)
    except DataError:
        raise
    except Exception as error:  # h5py raises OSError, RuntimeError, KeyError ... on damaged files
        raise DataError(
            f'The dataset "{path}" cannot be read as HDF5 ({" ".join(str(error).split())}). '
            "The file is damaged or of another format; copy or log it again."
        ) from error


def _plain_dataset(file: h5py.File, key: str) -> h5py.Dataset | None:
    """The dataset ``key`` of the root group; None if missing; DataError if it is not plain."""
    link = file.get(key, getlink=True)
    if link is None:
        return None
    # The order matters: touching file[key] would already follow a link into another file.
    problem = "is a link" if not isinstance(link, h5py.HardLink) else None
    if problem is None:
        item = file[key]
        if not isinstance(item, h5py.Dataset):
            problem = "is no array"
        elif item.is_virtual or item.external:
            problem = "takes its values from another file"
        elif item.shape is None or item.dtype.kind not in "fiub":
            problem = f"holds {item.dtype}, not numbers"
        else:
            return item
    raise DataError(
        f'In the dataset, "{key}" {problem}, which is refused for safety. '
        "Store it as a plain array of numbers in the file itself."
    )


def _metadata(file: h5py.File) -> dict[str, Any]:
    """Our JSON attribute as a dict; {} in a foreign file."""
    if ATTRIBUTE not in file.attrs:
        return {}
    text = file.attrs[ATTRIBUTE]
    with contextlib.suppress(ValueError, RecursionError):
        metadata = json.loads(text, object_pairs_hook=_without_duplicates)
        if isinstance(metadata, dict):
            return metadata
    raise DataError(
        f'The dataset\'s attribute "{ATTRIBUTE}" is not a JSON object with distinct keys. '
        "Log the dataset again, or delete the attribute and give the horizon."
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate keys")
    return found


def _horizon(horizon: Any, lengths: NDArray[np.int64]) -> int:
    if not isinstance(horizon, int) or isinstance(horizon, bool) or horizon < 1:
        raise DataError(
            f"The dataset's horizon is {horizon}, so a share of time left has no meaning. "
            "Set safety.horizon to the time limit of the environment."
        )
    if lengths.max() > horizon:
        raise DataError(
            f"Episode {int(lengths.argmax())} of the dataset has {lengths.max()} steps, more than "
            f"the horizon of {horizon}. Set safety.horizon={lengths.max()} or more, or check that "
            "timeouts marks the ends of episodes."
        )
    return horizon


def _accidents(arrays: Arrays, metadata: Mapping[str, Any], spec: SafetySpec) -> NDArray[np.bool_]:
    """Verdict of the rule of ``spec`` for each transition [N]."""
    logged_rule = (metadata.get("accident"), metadata.get("cost_threshold"))
    threshold = spec.cost_threshold if spec.accident == "cost" else logged_rule[1]
    if "accidents" in arrays and logged_rule in ((None, None), (spec.accident, threshold)):
        return arrays["accidents"].astype(bool)
    if spec.accident == "cost":
        return arrays["costs"] > spec.cost_threshold
    if spec.accident == "terminated":
        return arrays["terminals"].astype(bool)
    raise DataError(
        f'The accident rule "{spec.accident}" cannot be applied to logged data, and the dataset '
        f"was logged with {logged_rule[0] or 'no rule'}. Log it again under this rule, or set "
        "safety.accident=cost."
    )


def _returns_to_go(
    rewards: NDArray[Any], ends: NDArray[np.bool_], discount: float
) -> NDArray[np.float64]:
    """``G_t = r_t + discount * G_{t+1}`` within each episode, 0 after its end: [N] -> [N]."""
    result, following = np.empty(len(rewards)), 0.0
    for t in range(len(rewards) - 1, -1, -1):
        following = float(rewards[t]) + (0.0 if ends[t] else discount * following)
        result[t] = following
    return result


def _count_behaviours(
    arrays: Arrays, metadata: dict[str, Any], accidents: NDArray[np.bool_]
) -> None:
    """Set metadata["behaviours"][k]["episodes" and "accident_episodes"] to what the data holds.

    ``accidents`` [M] says which episodes had one, under the rule of this load.
    """
    index = arrays.get("episode_behaviours")
    if index is None:
        return
    behaviours = metadata.get("behaviours")
    if not isinstance(behaviours, list) or not all(isinstance(b, dict) for b in behaviours):
        behaviours = []
    if index.shape != accidents.shape or not np.isin(index, range(len(behaviours))).all():
        raise DataError(
            "episode_behaviours does not give one of the metadata's behaviours for each of the "
            f"{len(accidents)} episodes. Log the dataset again, or leave the array out."
        )
    for k, behaviour in enumerate(behaviours):
        behaviour["episodes"] = int((index == k).sum())
        behaviour["accident_episodes"] = int(accidents[index == k].sum())
