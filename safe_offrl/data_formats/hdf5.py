"""HDF5 files in the DSRL layout, with our metadata as one JSON attribute; D4RL's are read too.

HDF5 can point to other files on this machine. Only plain, contiguous or chunked arrays of numbers
that lie in the file itself are read, and only after their size has been added up.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from safe_offrl.data.content import Arrays, Metadata, chunks, metadata_text
from safe_offrl.data.offsets import OBSERVATIONS, in_own_units
from safe_offrl.data_formats.names import recognise
from safe_offrl.data_formats.stored import (
    ATTRIBUTE,
    OPTIONAL,
    REQUIRED,
    Raw,
    parse_metadata,
    reading,
    require_size,
    stored_names,
    stored_type,
)
from safe_offrl.data_formats.validation import validate_arrays
from safe_offrl.errors import DataError
from safe_offrl.files import replacing

_HEAP = b"GCOL\1\0\0\0"  # how a heap of HDF5 begins


def write_dataset(path: str | Path, arrays: Arrays, metadata: Metadata) -> None:
    """Validate and write a dataset; a reader sees the old file or the complete new one.

    ``arrays``: those of REQUIRED (validation.py), optionally OPTIONAL and signals (stored.py).
    ``metadata`` must be JSON-able. Observations are stored in float32, or in float64 where that
    would cost them their digits. load_dataset reads env_id, accident, cost_threshold, horizon,
    behaviours, action_low and action_high (the bounds of the actions as stored) and action_count
    from it.
    """
    validate_arrays(arrays)
    arrays, metadata, wide = in_own_units(arrays, metadata)
    text = metadata_text(metadata)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as temporary, h5py.File(temporary, "w") as file:
        for key in stored_names(arrays):
            array, kind = arrays[key], wide if key in OBSERVATIONS else stored_type(key)
            stored = file.create_dataset(key, array.shape, kind)
            for part in chunks(len(array)):
                stored[part] = array[part].astype(kind)
        file.attrs[ATTRIBUTE] = text


def read_hdf5(path: Path) -> Raw:
    """The known arrays and the metadata; what else the file holds is named, and left alone."""
    with opened(path) as file:
        found, remarks = plain_arrays(file)
        require_size(path, map(declared_size, found.values()))
        arrays = {key: item[()] for key, item in found.items()}
        return Raw(arrays, metadata_of(file), tuple(remarks))


def read_hdf5_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone."""
    with opened(path) as file:
        return metadata_of(file)


def plain_arrays(file: h5py.File) -> tuple[dict[str, h5py.Dataset], list[str]]:
    """The known arrays of the root group, unread, and what is to be said of the others."""
    names, remarks = recognise(present_arrays(file))
    # A known name is taken even if it is no array, so that it is refused and not overlooked.
    names = {key: key for key in (*REQUIRED, *OPTIONAL) if key in file} | names
    found = ((key, plain_dataset(file, theirs)) for key, theirs in names.items())
    return {key: item for key, item in found if item is not None}, remarks


def present_arrays(group: h5py.Group, depth: int = 3) -> dict[str, int | None]:
    """Rows of every array in a group and the groups within it, by path; None of what is a link.

    Nothing is read, and no link followed.
    """
    found: dict[str, int | None] = {}
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            found[name] = None
            continue
        item = group[name]
        if isinstance(item, h5py.Group) and depth > 1:
            inner = present_arrays(item, depth - 1)
            found |= {f"{name}/{key}": rows for key, rows in inner.items()}
        elif isinstance(item, h5py.Dataset):
            found[name] = item.shape[0] if item.shape else -1
    return found


class Unread:
    """An array of an open file that is read as it is sliced, [a:b]; damage is a DataError."""

    def __init__(self, path: Path, item: h5py.Dataset) -> None:
        self._path, self._item = path, item
        self.shape, self.ndim, self.dtype = item.shape, item.ndim, item.dtype

    def __len__(self) -> int:
        return len(self._item)

    def __getitem__(self, part: Any) -> NDArray[Any]:
        with reading(self._path, "HDF5"):
            return np.asarray(self._item[part])


