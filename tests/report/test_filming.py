"""Accidents of a run on film: the first ones, each once, and a run that does not notice."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from safe_offrl import commands
from safe_offrl.errors import ConfigError
from safe_offrl.record.run import RunDir
from safe_offrl.report.videos import AccidentCamera
from tests.accident_line import DrawnLine, pretrained_on_a_line, silent

ONLINE = ["warmup_steps=60", "iteration_steps=60", "batch_size=32", "update_every=5"]
BUDGET = 500
CLIPS = 3


class Killed(Exception):
    """Stands for a kill at a chosen moment: nothing after it is executed."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pretrained(root: Path) -> RunDir:
    return pretrained_on_a_line(root)


def plan(pretrained: RunDir, videos: int | None) -> commands.FinetunePlan:
    config = commands.finetune_config(pretrained, budget=BUDGET, videos=videos, overrides=ONLINE)
    return commands.plan_finetune(pretrained, config, accept_risk=True)


@pytest.fixture(scope="module")
def unfilmed(root: Path, pretrained: RunDir) -> RunDir:
    run = commands.finetune_run(plan(pretrained, None), name="unfilmed", runs=root, say=silent)
    assert sum(e.accident for e in run.episodes()) > CLIPS
    return run


@pytest.fixture(scope="module")
def filmed(root: Path, pretrained: RunDir) -> RunDir:
    return commands.finetune_run(plan(pretrained, CLIPS), name="filmed", runs=root, say=silent)


def record(run: RunDir) -> dict[str, object]:
    """Everything that filming must not change."""
    names = ("metrics.jsonl", "iterations.jsonl")
    checkpoint = run.load_checkpoint()
    files: dict[str, object] = {n: (run.path / n).read_bytes() for n in names}
    # Not the ledger's bytes: its chain begins at the settings, of which the videos are one.
    return {
        **files,
        "episodes": run.episodes(),
        "step": checkpoint.step,
        "sha256": checkpoint.sha256,
    }


def first_accidents(run: RunDir) -> dict[str, int]:
    """What is to be filmed: the name of each clip, and the steps charged by then."""
    accidents = [e for e in run.episodes() if e.accident][:CLIPS]
    return {f"episode-{e.index:06d}": e.total_steps for e in accidents}


def pictures(run: RunDir, prefix: str) -> dict[str, list[Any]]:
    """TensorBoard's image events, as it shows them after a restart: {tag: events}."""
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(run.path)).Reload()
    tags = [tag for tag in events.Tags()["images"] if tag.startswith(prefix)]
    return {tag.removeprefix(prefix): events.Images(tag) for tag in tags}


def test_a_filmed_run_is_bitwise_the_run_without(filmed: RunDir, unfilmed: RunDir) -> None:
    assert record(filmed) == record(unfilmed)
    assert not (unfilmed.path / "videos").exists()


def test_the_first_accidents_are_shown_at_their_steps(filmed: RunDir) -> None:
    wanted = first_accidents(filmed)
    files = sorted((filmed.path / "videos").iterdir())
    assert [f.name for f in files] == [f"{name}.gif" for name in wanted]
    shown = pictures(filmed, "accidents/")
    assert {name: [e.step for e in events] for name, events in shown.items()} == {
        name: [step] for name, step in wanted.items()
    }
    for path in files:
        (event,) = shown[path.stem]
        assert event.encoded_image_string == path.read_bytes()
        assert (event.width, event.height) == (70, 20)


