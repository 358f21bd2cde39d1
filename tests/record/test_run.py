"""The run folder: what is written is read back, and damage is found, never papered over."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from safe_offrl.errors import RunError
from safe_offrl.record.find_run import find_run
from safe_offrl.record.run import RunDir
from safe_offrl.record.tensorboard import Board
from safe_offrl.record.versions import versions
from safe_offrl.types import Episode
from tests.conftest import ledger_lines
from tests.promises import Record


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


def make(root: Path, **arguments: Any) -> RunDir:
    kind = arguments.pop("kind", "finetune")
    return RunDir.create(root, kind=kind, config_text="budget: 1\n", versions={}, **arguments)


TENSORS = {"w": torch.arange(6.0).reshape(2, 3), "rng": torch.tensor([1, 2], dtype=torch.uint8)}


# --- the record ---


def test_an_episode_is_on_disk_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    with make(tmp_path) as run:
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
        run.append_episode(episode(0))
        assert synced == [len(ledger_lines([episode(0)], "x" * 64)[0])]
        assert run.episodes() == [episode(0)]


# --- resume ---


def test_rewind_cuts_metrics_and_verifies_the_replay(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.append_episode(episode(0))
        run.log(10, {"online/return": 1.0})
        run.log_iteration({"index": 0, "reason": "accepted"})
        run.save_checkpoint(10, TENSORS, {"step": 10})
        run.append_episode(episode(1))
        run.log(20, {"online/return": 2.0})
        run.log_iteration({"index": 1, "reason": "kl"})
    with (run.path / "ledger.jsonl").open("ab") as file:
        file.write(ledger_lines([episode(2)])[0][:-20])  # killed in mid-write
    again = RunDir(run.path)
    again.lock()
    with again:
        again.rewind(again.load_checkpoint())
        assert again.metrics() == [{"step": 10, "online/return": 1.0}]
        assert again.iterations() == [{"index": 0, "reason": "accepted"}]
        with pytest.raises(RunError, match="came out differently"):
            again.append_episode(episode(1, accident=True))
        again.append_episode(episode(1))  # replayed: compared, not written again
        again.append_episode(episode(2))
    assert RunDir(run.path).episodes() == [episode(0), episode(1), episode(2)]


def test_rewind_refuses_lost_records(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        run.append_episode(episode(0))
        run.log(10, {"online/return": 1.0})
        checkpoint = run.save_checkpoint(10, TENSORS, {})
        (run.path / "ledger.jsonl").write_bytes(b"")
        with pytest.raises(RunError, match="its checkpoint counted 1"):
            run.rewind(checkpoint)
        (run.path / "metrics.jsonl").write_bytes(b"")
        with pytest.raises(RunError, match="0 lines, its checkpoint counted 1"):
            run.rewind(checkpoint)


def test_a_ledger_cut_short_or_of_other_settings_is_found(tmp_path: Path) -> None:
    with make(tmp_path) as run:
        for index in range(3):
            run.append_episode(episode(index))
        run.set_status("finished")
    path = run.path / "ledger.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    with pytest.raises(RunError, match=r"has 2 episodes, run\.json counted 3"):
        run.episodes()
    path.write_bytes(whole)
    assert len(run.episodes()) == 3
    (run.path / "config.yaml").write_text("budget: 2\n")  # not what this ledger is chained to
    with pytest.raises(RunError, match=r"damaged in line 1 \(chain; or the settings"):
        run.episodes()


# --- one writer, names, finding ---


HOLDS = """
import sys
from pathlib import Path
from safe_offrl.record.run import RunDir
run = RunDir(Path(sys.argv[1]))
run.lock()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.promise("R12")
def test_a_second_writer_fails_at_once_and_a_killed_one_holds_nothing(
    tmp_path: Path, figure: Record
) -> None:
    run = make(tmp_path, name="busy")
    run.close()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        begin = time.monotonic()
        with pytest.raises(RunError, match=rf"another process \(pid {holder.pid}\)"):
            RunDir(run.path).lock()
        seconds = time.monotonic() - begin
        holder.kill()
    assert seconds < 1.0
    figure("R12", f"refused after {seconds:.3f} s, free after kill -9")
    with RunDir(run.path) as again:
        again.lock()
        with pytest.raises(RunError, match=f"pid {os.getpid()}"):
            RunDir(run.path).lock()  # nor twice in one process


def test_writing_needs_the_lock(tmp_path: Path) -> None:
    make(tmp_path, name="a").close()
    with pytest.raises(RuntimeError, match="lock"):
        RunDir(tmp_path / "a").append_episode(episode(0))


