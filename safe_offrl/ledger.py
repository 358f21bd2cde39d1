"""The ledger: the record of accidents, one line an episode, CRC-protected and fsynced.

A line is the episode as a JSON object whose last key, "crc32", is the CRC-32 of the bytes before
it. Lines are numbered by the episode's index, and only ever appended. A crash can tear the last
line, which is then left out; damage anywhere else is an error, since a lost line could be a lost
accident.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

from safe_offrl.errors import RunError
from safe_offrl.files import write_file
from safe_offrl.types import Episode


def ledger_line(episode: Episode) -> bytes:
    """Serialise one episode; the CRC-32 of everything before it closes the line."""
    body = json.dumps(episode._asdict(), allow_nan=False, separators=(",", ":")).encode()[:-1]
    return body + f',"crc32":"{zlib.crc32(body):08x}"}}\n'.encode()


def _parse_line(line: bytes) -> Episode | None:
    """Parse one line without its newline; None if its CRC does not match."""
    body, _, tail = line.rpartition(b',"crc32":"')
    if tail != f'{zlib.crc32(body):08x}"}}'.encode():
        return None
    try:
        return Episode(**json.loads(body + b"}"))
    except (TypeError, ValueError):  # intact, but not an episode of this version
        return None


def parse_ledger(data: bytes, where: str) -> tuple[list[Episode], int]:
    """Read a ledger: its episodes, and how many bytes of ``data`` they cover.

    A last line without a newline is a torn write and is left out. Damage anywhere else raises
    RunError, in which ``where`` names the ledger.
    """
    episodes: list[Episode] = []
    used = 0
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        episode = _parse_line(line)
        if episode is None or episode.index != len(episodes):
            raise RunError(
                f"The ledger {where} is damaged in line {number} (checksum or numbering). "
                "Restore it from a backup; it is never repaired silently."
            )
        episodes.append(episode)
        used += len(line) + 1
    return episodes, used


def read_ledger(path: Path) -> list[Episode]:
    """Every episode in the file, in order; [] if there is none. Raises RunError if damaged."""
    return parse_ledger(path.read_bytes(), str(path))[0] if path.is_file() else []


def append_to_ledger(path: Path, episode: Episode) -> None:
    """Append one episode; it is on disk when this returns."""
    write_file(path, ledger_line(episode), append=True)


def reopen_ledger(path: Path, counted: int) -> list[Episode]:
    """Read the file's episodes and cut its torn last line off, so that it can be appended to.

    Raises RunError if fewer than the ``counted`` episodes of the run's checkpoint are left.
    """
    data = path.read_bytes() if path.is_file() else b""
    episodes, used = parse_ledger(data, str(path))
    if len(episodes) < counted:
        raise RunError(
            f'"{path}" has {len(episodes)} episodes, its checkpoint counted {counted}. '
            "Restore it from a backup."
        )
    if used < len(data):
        os.truncate(path, used)
    return episodes
