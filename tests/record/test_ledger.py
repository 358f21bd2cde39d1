"""The ledger: a torn last line is left out, any other damage is an error, appends are durable."""

import binascii
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from safe_offrl import cli, commands
from safe_offrl.errors import RunError
from safe_offrl.record.ledger import LedgerWriter, ledger_line, parse_ledger, read_ledger
from safe_offrl.record.run import RunDir
from safe_offrl.types import Episode
from tests.conftest import ledger_lines
from tests.failing_disk import fail, watch


def episode(index: int, accident: bool = False, outcome: str = "complete") -> Episode:
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
        outcome=outcome,
    )


def reserved(index: int) -> Episode:
    return episode(index, accident=True, outcome="reserved")


def records(count: int) -> list[Episode]:
    """``count`` lines: episodes, and before every second one its reservation."""
    found: list[Episode] = []
    for index in range(count):
        found += [reserved(index)] * (index % 2) + [episode(index, index % 7 == 0)]
    return found[:count]


def rebuilt(body: bytes) -> bytes:
    """A line whose CRC-32 fits its content, by whoever does not know of the chain."""
    return body + b',"crc32":"%08x"}\n' % zlib.crc32(body)


def test_a_line_is_framed_by_its_crc_and_chained_to_the_line_before() -> None:
    first, head = ledger_line(episode(0), "start")
    second, _ = ledger_line(episode(1), head)
    # Derived by hand: CRC-32 (IEEE) over the bytes before the comma of "crc32".
    framed, tail = second[:-1].split(b',"crc32":')
    assert tail == b'"%08x"}' % binascii.crc32(framed)
    # And sha256 over the previous line's chain and the bytes before the comma of "chain".
    body, chain = framed.split(b',"chain":')
    assert Episode(**json.loads(body + b"}")) == episode(1)
    assert b"content" not in body  # only episodes of a frozen policy have one
    assert chain.decode() == f'"{hashlib.sha256(head.encode() + body).hexdigest()}"'
    ledger = parse_ledger(first + second, "x", "start")
    assert (ledger.episodes, ledger.used) == ([episode(0), episode(1)], len(first + second))
    assert (ledger.lines, ledger.chained) == (2, 2)
    with pytest.raises(RunError, match=r"line 1 \(chain; or the settings"):
        parse_ledger(first + second, "x", "another start")


def test_a_line_has_signals_only_where_there_are_any() -> None:
    plain, head = ledger_line(episode(0), "start")
    # The very bytes of earlier versions.
    body = json.dumps(
        {
            k: v
            for k, v in episode(0)._asdict().items()
            if k not in ("content", "signal_costs", "guarded_steps")
        },
        separators=(",", ":"),
    ).encode()[:-1]
    assert plain.startswith(body + b',"chain":')
    named = episode(1)._replace(signal_costs={"hazards": 2.5, "vases": 0.0})
    line, _ = ledger_line(named, head)
    assert b'"signal_costs":{"hazards":2.5,"vases":0.0},"chain"' in line
    assert parse_ledger(plain + line, "x", "start").episodes == [episode(0), named]


def test_a_line_has_guarded_steps_only_where_there_are_any() -> None:
    alone, head = ledger_line(episode(0), "start")
    assert b"guarded_steps" not in alone
    guarded = episode(1)._replace(guarded_steps=3)
    line, _ = ledger_line(guarded, head)
    assert b'"guarded_steps":3,"chain"' in line
    found = parse_ledger(alone + line, "x", "start").episodes
    assert found == [episode(0), guarded]
    assert [e.guarded_steps for e in found] == [0, 3]  # what says nothing of it had none


@pytest.mark.promise("R4")
def test_ledger_torn_at_every_byte() -> None:
    kept = records(50)
    lines = ledger_lines(kept)
    data = b"".join(lines)
    ends = [sum(map(len, lines[: i + 1])) for i in range(50)]
    for cut in range(len(data)):
        ledger = parse_ledger(data[:cut], "x")
        complete = sum(end <= cut for end in ends)
        assert ledger.lines == complete
        assert ledger.episodes == [e for e in kept[:complete] if e.outcome == "complete"]
        last = kept[complete - 1] if complete else None
        assert ledger.reserved == (last if last and last.outcome == "reserved" else None)
        assert ledger.used == (ends[complete - 1] if complete else 0)


