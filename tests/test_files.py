"""Files: replaced whole or left alone; JSON that any reader takes."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from safe_offrl.files import json_bytes, json_line, plain, replacing, write_atomic, write_file


def test_append_and_replace(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, b"one")
    write_file(path, b"two", append=True)
    assert path.read_bytes() == b"onetwo"
    write_atomic(path, b"three")
    assert path.read_bytes() == b"three"
    assert list(tmp_path.iterdir()) == [path]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:2]))
    write_file(tmp_path / "a", b"seven..")
    assert (tmp_path / "a").read_bytes() == b"seven.."


def test_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"before")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_written_takes_its_place_whole_or_not_at_all(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "a"

    def write(*, failing: bool) -> None:
        with replacing(target) as temporary:
            if kind == "folder":
                temporary.mkdir()
                temporary = temporary / "b"
            temporary.write_bytes(b"content")
            assert not target.exists()
            if failing:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(failing=True)
    assert not list(tmp_path.iterdir())
    write(failing=False)
    assert list(tmp_path.iterdir()) == [target]
    assert (target if kind == "file" else target / "b").read_bytes() == b"content"


class Point(NamedTuple):
    x: float


@dataclass(frozen=True)
class Holder:
    points: list[Point]
    other: dict[str, Any]


def test_plain_values() -> None:
    holder = Holder([Point(math.nan), Point(1.5)], {"a": np.float32(2.0), "b": np.arange(2)})
    expected = {"points": [{"x": None}, {"x": 1.5}], "other": {"a": 2.0, "b": [0, 1]}}
    assert plain(holder) == expected


def test_json() -> None:
    assert json_line({"b": math.inf, "a": 1}) == b'{"b":null,"a":1}\n'
    assert json_bytes({"b": 1, "a": 2}) == b'{\n "a": 2,\n "b": 1\n}\n'
    assert json.loads(json_bytes({"evidence": -math.inf})) == {"evidence": -math.inf}