def test_names(tmp_path: Path) -> None:
    for bad in ("", "..", ".", "a/b", "a b", "x" * 65, "é", "a\n"):
        with pytest.raises(RunError, match="cannot name a run"):
            make(tmp_path, name=bad)
    make(tmp_path, name="one").close()
    with pytest.raises(RunError, match="already exists"):
        make(tmp_path, name="one")
    for k in (1, 2):
        with make(tmp_path, stem="finetune-my.module:Env-v0-iql") as run:
            assert run.name == f"finetune-my.module-Env-v0-iql-{k}"


def test_files_exist_before_step_0(tmp_path: Path) -> None:
    with RunDir.create(
        tmp_path, kind="pretrain", config_text="steps: 1\n", versions=versions()
    ) as run:
        assert run.config_text == "steps: 1\n"
        assert run.state["status"] == "running"
        assert run.read_json("versions.json")["packages"]["torch"] == str(torch.__version__)


def test_find_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished pretrain run"):
        find_run(None, tmp_path, "pretrain")
    for name, kind, status in [
        ("p1", "pretrain", "finished"),
        ("p2", "pretrain", "finished"),
        ("p3", "pretrain", "interrupted"),
        ("f1", "finetune", "finished"),
    ]:
        with make(tmp_path, name=name, kind=kind) as run:
            run.set_status(status)
    assert find_run(None, tmp_path, "pretrain").name == "p2"
    assert find_run("p1", tmp_path, "pretrain").name == "p1"
    assert find_run(str(tmp_path / "p1"), Path("elsewhere")).name == "p1"
    with make(tmp_path / "ours", name="0") as seed:  # "0" says nothing in a certificate or a table
        assert seed.name == "ours/0"
    with pytest.raises(RunError, match="is a finetune run"):
        find_run("f1", tmp_path, "pretrain")
    with pytest.raises(RunError, match="is not a run folder"):
        find_run("nothing", tmp_path)


# --- TensorBoard ---


def test_tensorboard_shows_metrics_and_layout_and_purges(tmp_path: Path) -> None:
    accumulator = importlib.import_module(  # it has no type stubs
        "tensorboard.backend.event_processing.event_accumulator"
    )

    with make(tmp_path, name="tb") as run:
        run.log(10, {"safety/accident_rate": 0.25, "trust/kl": math.nan})
        run.save_checkpoint(10, TENSORS, {})
        run.log(20, {"safety/accident_rate": 0.5})
    with RunDir(tmp_path / "tb") as run:
        run.lock()
        run.rewind(run.load_checkpoint())
        run.log(20, {"safety/accident_rate": 0.75})
    assert run.metrics()[0] == {"step": 10, "safety/accident_rate": 0.25, "trust/kl": None}
    line = b'{"step":10,"safety/accident_rate":0.25,"trust/kl":null}\n'
    assert (run.path / "metrics.jsonl").read_bytes().startswith(line)
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    assert events.Tags()["scalars"] == ["safety/accident_rate"]
    scalars = [(e.step, e.value) for e in events.Scalars("safety/accident_rate")]
    assert scalars == [(10, 0.25), (20, 0.75)]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_the_events_of_a_resume_come_after_those_before_it(tmp_path: Path) -> None:
    """Files of one second are ordered by their process number, as text."""
    before = tmp_path / f"events.out.tfevents.{int(time.time())}.zz.99999999.9"
    before.touch()
    Board(tmp_path, 0).close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2
    assert names[0] == before.name


def test_the_clock_may_have_been_set_back(tmp_path: Path) -> None:
    (tmp_path / f"events.out.tfevents.{int(time.time()) + 10_000}.zz.1.0").touch()
    begun = time.monotonic()
    Board(tmp_path, 0).close()
    assert time.monotonic() - begun < 30.0


def test_tensorboard_holds_settings_against_what_they_led_to(tmp_path: Path) -> None:
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    plugin_data = importlib.import_module("tensorboard.plugins.hparams.plugin_data_pb2")
    settings = {"seed": 3, "kl": True, "limit": None, "safety": {"epsilon": 0.1, "rule": "cost"}}
    with make(tmp_path, name="tb") as run:
        run.board.describe(settings, ["safety/accident_rate", "online/return"])
        run.log(20, {"safety/accident_rate": 0.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    stored = {
        tag: plugin_data.HParamsPluginData.FromString(content)
        for tag, content in events.PluginTagToContent("hparams").items()
    }
    values = stored["_hparams_/session_start_info"].session_start_info.hparams
    assert sorted(values) == ["kl", "limit", "safety.epsilon", "safety.rule", "seed"]
    assert values["seed"].number_value == 3.0
    assert values["kl"].string_value == "True"
    assert values["limit"].string_value == "None"
    metrics = stored["_hparams_/experiment"].experiment.metric_infos
    assert [m.name.tag for m in metrics] == ["safety/accident_rate", "online/return"]
    # One event file, in the run's own folder: no sub-run that is named by the time.
    assert [p.parent for p in tmp_path.rglob("events.*")] == [tmp_path / "tb"]