@pytest.mark.promise("R4")
@pytest.mark.parametrize("bit", range(8))
def test_ledger_damage_at_every_byte_is_found(bit: int) -> None:
    data = b"".join(ledger_lines(records(4)))
    for position in range(len(data) - 1):
        damaged = bytearray(data)
        damaged[position] ^= 1 << bit
        with pytest.raises(RunError, match="damaged in line"):
            parse_ledger(bytes(damaged), "x")


@pytest.mark.promise("R4")
def test_dropped_swapped_repeated_and_rewritten_lines_are_found() -> None:
    lines = ledger_lines([episode(i) for i in range(50)])

    def refused(changed: list[bytes], line: int) -> None:
        with pytest.raises(RunError, match=rf"damaged in line {line} "):
            parse_ledger(b"".join(changed), "x")

    for i in range(49):
        refused(lines[:i] + lines[i + 1 :], i + 1)
        refused([*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]], i + 1)
        refused(lines[: i + 1] + lines[i:], i + 2)
        # An accident taken out, with a checksum and a numbering that fit: the chain finds it.
        framed = lines[i].split(b',"crc32":')[0]
        quiet = rebuilt(framed.replace(b'"episode_return":', b'"episode_return":1', 1))
        assert len(quiet) == len(lines[i]) + 1
        refused([*lines[:i], quiet, *lines[i + 1 :]], i + 1)
    # The same without its chain, as an earlier version wrote it, in the middle of chained lines.
    stripped = rebuilt(lines[7].split(b',"chain":')[0])
    refused([*lines[:7], stripped, *lines[8:]], 8)


