"""Files that survive a crash (write all, fsync, rename), and the JSON that goes into them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where that lies which can be built again: ``$SAFE_OFFRL_CACHE``, else in the home folder."""
    return Path(os.environ.get("SAFE_OFFRL_CACHE") or Path.home() / ".cache" / "safe-offrl")


def write_file(path: Path, data: bytes, *, append: bool = False, sync: bool = True) -> None:
    """Write ``data`` in place or, with ``append``, at the end; on disk when this returns.

    Without ``sync`` it is on disk when the operating system sees fit.
    """
    mode = os.O_APPEND if append else os.O_TRUNC
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | mode | getattr(os, "O_BINARY", 0), 0o644)
    with _naming_file(path, fd):
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        if sync:
            os.fsync(fd)


@contextlib.contextmanager
def _naming_file(path: Path, fd: int) -> Iterator[None]:
    """Closes ``fd``; what goes wrong meanwhile names the file, which os.write and fsync do not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write to, a file or a folder: in the end it is ``target``, or nothing has changed.

    A file is on disk before that; of a folder's files their writer sees to it.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_file():
            write_file(temporary, b"", append=True)
        temporary.replace(target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
    fsync_folder(target.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` or leave it as it was; readers never see half a file."""
    with replacing(path) as temporary:
        write_file(temporary, data, sync=False)


def unwritable(folder: Path) -> str | None:
    """Why no file can be written into a folder, in the system's words; None if one can.

    Nothing is left behind: where the folder is still to be made, the one above it is tried.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    probe = there / f".writable-{os.getpid()}"
    try:
        try:
            write_file(probe, b"?")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return str(error.strerror)
    return None


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable: what was created, renamed or removed there."""
    if os.name == "nt":  # Windows cannot open a folder; NTFS journals the rename itself
        return
    fd = os.open(path, os.O_RDONLY)
    with _naming_file(path, fd):
        os.fsync(fd)


def plain(value: Any) -> Any:
    """Named tuples and dataclasses as JSON-able dicts, recursively; non-finite numbers as None."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars, tensors
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_line(values: Mapping[str, Any]) -> bytes:
    """One strict JSON object and a newline; a non-finite number becomes null."""
    return json.dumps(plain(dict(values)), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def json_bytes(value: Any) -> bytes:
    """A JSON file with sorted keys; unlike in a line, -inf stays -inf (as evidence may be)."""
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
