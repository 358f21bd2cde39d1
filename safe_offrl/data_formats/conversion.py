"""From one dataset format to another; what the new one cannot hold is never dropped quietly."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from safe_offrl.data.content import CHUNK_ROWS
from safe_offrl.data_formats.loading import FILE_FORMATS, dataset_content, find_dataset, format_of
from safe_offrl.data_formats.memory_map import verify_memory_map, write_memory_map
from safe_offrl.data_formats.minari import DATA_FILE, data_folder
from safe_offrl.data_formats.stored import RowProgress
from safe_offrl.errors import DataError


class Conversion(NamedTuple):
    """What was converted: format names, the number of transitions, one phrase for each loss.

    ``remarks``: a sentence each on what of the source was not used, guessed or repaired.
    """

    source: str
    target: str
    transitions: int
    lost: list[str]
    remarks: list[str]


def target_format(path: Path) -> str:
    """Format of a file to be written, by its name; DataError for a name that says none."""
    suffix = path.suffix.lower()
    name = next((name for name, form in FILE_FORMATS.items() if suffix in form.suffixes), None)
    if name is None:
        raise DataError(
            f'"{path.name}" does not say which format to write. Name it .hdf5, .npz, .csv, .mmap '
            "(a folder), or without a suffix for a Minari folder."
        )
    return name


def convert(
    source: str | Path,
    target: str | Path,
    *,
    horizon: int | None = None,
    progress: RowProgress | None = None,
) -> Conversion:
    """Write the dataset ``source`` as ``target``, in the format that its name says.

    ``horizon`` is for sources that do not say which episodes a time limit cut. A memory map as
    source is checked against its stored hash first. Raises DataError, also if ``target`` exists.
    """
    # Source and target.
    found, path = find_dataset(source), Path(target)
    name, kind = format_of(found), target_format(path)
    if path.exists():
        raise DataError(f'"{path}" exists already. Remove it, or give another name.')
    if name == "mmap":
        verify_memory_map(found)
    # Content, and what was said of it.
    with dataset_content(found, horizon) as (arrays, metadata, remarks, unsure):
        if unsure and kind == "csv":
            raise DataError(
                f"{unsure[0].upper()}{unsure[1:]}; a table could not say so. Write another format."
            )
        history = {"remarks": list(remarks), "unsure": unsure}
        metadata = {**metadata, **{key: value for key, value in history.items() if value}}
        if horizon is not None:
            metadata = {**metadata, "horizon": horizon}
        # Writing.
        if kind == "mmap":
            provenance = {"name": found.name, "format": name, "sha256": file_sha256(found)}
            lost = write_memory_map(
                path, arrays, metadata, progress, source=provenance, settled=True
            )
        else:
            lost = FILE_FORMATS[kind].write(path, arrays, metadata, progress)
        return Conversion(name, kind, len(arrays["rewards"]), lost, list(remarks))


def file_sha256(path: Path) -> str:
    """Hash of the file that holds a dataset; of a folder, of the one that holds the transitions."""
    folder = data_folder(path)
    file = folder / DATA_FILE if folder is not None else path
    if file.is_dir():
        file = file / "dataset.json"  # of a memory map: it holds the hashes of the rest
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(64 * CHUNK_ROWS):
            digest.update(block)
    return digest.hexdigest()
