"""NumPy archives: our own array names, or OmniSafe's. Pickles are never read."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from safe_offrl.data.content import Arrays, Metadata, metadata_text
from safe_offrl.data.offsets import OBSERVATIONS, in_own_units
from safe_offrl.data_formats.names import recognise
from safe_offrl.data_formats.stored import (
    Raw,
    RowProgress,
    parse_metadata,
    reading,
    require_size,
    stored_names,
    stored_type,
)
from safe_offrl.data_formats.validation import validate_arrays
from safe_offrl.errors import DataError
from safe_offrl.files import replacing

OMNISAFE = ("obs", "action", "reward", "cost", "next_obs", "done")  # its names, all of them
METADATA = "metadata"  # a 0-dimensional array of text: our metadata as JSON
MAX_TEXT = 2**24  # bytes of metadata
_HEADERS: dict[Any, Any] = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npz(path: Path) -> Raw:
    """The known arrays and the metadata of an archive, by our names or OmniSafe's."""
    with reading(path, "npz"), zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        present = {name.removesuffix(".npy") for name in members}
        names, remarks = recognise(
            {key: _rows(archive, key) for key in sorted(present - {METADATA})}
        )
        if set(OMNISAFE) <= present:  # of a writer that is known, nothing is to be said
            remarks = [text for text in remarks if " is read as " not in text]
        require_size(path, [_declared_size(archive, key, "fiub") for key in names.values()])
        arrays = {ours: _read_array(archive, theirs) for ours, theirs in names.items()}
        return Raw(arrays, _stored_metadata(path, archive), tuple(remarks))


def read_npz_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone."""
    with reading(path, "npz"), zipfile.ZipFile(path) as archive:
        return _stored_metadata(path, archive)


def write_npz(
    path: Path, arrays: Arrays, metadata: Metadata, progress: RowProgress | None = None
) -> list[str]:
    """Validate and write an archive; nothing is lost."""
    validate_arrays(arrays)
    arrays, metadata, wide = in_own_units(arrays, metadata)
    named: dict[str, Any] = {
        key: arrays[key][:].astype(wide if key in OBSERVATIONS else stored_type(key))
        for key in stored_names(arrays)
    }
    named[METADATA] = np.array(metadata_text(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **named)
    return []


def _stored_metadata(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    if f"{METADATA}.npy" not in archive.namelist():
        return {}
    if _declared_size(archive, METADATA, "U") > MAX_TEXT:
        raise DataError(f'The metadata of "{path}" are too long. Log the dataset again.')
    return parse_metadata(str(_read_array(archive, METADATA)))


def _declared_size(archive: zipfile.ZipFile, key: str, kinds: str) -> int:
    """Bytes of an array by its header, which must agree with the archive's own record.

    So neither a bomb nor a header that asks for more memory than there are bytes gets further.
    """
    stored = archive.getinfo(f"{key}.npy").file_size
    with archive.open(f"{key}.npy") as file:
        read_header = _HEADERS.get(npy.read_magic(file))  # type: ignore[no-untyped-call]
        if read_header is None:
            raise ValueError("unknown version of the npy format")
        shape, _, dtype = read_header(file)
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if dtype.hasobject or dtype.kind not in kinds:
            raise DataError(
                f'In the dataset, "{key}" holds {dtype}, not numbers, which is refused for '
                "safety. Store it as a plain array of numbers."
            )
        if size + file.tell() != stored:
            raise ValueError(f"{key} declares {size} bytes, but {stored} are stored")
    return size


def _rows(archive: zipfile.ZipFile, key: str) -> int | None:
    """Rows of an array by its header; None of what is no array of rows."""
    with archive.open(f"{key}.npy") as file:
        try:
            read_header = _HEADERS[npy.read_magic(file)]  # type: ignore[no-untyped-call]
            return read_header(file)[0][0]
        except (ValueError, KeyError, IndexError):
            return None


def _read_array(archive: zipfile.ZipFile, key: str) -> NDArray[Any]:
    with archive.open(f"{key}.npy") as file:
        return npy.read_array(file, allow_pickle=False)  # type: ignore[no-untyped-call]
