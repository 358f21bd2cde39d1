"""Datasets larger than memory: a folder of plain arrays that are mapped, not read.

    dataset.json      sizes, our metadata, the hashes of the content and of the source
    tables.f32        [N, 2 O + A]: observations, actions, next_observations of one row side by side
    rewards.f32 ...   one file for each of the other arrays
    scalars-KEY.f32   [N, 6 + K (+ 2)]: what depends on accident rule, signals, horizon and discount
                      (KEY); made by the first load that needs it, as a cache

A batch is two gathers, of tables and of scalars, which together are rows in Layout order.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from safe_offrl.data import derived
from safe_offrl.data.content import Arrays, Metadata, chunks, metadata_text
from safe_offrl.data.dataset import Dataset
from safe_offrl.data.offsets import centred
from safe_offrl.data_formats.complete import complete, taken_history
from safe_offrl.data_formats.mapped_rows import MappedRows
from safe_offrl.data_formats.stored import (
    REQUIRED,
    TABLES,
    Raw,
    RowProgress,
    dataset_sha256,
    parse_metadata,
    stored_names,
    stored_type,
)
from safe_offrl.data_formats.validation import check_one_hot, validate_arrays
from safe_offrl.errors import DataError
from safe_offrl.files import json_bytes, replacing, write_file
from safe_offrl.spec import SafetySpec
from safe_offrl.types import Layout

HEADER = "dataset.json"
ROWS_AT_ONCE = 2**20  # scalars of so many rows are computed together, or of one longer episode
_SUFFIX = {"|b1": "u1", "<i4": "i32", "<f4": "f32"}


def write_memory_map(
    path: Path,
    arrays: Arrays,
    metadata: Metadata,
    progress: RowProgress | None = None,
    *,
    source: Metadata | None = None,
    settled: bool = False,
) -> list[str]:
    """Validate and write the folder in chunks, complete or not at all; nothing is lost.

    ``source`` is noted in the header (name and sha256 of the file that this was made from).
    ``settled``: ends of episodes have been held against the observations, which a load then spares.
    """
    # Observations, actions and next observations.
    validate_arrays(arrays)
    arrays, metadata = centred(arrays, metadata)
    n = len(arrays["rewards"])
    with replacing(path) as temporary:
        temporary.mkdir(parents=True)
        with (temporary / "tables.f32").open("wb") as file:
            for part in chunks(n):
                block = [np.asarray(arrays[key][part], "<f4") for key in TABLES]
                if metadata.get("action_count") is not None:
                    check_one_hot(block[TABLES.index("actions")], metadata["action_count"])
                file.write(np.concatenate(block, axis=1).data)
                if progress is not None:
                    progress(part.stop, n)
            _sync(file)
        # Files of one array each.
        for key in _others(arrays):
            with (temporary / _file_name(key)).open("wb") as file:
                for part in chunks(len(arrays[key])):
                    file.write(
                        np.ascontiguousarray(arrays[key][part].astype(stored_type(key))).data
                    )
                _sync(file)
        # The header.
        header: dict[str, Any] = {
            "version": 1,
            "transitions": n,
            "observation_size": arrays["observations"].shape[1],
            "action_size": arrays["actions"].shape[1],
            "files": {f.name: f.stat().st_size for f in sorted(temporary.iterdir())},
            "metadata": metadata_text(metadata),
            "sha256": dataset_sha256(arrays, metadata),
            "source": dict(source or {}),
            "settled": settled,
        }
        header["header_sha256"] = _header_sha256(header)
        write_file(temporary / HEADER, json_bytes(header))
    return []


def read_memory_map(path: Path) -> Raw:
    """The arrays, mapped, and the metadata; sizes and the header's hash are checked."""
    header, tables = _open(path)
    o, a = header["observation_size"], header["action_size"]
    arrays = {
        "observations": tables[:, :o],
        "actions": tables[:, o : o + a],
        "next_observations": tables[:, o + a :],
    }
    for key in _others(name.partition(".")[0] for name in header["files"]):
        arrays[key] = _map_file(path / _file_name(key), stored_type(key))
    return Raw(arrays, parse_metadata(header["metadata"]))


