"""The ledger: a torn last line is left out, any other damage is an error, appends are durable."""

import binascii
import os
from pathlib import Path

import pytest

from safe_offrl.errors import RunError
from safe_offrl.ledger import (
    append_to_ledger,
    ledger_line,
    parse_ledger,
    read_ledger,
    reopen_ledger,
)
from safe_offrl.types import Episode


def episode(index: int, accident: bool = False) -> Episode:
    return Episode(
        index=index,
        seed=1000 + index,
        steps=10,
        total_steps=10 * (index + 1),
        episode_return=0.1 * index,
        cost=float(accident),
        accident=accident,
        accident_steps=int(accident),
        version=0,
        phase="warmup",
        shield_interventions=0,
    )


def test_ledger_line_is_crc_protected() -> None:
    line = ledger_line(episode(0))
    # Derived by hand: CRC-32 (IEEE) over the bytes before the comma of "crc32".
    body, tail = line[:-1].split(b',"crc32":')
    assert tail == b'"%08x"}' % binascii.crc32(body)
    assert parse_ledger(line, "x") == ([episode(0)], len(line))


def test_ledger_torn_at_every_byte() -> None:
    records = [episode(i, i % 7 == 0) for i in range(50)]
    lines = [ledger_line(r) for r in records]
    data = b"".join(lines)
    ends = [sum(map(len, lines[: i + 1])) for i in range(50)]
    for cut in range(len(data)):
        got, used = parse_ledger(data[:cut], "x")
        complete = sum(end <= cut for end in ends)
        assert got == records[:complete]
        assert used == (ends[complete - 1] if complete else 0)


def test_ledger_damage_at_every_byte_is_found() -> None:
    records = [episode(i) for i in range(4)]
    data = b"".join(ledger_line(r) for r in records)
    for position in range(len(data) - 1):
        damaged = bytearray(data)
        damaged[position] ^= 0x20 if damaged[position] != ord("\n") else 0x01
        with pytest.raises(RunError, match="damaged in line"):
            parse_ledger(bytes(damaged), "x")


def test_ledger_missing_line_is_found() -> None:
    with pytest.raises(RunError, match="line 2"):
        parse_ledger(ledger_line(episode(0)) + ledger_line(episode(2)), "x")


def test_append_is_fsynced_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    path = tmp_path / "ledger.jsonl"
    append_to_ledger(path, episode(0))
    assert synced == [len(ledger_line(episode(0)))]
    append_to_ledger(path, episode(1, accident=True))
    assert read_ledger(path) == [episode(0), episode(1, accident=True)]


def test_reopening_cuts_the_torn_line_and_misses_no_episode(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert read_ledger(path) == reopen_ledger(path, 0) == []
    whole = ledger_line(episode(0)) + ledger_line(episode(1))
    path.write_bytes(whole + ledger_line(episode(2))[:-20])
    assert read_ledger(path) == [episode(0), episode(1)]
    with pytest.raises(RunError, match="has 2 episodes, its checkpoint counted 3"):
        reopen_ledger(path, 3)
    assert reopen_ledger(path, 1) == [episode(0), episode(1)]
    assert path.read_bytes() == whole
