"""One way to load a dataset, whatever format it is in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from safe_offrl.data import derived
from safe_offrl.data.content import Arrays, Metadata
from safe_offrl.data.dataset import Dataset
from safe_offrl.data_formats.complete import complete
from safe_offrl.data_formats.csv import read_csv, read_csv_metadata, write_csv
from safe_offrl.data_formats.hdf5 import read_hdf5, read_hdf5_metadata, unread_hdf5, write_dataset
from safe_offrl.data_formats.memory_map import (
    is_memory_map,
    load_memory_map,
    read_memory_map,
    read_memory_map_metadata,
    write_memory_map,
)
from safe_offrl.data_formats.minari import (
    data_folder,
    datasets_folder,
    read_minari,
    read_minari_metadata,
    require_hdf5,
)
from safe_offrl.data_formats.minari_write import write_minari
from safe_offrl.data_formats.npz import read_npz, read_npz_metadata, write_npz
from safe_offrl.data_formats.stored import REQUIRED, Raw, RowProgress, dataset_sha256
from safe_offrl.data_formats.validation import check_one_hot, validate_arrays
from safe_offrl.errors import DataError
from safe_offrl.spec import SafetySpec
from safe_offrl.types import Layout


class FileFormat(NamedTuple):
    """How one format is recognised on disk, chosen by the name of a new file, read and written.

    ``read`` returns what the file holds, for :func:`complete`; ``words`` its metadata alone;
    ``write`` returns one phrase for each thing that the format cannot hold.
    """

    found_at: Callable[[Path], bool]
    suffixes: tuple[str, ...]
    read: Callable[[Path], Raw]
    words: Callable[[Path], dict[str, Any]]
    write: Callable[[Path, Arrays, Metadata, RowProgress | None], list[str]]


def _write_hdf5(
    path: Path, arrays: Arrays, metadata: Metadata, progress: RowProgress | None
) -> list[str]:
    write_dataset(path, arrays, metadata)
    return []


def _has_suffix(*suffixes: str) -> Callable[[Path], bool]:
    return lambda path: path.is_file() and path.suffix.lower() in suffixes


# The first that fits is taken; a file of another name is tried as HDF5.
FILE_FORMATS: dict[str, FileFormat] = {
    "mmap": FileFormat(
        is_memory_map, (".mmap",), read_memory_map, read_memory_map_metadata, write_memory_map
    ),
    "minari": FileFormat(
        lambda p: data_folder(p) is not None, ("",), read_minari, read_minari_metadata, write_minari
    ),
    "npz": FileFormat(_has_suffix(".npz"), (".npz",), read_npz, read_npz_metadata, write_npz),
    "csv": FileFormat(_has_suffix(".csv"), (".csv",), read_csv, read_csv_metadata, write_csv),
    "hdf5": FileFormat(Path.is_file, (".hdf5", ".h5"), read_hdf5, read_hdf5_metadata, _write_hdf5),
}

PACKED = {  # how compressed files begin, and what unpacks them
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\x00": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


def find_dataset(path: str | Path) -> Path:
    """The file or folder that is meant: as given, else a local Minari id; DataError if neither."""
    for candidate in (Path(path), datasets_folder() / path):
        if any(form.found_at(candidate) for form in FILE_FORMATS.values()):
            _require_unpacked(candidate)
            return candidate.resolve()
        require_hdf5(candidate)
    raise DataError(
        f'There is no dataset file "{path}". Check the path, or log a dataset with '
        "`safe-offrl collect`."
    )


def _require_unpacked(path: Path) -> None:
    """Raise DataError for a compressed file, which no format is."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(6)
    for magic, program in PACKED.items():
        if start.startswith(magic):
            raise DataError(
                f'The dataset "{path}" is compressed. Unpack it first, for example with '
                f"`{program} {path.name}`."
            )


def format_of(path: Path) -> str:
    """Key in :data:`FORMATS` of what :func:`find_dataset` found."""
    return next(name for name, form in FILE_FORMATS.items() if form.found_at(path))


def stated_metadata(path: str | Path) -> dict[str, Any]:
    """What a dataset says of itself, without reading its rows; {} of a format that cannot."""
    found = find_dataset(path)
    return FILE_FORMATS[format_of(found)].words(found)


