"""Names of run folders, and where a new one can be."""

from __future__ import annotations

import re
from pathlib import Path

from safe_offrl.errors import RunError
from safe_offrl.files import unwritable

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_name(name: str) -> str:
    """Return ``name`` if it can be a run's folder name, else raise RunError.

    >>> check_name("seed-0")
    'seed-0'
    """
    if not NAME.fullmatch(name) or set(name) == {"."}:
        raise RunError(
            f'"{name}" cannot name a run. Use 1 to 64 letters, digits, dots, dashes, underscores.'
        )
    return name


def require_runs_folder(root: Path, name: str | None = None) -> None:
    """Raise RunError unless a run, called ``name``, can be written into the folder ``root``.

    For the time before anything that takes long. Nothing is left behind.
    """
    if name is not None and (root / check_name(name)).exists():
        raise _taken(root, name)
    if why := unwritable(root):
        raise RunError(
            f'Nothing can be written into the runs folder "{root}" ({why}). '
            "Repair that, or choose another folder with --runs."
        )


def new_folder(root: Path, name: str | None, stem: str) -> Path:
    """Make the folder ``name`` in ``root``, without a name the first free ``<stem>-<k>``.

    It is made by one atomic call, so that two processes never share a folder.
    """
    require_runs_folder(root, name)
    root.mkdir(parents=True, exist_ok=True)
    if name is not None:
        path = root / name
        try:
            path.mkdir()
        except FileExistsError as error:  # Another process has just made it.
            raise _taken(root, name) from error
        return path
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)[:56]
    k = 1
    while True:
        path = root / f"{stem}-{k}"
        try:
            path.mkdir()
        except FileExistsError:
            k += 1
        else:
            return path


def _taken(root: Path, name: str) -> RunError:
    """The error for a name that a run has already."""
    return RunError(
        f'The run "{name}" already exists in "{root}". Choose another --name, or '
        f"continue it with --resume {name}."
    )