@contextlib.contextmanager
def unread_hdf5(path: Path) -> Iterator[Raw]:
    """The known arrays of a file as :class:`Unread`, metadata and remarks, while it is open."""
    with contextlib.ExitStack() as stack:
        with reading(path, "HDF5"):
            file = stack.enter_context(h5py.File(path, "r"))
            found, remarks = plain_arrays(file)
            arrays: Any = {key: Unread(path, item) for key, item in found.items()}
            raw = Raw(arrays, metadata_of(file), tuple(remarks))
        yield raw


@contextlib.contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file to read from; whatever goes wrong inside is a DataError."""
    with reading(path, "HDF5"), h5py.File(path, "r") as file:
        yield file


def declared_size(item: h5py.Dataset) -> int:
    """Bytes that the array takes in memory, by what the file says of it."""
    return int(np.prod(item.shape, dtype=object)) * int(item.dtype.itemsize)


def plain_dataset(group: h5py.Group, key: str) -> h5py.Dataset | None:
    """The array ``key`` of a group; None if missing; DataError if it is not plain."""
    return _plain_item(group, key, h5py.Dataset)


def plain_group(group: h5py.Group, key: str) -> h5py.Group | None:
    """The group ``key`` within a group; None if missing or an array; DataError if it is a link."""
    return _plain_item(group, key, h5py.Group)


def _plain_item(group: h5py.Group, key: str, kind: type) -> Any:
    link = group.get(key, getlink=True)
    if link is None:
        return None
    # The order matters: touching group[key] would already follow a link into another file.
    problem = "is a link" if not isinstance(link, h5py.HardLink) else None
    if problem is None:
        item = group[key]
        if kind is h5py.Group:
            return item if isinstance(item, h5py.Group) else None
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


def metadata_of(file: h5py.File) -> dict[str, Any]:
    """Our JSON attribute as a dict; {} in a foreign file."""
    text = plain_attribute(file, ATTRIBUTE)
    return {} if text is None else parse_metadata(text)


def plain_attribute(group: h5py.Group, name: str) -> Any:
    """One text or number that a group has as an attribute; None if missing; else DataError.

    Its type is looked at before its value: a flipped bit makes a text a sequence of any length, and
    to read one that was not written as such ends the process in the HDF5 library.
    """
    if name not in group.attrs:
        return None
    stored = group.attrs.get_id(name)
    text = h5py.check_string_dtype(stored.dtype)
    if stored.shape != () or not (text or stored.dtype.kind in "fiub"):
        raise DataError(
            f'The dataset\'s attribute "{name}" is not one text or number. Log the dataset again, '
            "or delete the entry."
        )
    if text and text.length is None:
        _require_sound_heaps(Path(group.file.filename))
    return group.attrs[name]


def _require_sound_heaps(path: Path) -> None:
    """Raise DataError where the HDF5 library would go round in circles for ever.

    Texts of variable length lie in heaps: a header of 16 bytes (signature, version, size), and
    objects (index, references, size, then the text padded to 8 bytes; index 0 is the space that is
    left, whose size is with its own header). The library goes from one to the next by their sizes
    and does not mind one of none.
    """
    damaged = DataError(
        f'The texts in the dataset "{path}" are not where it says: it is damaged. Log or download '
        "it again."
    )
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(_HEAP)
        while at >= 0:
            end = at + 16 <= len(data) and at + int.from_bytes(data[at + 8 : at + 16], "little")
            if not at + 16 <= end <= len(data):
                raise damaged
            position = at + 16
            while end - position >= 16:
                index, size = struct.unpack("<H6xQ", data[position : position + 16])
                position += 16 + (size + 7) // 8 * 8 if index else size
                if position > end or (not index and size < 16):
                    raise damaged
            at = data.find(_HEAP, at + 1)