def test_a_ledger_of_an_earlier_version_is_read_and_goes_on_chained(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    plain = []
    for index in range(3):  # an earlier version's lines: no outcome, no chain
        values = {k: v for k, v in episode(index)._asdict().items() if k != "outcome"}
        plain.append(rebuilt(json.dumps(values, separators=(",", ":")).encode()[:-1]))
    path.write_bytes(b"".join(plain))
    ledger = read_ledger(path, "start")
    assert ledger.episodes == [episode(i) for i in range(3)]
    assert (ledger.lines, ledger.chained) == (3, 0)
    LedgerWriter(path, "start").append(episode(3))
    ledger = read_ledger(path, "start")
    assert (len(ledger.episodes), ledger.lines, ledger.chained) == (4, 4, 1)
    # The new line's chain covers the old ones.
    other = rebuilt(plain[1].split(b',"crc32":')[0].replace(b'"cost":0.0', b'"cost":1.0'))
    path.write_bytes(b"".join([plain[0], other, *path.read_bytes().splitlines(True)[2:]]))
    with pytest.raises(RunError, match=r"line 4 \(chain\)"):
        read_ledger(path, "start")


def test_append_is_fsynced_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    path = tmp_path / "ledger.jsonl"
    writer = LedgerWriter(path)
    writer.append(episode(0))
    assert synced == [path.stat().st_size]
    writer.reserve(episode(1, accident=True))
    assert synced[1:] == [path.stat().st_size]
    writer.append(episode(1))
    assert read_ledger(path).episodes == [episode(0), episode(1)]


def test_a_line_that_need_not_be_durable_is_fsynced_by_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"
    durable = watch(monkeypatch)
    writer = LedgerWriter(path)
    writer.sync()  # there is nothing yet
    assert not path.exists()
    for index in range(2):
        writer.append(episode(index), sync=False)
        assert read_ledger(path).episodes[index] == episode(index)  # it survives a kill
    assert durable == {}
    writer.sync()
    assert durable == {path: path.stat().st_size}
    writer.append(episode(2), sync=False)
    writer.append(episode(3))  # one that must be takes those before it along
    assert durable == {path: path.stat().st_size}
    # A writer that was killed may have left lines that are not durable.
    LedgerWriter(path).append(episode(4), sync=False)
    durable.clear()
    LedgerWriter(path).sync()
    assert durable == {path: path.stat().st_size}


def test_nothing_follows_an_fsync_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LedgerWriter(tmp_path / "ledger.jsonl")
    writer.append(episode(0), sync=False)
    with monkeypatch.context() as patch:
        fail(patch, "fsync", "broken", lambda path, _: True)
        with pytest.raises(OSError, match=r"ledger\.jsonl"):
            writer.sync()
    # The pages that could not be written count as clean: a second fsync would say that all is well.
    for write in (writer.sync, lambda: writer.append(episode(1), sync=False)):
        with pytest.raises(RuntimeError, match="a write to this ledger failed"):
            write()


def test_reopening_cuts_the_torn_line_and_misses_no_episode(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    assert read_ledger(path).counted == LedgerWriter(path).episodes == []
    lines = ledger_lines([episode(0), episode(1), episode(2)])
    path.write_bytes(b"".join(lines)[:-20])
    assert read_ledger(path).episodes == [episode(0), episode(1)]
    with pytest.raises(RunError, match="has 2 episodes, its checkpoint counted 3"):
        LedgerWriter(path, counted=3)
    writer = LedgerWriter(path, counted=1)
    assert writer.episodes == [episode(0), episode(1)]
    assert path.read_bytes() == b"".join(lines[:2])
    writer.append(episode(2))
    assert path.read_bytes() == b"".join(lines)


# --- an episode that began, and nobody saw its end ---


def test_an_episode_without_its_end_counts_as_it_was_reserved(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    writer = LedgerWriter(path)
    writer.append(episode(0))
    writer.reserve(episode(1, accident=True))
    ledger = read_ledger(path)
    assert ledger.episodes == [episode(0)]
    assert ledger.counted == [episode(0), episode(1, accident=True, outcome="lost")]
    for _ in range(2):  # closed once, however often it is tried
        LedgerWriter(path).close_lost()
        assert read_ledger(path).episodes == ledger.counted
        assert read_ledger(path).lines == 3
    LedgerWriter(path).append(episode(2))
    assert read_ledger(path).episodes == [*ledger.counted, episode(2)]


def test_nothing_but_its_own_end_follows_a_reservation(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    writer = LedgerWriter(path)
    writer.reserve(episode(0, accident=True))
    wrong = [reserved(0), reserved(1), episode(1), episode(0)._replace(seed=7)]
    wrong.append(episode(0)._replace(steps=11))  # more than was reserved
    for record in wrong:
        with pytest.raises(RuntimeError, match="cannot follow"):
            writer.append(record)
        with pytest.raises(RunError, match=r"damaged in line 2 \(numbering\)"):
            parse_ledger(b"".join(ledger_lines([reserved(0), record])), "x")
    writer.append(episode(0)._replace(steps=9))
    assert [e.steps for e in read_ledger(path).episodes] == [9]


# --- the command ---


def test_the_command_prints_and_verifies(write_run: Callable[..., Path]) -> None:
    path = write_run("some", [False, True, False, False, True])
    said: list[str] = []
    result = commands.show_ledger(path, say=said.append)
    assert result["intact"]
    total = {"episodes": 5, "steps": 250, "accidents": 2, "unknown": 0, "cost": 2.0}
    assert result["total"] == total
    assert result["phases"] == [{"phase": "online", **total}]
    assert result["versions"] == [{"version": 0, **total}]
    assert "5 lines, checksums and hash chain intact" in said[0]
    assert "5 episodes, 250 steps, 2 with an accident\n" in said[0]

    ledger = path / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    result = commands.show_ledger(path, say=said.append)
    assert not result["intact"]
    assert "line 3" in result["problem"]
    assert said[-1].startswith("BROKEN")


def test_the_exit_code_says_whether_the_record_is_whole(
    write_run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_run("some", [False, True, False])
    monkeypatch.setattr(sys, "argv", ["safe-offrl", "ledger", str(path), "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out)["total"]["accidents"] == 1
    ledger = path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"accident":true', b'"accident":null'))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "line 2" in json.loads(capsys.readouterr().out)["problem"]


def test_the_command_shows_an_episode_without_an_end(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, kind="finetune", config_text="a: 1\n", name="real") as run:
        run.append_episode(episode(0))
        run.reserve_episode(episode(1, accident=True))
    said: list[str] = []
    result = commands.show_ledger(run.path, say=said.append)
    assert result["open"]
    assert result["total"]["episodes"] == 2
    assert result["total"]["accidents"] == result["total"]["unknown"] == 1
    assert "(1 of unknown outcome)" in said[0]
    assert "no end on record" in said[0]
    assert run.episodes()[1].outcome == "lost"


def test_the_command_finds_wrong_totals_and_missing_episodes(tmp_path: Path) -> None:
    with RunDir.create(tmp_path, kind="finetune", config_text="a: 1\n", name="a") as run:
        run.append_episode(episode(0))
        run.append_episode(episode(1)._replace(total_steps=30))
        run.save_checkpoint(30, {}, {})
    result = commands.show_ledger(run.path, say=lambda text: None)
    assert "states 30 steps in all, but the episodes sum to 20" in result["problem"]
    path = run.path / "ledger.jsonl"
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    result = commands.show_ledger(run.path, say=lambda text: None)
    assert "has 1 episodes, the newest checkpoint counted 2" in result["problem"]