def load_dataset(
    path: str | Path,
    *,
    discount: float,
    spec: SafetySpec,
    horizon: int | None = None,
    every_signal: bool = False,
) -> Dataset:
    """Read and validate a dataset into one contiguous store; a memory map stays on disk.

    ``path``: HDF5 in the layout of DSRL or D4RL, npz (ours or OmniSafe's), CSV, a Minari dataset
    (folder, file or local id) or a memory map of `safe-offrl convert`. An episode ends at terminals
    or timeouts (terminals win where both are set); a last episode without an end counts as
    truncated. ``horizon`` (the environment's; else ``spec.horizon``, else the file's) scales
    ``time_to_go`` and must cover the longest episode. ``discount`` is that of ``return_to_go``.
    Accidents are the file's own if its rule is that of ``spec``; otherwise they are derived from
    costs or terminals. Under the rule "episode_cost" observations end with the share of
    cost_threshold that the episode has used, which no file contains. Of the file's cost signals
    those of ``spec`` are taken, or ``every_signal``. Raises DataError.
    """
    found = find_dataset(path)
    if format_of(found) == "mmap":
        if every_signal:
            spec = derived.with_every_signal(*read_memory_map(found)[:2], spec)
        return load_memory_map(found, discount=discount, spec=spec, horizon=horizon)
    raw = FILE_FORMATS[format_of(found)].read(found)
    raw = complete(*raw, horizon=horizon or spec.horizon)
    validate_arrays(raw.arrays)
    if every_signal:
        spec = derived.with_every_signal(raw.arrays, raw.metadata, spec)
    return assemble(raw, discount=discount, spec=spec, horizon=horizon)


def assemble(raw: Raw, *, discount: float, spec: SafetySpec, horizon: int | None = None) -> Dataset:
    """A dataset in memory from valid arrays; see :func:`load_dataset` for the arguments."""
    # Episodes under the horizon.
    arrays, metadata, remarks, unsure = raw
    derived.require_known_terminations(unsure, spec)
    derived.require_signals(arrays, spec)
    episodes = derived.find_episodes(arrays)
    horizon = derived.resolve_horizon(horizon, spec, metadata, episodes.lengths)
    # Columns.
    columns = derived.scalar_columns(arrays, episodes.starts, metadata, spec, horizon, discount)
    share_before, share_after = columns.pop("share_before", None), columns.pop("share_after", None)
    columns |= {
        "observations": _with_share(arrays["observations"], share_before),
        "actions": np.clip(arrays["actions"], -1.0, 1.0),  # the tolerance of the validation
        "next_observations": _with_share(arrays["next_observations"], share_after),
    }
    # The dataset.
    tensors = {key: torch.from_numpy(value.astype(np.float32)) for key, value in columns.items()}
    sizes = columns["observations"].shape[1], columns["actions"].shape[1]
    layout = Layout(*sizes, tuple(spec.signals))
    identity = dataset_sha256(arrays, metadata)
    if metadata.get("action_count") is not None:
        check_one_hot(columns["actions"], metadata["action_count"])
    dataset = Dataset(
        rows=layout.join(
            tensors["observations"],
            tensors["actions"],
            tensors["next_observations"],
            torch.stack([tensors[key] for key in layout.scalars], dim=-1),
        ),
        layout=layout,
        episode_starts=episodes.starts,
        truncated=episodes.truncated,
        horizon=horizon,
        sha256=identity,
        metadata=metadata,
        episode_behaviours=arrays.get("episode_behaviours"),
        behaviour_log_probs=arrays["behaviour_log_probs"][:].astype(np.float32)
        if "behaviour_log_probs" in arrays
        else None,
        remarks=(*remarks, *derived.rule_remarks(arrays, metadata, spec, episodes.starts)),
    )
    derived.count_behaviours(arrays, metadata, dataset.episode_accidents)
    return dataset


@contextlib.contextmanager
def dataset_content(path: Path, horizon: int | None = None) -> Iterator[Raw]:
    """Complete arrays of a dataset, metadata and remarks, for a pass through it in chunks.

    A memory map and an HDF5 file in the DSRL layout are not read into memory but as they are
    sliced, so their size has no limit.
    """
    name = format_of(path)
    if name == "hdf5":
        with unread_hdf5(path) as raw:
            if set(REQUIRED) <= raw.arrays.keys():
                yield complete(*raw, horizon=horizon)
                return
    yield complete(*FILE_FORMATS[name].read(path), horizon=horizon)


def _with_share(observations: NDArray[Any], share: NDArray[Any] | None) -> NDArray[Any]:
    if share is None:
        return observations
    return np.column_stack([observations.astype(np.float32), share])