def read_memory_map_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone."""
    return parse_metadata(_open(path)[0]["metadata"])


def verify_memory_map(path: Path) -> str:
    """Read everything and compare it with the hash in the header; returns it. Raises DataError."""
    arrays, metadata, _, _ = read_memory_map(path)
    validate_arrays(arrays)
    found, expected = dataset_sha256(arrays, metadata), _open(path)[0]["sha256"]
    if found != expected:
        raise DataError(
            f'The content of "{path}" has the sha256 {found[:12]}..., not the {expected[:12]}... '
            "that was stored with it. It is damaged: convert the source again."
        )
    return found


def load_memory_map(
    path: Path, *, discount: float, spec: SafetySpec, horizon: int | None
) -> Dataset:
    """The dataset of the folder without reading its rows; see load_dataset for the arguments."""
    # Content.
    arrays, metadata, *_ = read_memory_map(path)
    header, tables = _open(path)
    if header.get("settled"):
        remarks, unsure = taken_history(metadata)
    else:
        settled = complete(arrays, metadata, horizon=horizon or spec.horizon)
        arrays, metadata, remarks, unsure = settled
    # Episodes under the horizon.
    derived.require_known_terminations(unsure, spec)
    derived.require_signals(arrays, spec)
    episodes = derived.find_episodes(arrays)
    horizon = derived.resolve_horizon(horizon, spec, metadata, episodes.lengths)
    # The dataset.
    size = arrays["observations"].shape[1] + (spec.accident == "episode_cost")
    layout = Layout(size, arrays["actions"].shape[1], tuple(spec.signals))
    scalars = _mapped_scalars(
        path, header["sha256"], arrays, episodes, metadata, spec, horizon, discount, layout.scalars
    )
    dataset = Dataset(
        rows=MappedRows(torch.from_numpy(tables), torch.from_numpy(scalars), layout, episodes[0]),
        layout=layout,
        episode_starts=episodes.starts,
        truncated=episodes.truncated,
        horizon=horizon,
        sha256=header["sha256"],
        metadata=metadata,
        episode_behaviours=arrays.get("episode_behaviours"),
        behaviour_log_probs=arrays.get("behaviour_log_probs"),
        remarks=(*remarks, *derived.rule_remarks(arrays, metadata, spec, episodes.starts)),
    )
    derived.count_behaviours(arrays, metadata, dataset.episode_accidents)
    return dataset


def is_memory_map(path: Path) -> bool:
    """Whether ``path`` is such a folder."""
    return (path / HEADER).is_file()


def _mapped_scalars(
    path: Path,
    identity: str,
    arrays: Arrays,
    episodes: derived.Episodes,
    metadata: Metadata,
    spec: SafetySpec,
    horizon: int,
    discount: float,
    names: tuple[str, ...],
) -> NDArray[np.float32]:
    """Columns that follow the tables [N, 6 + K (+ 2)], mapped from the cache beside the map.

    ``names`` of the layout's scalars; then come the two of the rule "episode_cost".
    """
    key = f"{identity} {spec.accident} {spec.cost_threshold!r} {horizon} {discount!r}"
    key = " ".join([key, *spec.signals])
    name = f"scalars-{hashlib.sha256(key.encode()).hexdigest()[:16]}.f32"
    width = len(names) + 2 * (spec.accident == "episode_cost")
    target, expected = path / name, len(episodes.terminated) * width * 4
    if not target.is_file() or target.stat().st_size != expected:
        try:
            with replacing(target) as temporary, temporary.open("wb") as file:
                for block in _scalar_blocks(
                    arrays, episodes.starts, metadata, spec, horizon, discount, names
                ):
                    file.write(np.ascontiguousarray(block, "<f4").data)
        except OSError as error:
            raise DataError(
                f'The accidents, times and returns of this run cannot be written into "{path}" '
                f"({error}). Make room there, or copy the folder to where you may write."
            ) from error
    return _map_file(target, np.dtype("<f4")).reshape(-1, width)


def _scalar_blocks(
    arrays: Arrays,
    starts: NDArray[np.int64],
    metadata: Metadata,
    spec: SafetySpec,
    horizon: int,
    discount: float,
    names: tuple[str, ...],
) -> Iterator[NDArray[np.float32]]:
    """The scalars of whole episodes at a time."""
    first = 0
    while first < len(starts) - 1:
        beyond = int(np.searchsorted(starts, starts[first] + ROWS_AT_ONCE, side="right")) - 1
        beyond = max(beyond, first + 1)
        part = slice(starts[first], starts[beyond])
        piece = {key: arrays[key][part] for key in arrays if key not in TABLES}
        columns = derived.scalar_columns(
            piece, starts[first : beyond + 1] - part.start, metadata, spec, horizon, discount
        )
        ordered = [columns.pop(name) for name in names]
        yield np.stack([*ordered, *columns.values()], axis=1)  # what the rule adds comes behind
        first = beyond


def _open(path: Path) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """dataset.json, checked against its own hash and the sizes of the files, and tables.f32."""
    try:
        header = json.loads((path / HEADER).read_bytes())
        intact = header["version"] == 1 and header["header_sha256"] == _header_sha256(header)
        n, o, a = (header[k] for k in ("transitions", "observation_size", "action_size"))
        found = {name: (path / name).lstat() for name in header["files"]}
        # A link could point to any file of this machine.
        sizes = {name: s.st_size for name, s in found.items() if stat.S_ISREG(s.st_mode)}
        complete = sizes == header["files"] and sizes["tables.f32"] == n * (2 * o + a) * 4
        complete &= all(type(size) is int and size > 0 for size in (n, o, a))
        complete &= isinstance(header["metadata"], str) and isinstance(header["sha256"], str)
        complete &= all(
            sizes[_file_name(key)] == n * stored_type(key).itemsize
            for key in (*REQUIRED, *_others(name.partition(".")[0] for name in sizes))
            if key not in (*TABLES, "episode_behaviours")
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        header, n, o, a = {}, 0, 0, 0
        intact = complete = False
    if not intact or not complete:
        raise DataError(
            f'The memory map "{path}" is damaged: its files are not what {HEADER} says of them. '
            "Convert the source again."
        )
    tables = _map_file(path / "tables.f32", np.dtype("<f4"))
    return header, tables.reshape(n, 2 * o + a)


def _header_sha256(header: Metadata) -> str:
    content = {key: value for key, value in header.items() if key != "header_sha256"}
    return hashlib.sha256(json_bytes(content)).hexdigest()


def _map_file(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    """A file as an array whose pages are read when they are touched; writing changes no file."""
    return np.memmap(path, dtype=kind, mode="c").view(np.ndarray)


def _others(names: Iterable[str]) -> list[str]:
    return [key for key in stored_names(names) if key not in TABLES]


def _file_name(key: str) -> str:
    return f"{key}.{_SUFFIX[stored_type(key).str]}"


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
