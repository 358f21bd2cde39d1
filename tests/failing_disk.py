"""A disk that fails: the operating system's own calls raise for the files that are chosen.

And one that loses its power: what was appended and not fsynced is gone.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FAULTS = {"full": errno.ENOSPC, "denied": errno.EACCES, "broken": errno.EIO}
Chosen = Callable[[Path, bytes], bool]  # which call fails: the path, and what was written last


def fail(patch: pytest.MonkeyPatch, call: str, fault: str, chosen: Chosen) -> list[Path]:
    """Let os.``call`` (write, fsync or replace, the rename) raise as a ``fault`` of the disk does.

    Returns the list of paths where it did, which grows. Half of a write gets through.
    """
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace")}
    opened: dict[int, Path] = {}
    written: dict[Path, bytes] = {}
    failed: list[Path] = []

    def check(path: Path) -> None:
        if chosen(path, written.get(path, b"")):
            failed.append(path)
            raise OSError(FAULTS[fault], os.strerror(FAULTS[fault]))

    def opening(path: Any, *arguments: Any, **named: Any) -> Any:
        fd = real["open"](path, *arguments, **named)
        opened[fd] = Path(path)
        return fd

    def writing(fd: int, data: Any) -> Any:
        if fd not in opened:  # a pipe, say
            return real["write"](fd, data)
        written[opened[fd]] = bytes(data)
        if call == "write" and chosen(opened[fd], bytes(data)):
            real["write"](fd, data[: len(data) // 2])
            check(opened[fd])
        return real["write"](fd, data)

    def syncing(fd: int) -> None:
        if call == "fsync" and fd in opened:
            check(opened[fd])
        real["fsync"](fd)

    def renaming(source: Any, target: Any, **named: Any) -> None:
        if call == "replace":
            check(Path(target))
        real["replace"](source, target, **named)

    patch.setattr(os, "open", opening)
    patch.setattr(os, "write", writing)
    patch.setattr(os, "fsync", syncing)
    patch.setattr(os, "replace", renaming)
    return failed


def watch(patch: pytest.MonkeyPatch) -> dict[Path, int]:
    """Sizes of files at their last fsync, which grow as more are fsynced."""
    opening, syncing = os.open, os.fsync
    opened: dict[int, Path] = {}
    durable: dict[Path, int] = {}

    def open_(path: Any, *arguments: Any, **named: Any) -> Any:
        fd = opening(path, *arguments, **named)
        opened[fd] = Path(path)
        return fd

    def fsync(fd: int) -> None:
        syncing(fd)
        durable[opened[fd]] = os.fstat(fd).st_size

    patch.setattr(os, "open", open_)
    patch.setattr(os, "fsync", fsync)
    return durable


def cut_power(folder: Path, durable: dict[Path, int]) -> None:
    """Of the files that grow in a run folder, leave what was fsynced."""
    for path in folder.glob("*.jsonl"):
        os.truncate(path, durable.get(path, 0))