@pytest.mark.parametrize(
    ("checkpoint_seconds", "accident", "clips_before"),
    # From the start, since there was no checkpoint; and from the middle, where all was filmed.
    [(1e9, 2, 2), (0.0, 20, CLIPS)],
    ids=["replayed", "gone on"],
)
def test_a_resumed_run_films_each_accident_once(
    root: Path,
    pretrained: RunDir,
    filmed: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint_seconds: float,
    accident: int,
    clips_before: int,
) -> None:
    """Killed right after an accident of the run (the first is 1), then resumed."""
    clips: list[int] = []
    original = AccidentCamera.clip

    def counting(self: AccidentCamera, seed: int, *episode: Any) -> bytes | None:
        clips.append(seed)
        return original(self, seed, *episode)

    monkeypatch.setattr(AccidentCamera, "clip", counting)
    last = [e.index for e in filmed.episodes() if e.accident][accident - 1]
    append = RunDir.append_episode

    def killed_after_it(self: RunDir, episode: Any, **named: bool) -> None:
        if episode.index > last:
            raise Killed
        append(self, episode, **named)

    name = f"cut-after-{accident}"
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "append_episode", killed_after_it)
        with pytest.raises(Killed):
            commands.finetune_run(
                plan(pretrained, CLIPS),
                name=name,
                runs=root,
                checkpoint_seconds=checkpoint_seconds,
                say=silent,
            )
    assert len(clips) == clips_before
    again = commands.resume_finetune(name, runs=root, say=silent)
    assert len(clips) == CLIPS
    assert record(again) == record(filmed)
    made = {path.name: path.read_bytes() for path in (again.path / "videos").iterdir()}
    wanted = {f"{clip}.gif" for clip in first_accidents(filmed)}
    assert made == {name: (filmed.path / "videos" / name).read_bytes() for name in wanted}
    shown = pictures(again, "accidents/")
    assert {name: [e.step for e in events] for name, events in shown.items()} == {
        name: [step] for name, step in first_accidents(filmed).items()
    }


def test_a_camera_that_breaks_does_not_break_the_run(
    root: Path, pretrained: RunDir, unfilmed: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def broken(self: DrawnLine) -> None:
        raise RuntimeError("no OpenGL here")

    monkeypatch.setattr(DrawnLine, "render", broken)
    run = commands.finetune_run(plan(pretrained, CLIPS), name="dark", runs=root, say=said.append)
    assert record(run) == record(unfilmed)
    warnings = [line for line in said if line.startswith("warning")]
    assert warnings == ["warning: no videos of accidents: no OpenGL here."]
    assert not (run.path / "videos").exists()


def test_videos_that_cannot_be_made_are_refused_before_the_run(
    root: Path, pretrained: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="videos is -1"):
        plan(pretrained, -1)
    monkeypatch.setattr(DrawnLine, "metadata", {"render_modes": []})
    with pytest.raises(ConfigError, match="cannot draw itself"):
        plan(pretrained, CLIPS)
    with pytest.raises(ConfigError, match="cannot draw itself"):
        commands.evaluate_run("offline", episodes=1, videos=1, runs=root, say=silent)
    assert not (pretrained.path / "evaluation.json").exists()


def test_the_accidents_of_an_evaluation(root: Path, filmed: RunDir) -> None:
    said: list[str] = []
    bare = commands.evaluate_run("filmed", episodes=30, seed=5, runs=root, say=said.append)
    before = sorted((filmed.path / "videos").iterdir())
    result = commands.evaluate_run(
        "filmed", episodes=30, seed=5, videos=2, runs=root, say=said.append
    )
    assert result == bare
    assert result["accidents"] > 2
    added = sorted(set((filmed.path / "videos").iterdir()) - set(before))
    assert len(added) == 2
    assert all(path.name.startswith("evaluate-5-0000") for path in added)
    assert any(line.startswith("videos      2 of accidents") for line in said)


def test_both_phases_leave_a_calibration_figure(pretrained: RunDir, filmed: RunDir) -> None:
    (event,) = pictures(pretrained, "calibration/")["safety_critic"]
    assert event.step == 30 + 10 + 30  # the agent, the alignment, the fallback
    assert event.encoded_image_string == (pretrained.path / "calibration.png").read_bytes()
    assert event.encoded_image_string.startswith(b"\x89PNG")
    (event,) = pictures(filmed, "calibration/")["online"]
    assert event.step == filmed.episodes()[-1].total_steps
    assert event.encoded_image_string == (filmed.path / "calibration.png").read_bytes()
