"""Checkpoints: what is saved is read back, and one damaged bit falls back to the one before."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from safe_offrl.errors import RunError
from safe_offrl.record.checkpoints import load_checkpoint, remove_unfinished, save_checkpoint
from tests.promises import Record

TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "rng": torch.tensor([1, 2], dtype=torch.uint8)}
COUNTS = {"metrics": 3, "iterations": 2, "ledger": 5}


def test_round_trip_and_three_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, TENSORS, {"step": step}, COUNTS)
    info = {"step": 40, "evidence": -math.inf}
    saved = save_checkpoint(tmp_path, 40, TENSORS, info, COUNTS)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step-000000020", "step-000000030", "step-000000040"]
    loaded = load_checkpoint(tmp_path, "a")
    assert loaded.step == 40
    assert loaded.info == {"step": 40, "evidence": -math.inf}
    assert loaded.counts == COUNTS
    assert loaded.sha256 == saved.sha256
    assert loaded.tensors.keys() == TENSORS.keys()
    for key, value in TENSORS.items():
        assert torch.equal(loaded.tensors[key], value)
        assert loaded.tensors[key].dtype == value.dtype


def test_identity_depends_on_the_content_alone(tmp_path: Path) -> None:
    one = save_checkpoint(tmp_path, 1, TENSORS, {"a": 1, "b": 2}, COUNTS)
    two = save_checkpoint(tmp_path, 1, dict(reversed(TENSORS.items())), {"b": 2, "a": 1}, COUNTS)
    changed = {**TENSORS, "w": TENSORS["w"] + 1e-6}
    three = save_checkpoint(tmp_path, 2, changed, {"a": 1, "b": 2}, COUNTS)
    assert one.sha256 == two.sha256 != three.sha256


def test_nothing_in_a_checkpoint_depends_on_the_clock(tmp_path: Path) -> None:
    folder = tmp_path / "step-000000010"
    save_checkpoint(tmp_path, 10, TENSORS, {"step": 10}, COUNTS)
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    save_checkpoint(tmp_path, 10, TENSORS, {"step": 10}, COUNTS)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == first
    assert set(json.loads(first["manifest.json"])) == {"step", "sha256", "counts", "crc32"}


def test_tensors_that_share_storage_are_saved(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    tensors = {"a": base, "b": base[1:3], "c": base.view(2, 2).T}
    save_checkpoint(tmp_path, 1, tensors, {}, COUNTS)
    loaded = load_checkpoint(tmp_path, "a").tensors
    assert loaded["b"].tolist() == [1.0, 2.0]
    assert loaded["c"].tolist() == [[0.0, 2.0], [1.0, 3.0]]


@pytest.mark.promise("R5")
@pytest.mark.parametrize("filename", ["state.safetensors", "info.json", "manifest.json"])
def test_damage_falls_back_then_refuses(tmp_path: Path, filename: str) -> None:
    save_checkpoint(tmp_path, 10, TENSORS, {"step": 10}, COUNTS)
    save_checkpoint(tmp_path, 20, TENSORS, {"step": 20}, COUNTS)
    target = tmp_path / "step-000000020" / filename
    whole = target.read_bytes()
    for position in range(0, len(whole), 7):  # single-bit flips
        flipped = bytearray(whole)
        flipped[position] ^= 1
        target.write_bytes(flipped)
        step = load_checkpoint(tmp_path, "a").step
        # A flipped bit of the manifest's white space may change nothing.
        assert step == 10 or (
            filename == "manifest.json" and whole[position : position + 1].isspace()
        )
    for cut in range(0, len(whole) - 1, 11):
        target.write_bytes(whole[:cut])
        assert load_checkpoint(tmp_path, "a").step == 10
    (tmp_path / "step-000000010" / filename).write_bytes(b"")
    with pytest.raises(RunError, match=r'No checkpoint of the run "a" is intact'):
        load_checkpoint(tmp_path, "a")


@pytest.mark.promise("R9")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_saved(tmp_path: Path, value: float) -> None:
    save_checkpoint(tmp_path, 1, TENSORS, {}, COUNTS)
    with pytest.raises(FloatingPointError, match='"w" is not finite at step 2'):
        save_checkpoint(tmp_path, 2, {**TENSORS, "w": torch.tensor([1.0, value])}, {}, COUNTS)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def test_a_discarded_future_is_removed(tmp_path: Path) -> None:
    for step in (10, 20, 30, 15):
        save_checkpoint(tmp_path, step, TENSORS, {}, COUNTS)
    assert load_checkpoint(tmp_path, "a").step == 15


@pytest.mark.promise("R5")
def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r'"a" has no checkpoint'):
        load_checkpoint(tmp_path, "a")


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 10, TENSORS, {}, COUNTS)
    for name in (".step-000000020.123.tmp", ".tmp-123"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000010"]


def found(
    folder: Path, rng: random.Random, damage: str, times: int, newest: str = "step-000000030"
) -> int:
    """How often of ``times`` a random damage of the newest checkpoint falls back to the one before.

    Damage of white space in manifest.json may change nothing; it is not drawn.
    """
    fell_back = 0
    for _ in range(times):
        path = folder / newest / rng.choice(["state.safetensors", "info.json", "manifest.json"])
        whole = path.read_bytes()
        if damage == "flip":
            written = [k for k in range(len(whole)) if not whole[k : k + 1].isspace()]
            position = rng.choice(written)
            changed = bytearray(whole)
            changed[position] ^= 1 << rng.randrange(8)
        else:
            changed = bytearray(whole[: rng.randrange(len(whole) - 1)])
        path.write_bytes(changed)
        fell_back += load_checkpoint(folder, "a").step == 20
        path.write_bytes(whole)
    assert load_checkpoint(folder, "a").step == 30
    return fell_back


@pytest.mark.promise("R5")
@pytest.mark.parametrize(
    "share", [0.1, pytest.param(1.0, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_random_flips_and_truncations_fall_back(
    tmp_path: Path, figure: Record, share: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {"w": torch.randn(64, 64, generator=generator), **TENSORS}
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, tensors, {"step": step, "recent": [0.5] * 50}, COUNTS)
    rng = random.Random(0)
    flips, cuts = round(200 * share), round(60 * share)
    flipped, cut = found(tmp_path, rng, "flip", flips), found(tmp_path, rng, "cut", cuts)
    figure("R5", f"{flipped}/{flips} bit flips and {cut}/{cuts} truncations fall back")
    assert (flipped, cut) == (flips, cuts)
    for step in (10, 20, 30):
        (tmp_path / f"step-{step:09d}" / "info.json").write_bytes(b"")
    with pytest.raises(RunError, match="is intact"):
        load_checkpoint(tmp_path, "a")
