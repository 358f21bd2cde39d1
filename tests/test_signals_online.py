"""Two named cost signals from the environment to the ledger, through every command between."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from safe_offrl import cli
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.record.ledger import parse_ledger
from safe_offrl.record.run import RunDir
from safe_offrl.spec import SafetySpec
from safe_offrl.types import Episode

ENV = "bad_environments:TwoSignals-v0"
SIGNALS = ["safety.signals.far=parts.distance", "safety.signals.same=cost"]
TINY = ["networks.actor_hidden=[8]", "networks.critic_hidden=[8]", "critic.hidden=[8,8]"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["safe-offrl", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


def test_an_online_run_has_the_sums_of_its_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFE_OFFRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parent / "check"), *sys.path])
    sizes = ["--transitions", "600", "learners.ppo.steps=0", "pilot_share=0.1"]
    run(monkeypatch, "collect", "--env", ENV, "--out", "log.hdf5", *sizes, *SIGNALS)
    steps = ["--steps", "6", "alignment_steps=2", "batch_size=16", *TINY]
    of_log = ["--env", ENV, "--dataset", "log.hdf5", "--name", "off"]
    run(monkeypatch, "pretrain", *of_log, *steps, *SIGNALS)
    budget = ["--budget", "120", "warmup_steps=40", "iteration_steps=40", "batch_size=16"]
    run(monkeypatch, "finetune", "off", "--name", "on", "--accept-risk", *budget)
    folder = RunDir(tmp_path / "runs" / "on").path
    lines = (folder / "ledger.jsonl").read_bytes()
    episodes = [json.loads(line) for line in lines.splitlines()]
    assert len(episodes) >= 4
    for episode in episodes:
        assert list(episode["signal_costs"]) == ["far", "same"]
        assert episode["signal_costs"]["same"] == episode["cost"]
        assert 0.0 < episode["signal_costs"]["far"] < 2.0 * episode["steps"]
    # So has an evaluation, though neither is limited.
    run(monkeypatch, "evaluate", "on", "--episodes", "3")
    evaluated = json.loads((folder / "evaluation.json").read_text())
    assert evaluated["signals"]["same"] == [
        evaluated["mean_cost"],
        evaluated["cost_standard_error"],
    ]
    assert list(evaluated["signals"]) == ["far", "same"]
    # What nobody sees the end of counts as the worst of the log.
    run(monkeypatch, "finetune", "off", "--name", "real", "--accept-risk", *budget, "env.kind=real")
    ledger = (tmp_path / "runs" / "real" / "ledger.jsonl").read_text().splitlines()
    reserved = [line for line in map(json.loads, ledger) if line["outcome"] == "reserved"]
    spec = SafetySpec(signals=dict(text[len("safety.signals.") :].split("=") for text in SIGNALS))
    worst = load_dataset("log.hdf5", discount=0.99, spec=spec).worst_signals
    assert len(reserved) >= 4
    assert all(line["signal_costs"] == pytest.approx(worst) for line in reserved)
    start = RunDir(folder)._chain_start
    read: list[Episode] = parse_ledger(lines, "ledger", start).episodes
    assert [dict(e.signal_costs) for e in read] == [e["signal_costs"] for e in episodes]
