"""One process at a time writes a run."""

from __future__ import annotations

import os
from pathlib import Path

import filelock

from safe_offrl.errors import RunError


class WriterLock:
    """The right to write into a run's folder, from here to :meth:`release`."""

    def __init__(self, folder: Path, run: str) -> None:
        """Take it; RunError at once, naming the holder and the ``run``, if another process has it.

        The holder's pid stands in writer.pid.
        """
        self._lock = filelock.FileLock(folder / ".lock")
        self._holder = folder / "writer.pid"
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            pid = self._holder.read_text().strip() if self._holder.is_file() else "unknown"
            raise RunError(
                f'The run "{run}" is being written by another process (pid {pid}). '
                "Wait until it ends, or end it, then try again."
            ) from error
        self._holder.write_text(f"{os.getpid()}\n")

    def release(self) -> None:
        """Give it back."""
        self._holder.unlink(missing_ok=True)
        self._lock.release()
