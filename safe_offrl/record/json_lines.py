"""A file of one JSON object a line, which grows, and is cut where a run goes back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_offrl.errors import RunError
from safe_offrl.files import json_line, write_atomic, write_file


class JsonLines:
    """Such a file, and how many lines a run has written of it, as its checkpoint counts them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.count = 0

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line; it is on disk after :meth:`sync`."""
        write_file(self._path, json_line(values), append=True, sync=False)
        self.count += 1

    def read(self) -> list[dict[str, Any]]:
        """The lines, without a torn last one; RunError if another is damaged."""
        try:
            return [json.loads(line) for line in self._lines() if line.endswith(b"\n")]
        except ValueError as error:
            raise RunError(
                f'"{self._path}" is damaged ({error}). Restore it from a backup.'
            ) from error

    def sync(self) -> None:
        """Fsync what was written."""
        if self._path.is_file():
            write_file(self._path, b"", append=True)

    def cut(self, kept: int) -> None:
        """Keep the first ``kept`` lines, as many as a checkpoint counted; RunError if fewer are."""
        lines = self._lines()
        if len(lines) < kept:
            raise RunError(
                f'"{self._path}" has {len(lines)} lines, its checkpoint counted {kept}. '
                "Restore it from a backup."
            )
        if len(lines) > kept:
            write_atomic(self._path, b"".join(lines[:kept]))
        self.count = kept

    def _lines(self) -> list[bytes]:
        return self._path.read_bytes().splitlines(keepends=True) if self._path.is_file() else []
