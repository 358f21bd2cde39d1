"""The ledger: the record of accidents, one line an episode, hash-chained and CRC-framed.

A line is a JSON object. Its key "chain" is the sha256 of the chain of the line before it and of
this line's own content, so a line that was changed, dropped, swapped or repeated breaks every line
after it; the first line is chained to the run's settings. The last key, "crc32", is the CRC-32 of
the bytes before it. Lines are numbered by the episode's index, and only ever appended.

Where lost episodes cannot be replayed, a line with the outcome "reserved" comes BEFORE an episode's
first step, with the most that it can take. Until the line of its end follows, the episode counts as
lost: as many steps as were reserved, and an accident.

A line is fsynced before anything goes on, unless its episode can be played again: then it is only
written, which survives the end of the process but not of the machine, and fsynced before anything
counts it. A crash can tear the last line, which is then left out; damage anywhere else is an error,
since a lost line could be a lost accident. The hashes find what was changed; they are no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from safe_offrl.errors import RunError
from safe_offrl.files import write_file
from safe_offrl.types import Episode

# What a line has only where there is something to say.
_WHERE_ANY = ("content", "signal_costs", "guarded_steps")


class Ledger(NamedTuple):
    """What a ledger holds."""

    episodes: list[Episode]  # those whose end is on record
    reserved: Episode | None  # the episode that began and did not end: lost, if nobody is writing
    lines: int
    chained: int  # lines that state their chain; an earlier version's do not
    head: str  # the chain of the last line
    used: int  # bytes; what comes after them is a torn line

    @property
    def counted(self) -> list[Episode]:
        """Every episode that began; one without an end counts as lost."""
        return self.episodes if self.reserved is None else [*self.episodes, lost(self.reserved)]


def lost(reserved: Episode) -> Episode:
    """The episode that a reservation becomes if its end is never known."""
    return reserved._replace(outcome="lost")


def chain_start(identity: bytes) -> str:
    """What the first line is chained to: the hash of the settings that a ledger belongs to."""
    return hashlib.sha256(identity).hexdigest()


def ledger_line(episode: Episode, previous: str) -> tuple[bytes, str]:
    """Serialise one episode after the chain ``previous``; returns the line and its own chain."""
    content = {k: v for k, v in episode._asdict().items() if k not in _WHERE_ANY or v}
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()[:-1]
    chain = _link(previous, body)
    framed = body + f',"chain":"{chain}"'.encode()
    return framed + f',"crc32":"{zlib.crc32(framed):08x}"}}\n'.encode(), chain


def _link(previous: str, body: bytes) -> str:
    return hashlib.sha256(previous.encode() + body).hexdigest()


def _parse_line(line: bytes, previous: str) -> tuple[Episode, str, bool]:
    """(episode, chain, whether the line states it) of a line without its newline, or ValueError."""
    framed, _, tail = line.rpartition(b',"crc32":"')
    if tail != f'{zlib.crc32(framed):08x}"}}'.encode():
        raise ValueError("checksum")
    body, stated, chain = framed.rpartition(b',"chain":"')
    if not stated:  # It is older than the chain; a later line's chain covers it.
        body = framed
    expected = _link(previous, body)
    if stated and chain != f'{expected}"'.encode():
        raise ValueError("chain")
    try:
        return Episode(**json.loads(body + b"}")), expected, bool(stated)
    except (TypeError, ValueError) as error:  # It is intact, but no episode of this version.
        raise ValueError("content") from error


def parse_ledger(data: bytes, where: str, start: str = "") -> Ledger:
    """Read a ledger that is chained to ``start``; a last line without a newline is left out.

    Damage anywhere else raises RunError, in which ``where`` names the ledger.
    """
    # What has been read.
    episodes: list[Episode] = []
    reserved: Episode | None = None
    lines = chained = used = 0
    head = start
    for line in data.split(b"\n")[:-1]:
        lines += 1
        # A line that follows the one before it.
        try:
            episode, head, stated = _parse_line(line, head)
            if episode.index != len(episodes) or (reserved and not _closes(episode, reserved)):
                raise ValueError("numbering")
            if chained and not stated:
                raise ValueError("chain")
        except ValueError as error:
            what = str(error)
            if lines == 1 and what == "chain":
                what += "; or the settings that it begins at were changed"
            raise RunError(
                f"The ledger {where} is damaged in line {lines} ({what}). "
                "Restore it from a backup; it is never repaired silently."
            ) from error
        # Its episode.
        if episode.outcome == "reserved":
            reserved = episode
        else:
            episodes.append(episode)
            reserved = None
        chained += stated
        used += len(line) + 1
    return Ledger(episodes, reserved, lines, chained, head, used)


def _closes(episode: Episode, reserved: Episode) -> bool:
    """Whether an episode is the one that was reserved, and took no more than that."""
    return (
        episode.outcome != "reserved"
        and episode.seed == reserved.seed
        and episode.steps <= reserved.steps
    )


def read_ledger(path: Path, start: str = "") -> Ledger:
    """Read a ledger file; it is empty if there is none. Raises RunError if it is damaged."""
    return parse_ledger(path.read_bytes() if path.is_file() else b"", f'"{path}"', start)


class LedgerWriter:
    """Appends to one ledger; each line is on disk when the call returns, unless told otherwise."""

    def __init__(self, path: Path, start: str = "", counted: int = 0) -> None:
        """Read what is there and cut a torn last line off.

        Raises RunError if fewer than the ``counted`` episodes of the run's checkpoint are left.
        """
        ledger = read_ledger(path, start)
        if len(ledger.episodes) < counted:
            raise RunError(
                f'"{path}" has {len(ledger.episodes)} episodes, its checkpoint counted {counted}. '
                "Restore it from a backup."
            )
        if path.is_file() and ledger.used < path.stat().st_size:
            os.truncate(path, ledger.used)
        self.path = path
        self.episodes = ledger.episodes
        self.reserved = ledger.reserved
        self._head = ledger.head
        self._failed = False
        self._synced = not path.is_file()  # Its writer may have been killed before its fsync.

    def append(self, episode: Episode, *, sync: bool = True) -> None:
        """Write how an episode ended; without ``sync`` it is durable after :meth:`sync` only."""
        self._write(episode, sync=sync)
        self.episodes.append(episode)
        self.reserved = None

    def reserve(self, worst: Episode) -> None:
        """Write, before its first step, the most that the next episode can take and cost."""
        self._write(worst._replace(outcome="reserved"), sync=True)
        self.reserved = worst

    def close_lost(self) -> None:
        """Close an episode that began and whose end nobody saw: it counts as it was reserved."""
        if self.reserved is not None:
            self.append(lost(self.reserved))

    def require_same(self, episode: Episode) -> None:
        """Raise RunError if an episode that is on record came out otherwise when replayed."""
        index = episode.index
        if self.episodes[index] != episode:
            raise RunError(
                f"Episode {index} came out differently when replayed: the ledger has "
                f"{self.episodes[index]}, now it is {episode}. Resume with the versions and "
                "threads in versions.json and a deterministic environment."
            )

    def sync(self) -> None:
        """Make every line durable: before a checkpoint or a status counts it."""
        self._require_sound()
        if not self._synced:
            self._to_disk(b"", sync=True)

    def _write(self, episode: Episode, *, sync: bool) -> None:
        if episode.index != len(self.episodes) or (
            self.reserved and not _closes(episode, self.reserved)
        ):
            raise RuntimeError(f"{episode} cannot follow {len(self.episodes)} episodes")
        self._require_sound()
        line, head = ledger_line(episode, self._head)
        self._to_disk(line, sync=sync)
        self._head = head

    def _require_sound(self) -> None:
        if self._failed:  # Half a line may be there, and a failed fsync cannot be made good.
            raise RuntimeError("a write to this ledger failed; read it anew before another one")

    def _to_disk(self, data: bytes, *, sync: bool) -> None:
        self._failed = True
        write_file(self.path, data, append=True, sync=sync)
        self._failed, self._synced = False, sync
