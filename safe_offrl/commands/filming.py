"""Accidents filmed while episodes are played: clips in ``videos/`` and in TensorBoard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safe_offrl.deploy.episodes import PlayedEpisode
from safe_offrl.files import write_atomic
from safe_offrl.record.final_policy import FinalPolicy
from safe_offrl.record.progress import Say
from safe_offrl.record.run import RunDir
from safe_offrl.report.videos import AccidentCamera, require_pictures
from safe_offrl.train.finetune import Finetuning
from safe_offrl.types import Batch, Episode, Layout

FOLDER = "videos"


@contextlib.contextmanager
def filming(run: RunDir, loop: Finetuning, say: Say) -> Iterator[Callable[[Episode], None]]:
    """What to call with each episode of an online phase: the first ``videos`` accidents are filmed.

    A clip is ``videos/episode-000123.gif`` and "accidents/episode-000123" in TensorBoard. An
    episode that is played again after a resume is shown again, since TensorBoard forgets what came
    after the checkpoint, but not filmed again.
    """
    # Films that are still wanted.
    accidents = loop.monitor.accidents  # They came before the checkpoint that this goes on from.
    if accidents >= loop.config.videos:
        yield lambda _: None
        return
    # Camera.
    folder = run.path / FOLDER
    env_id, safety = loop.env.env_id, loop.config.safety
    with contextlib.closing(AccidentCamera(env_id, safety, loop.normalizer, say)) as camera:

        def show(episode: Episode) -> None:
            nonlocal accidents
            accidents += episode.accident
            seen = episode.accident and episode.outcome == "complete"
            if not seen or accidents > loop.config.videos:
                return
            name = f"episode-{episode.index:06d}"
            path = folder / f"{name}.gif"
            if not path.is_file():
                # The last ones are those of this episode.
                buffer = loop.experience.buffer
                transitions = buffer.recent_transitions(episode.steps)
                handed_over = buffer.recent_hand_overs(episode.steps)
                _write(camera, episode, transitions, handed_over, path)
            if path.is_file():
                run.board.add_picture(
                    f"accidents/{name}", episode.total_steps, path.read_bytes(), _caption(episode)
                )

        yield show


@contextlib.contextmanager
def filming_evaluation(
    parent: Path, final: FinalPolicy, seed: int, most: int, say: Say
) -> Iterator[Callable[[Episode, PlayedEpisode], None] | None]:
    """What ``evaluate`` shows its episodes to: ``parent/videos/evaluate-SEED-000012.gif``."""
    if not most:
        yield None
        return
    policy, env = final.policy, final.env
    require_pictures(env)
    layout = Layout(policy.actor.observation_size, policy.actor.action_size)
    folder = parent / FOLDER
    filmed = 0
    camera = AccidentCamera(env.env_id, final.safety, policy.normalizer, say)
    with contextlib.closing(camera):

        def watch(episode: Episode, played: PlayedEpisode) -> None:
            nonlocal filmed
            if episode.accident and not played.fault and filmed < most:
                path = folder / f"evaluate-{seed}-{episode.index:06d}.gif"
                transitions = layout.unpack(played.rows)
                filmed += _write(camera, episode, transitions, played.handed_over, path)

        yield watch
    if filmed:
        say(f"videos      {filmed} of accidents in {folder}")


def _write(
    camera: AccidentCamera,
    episode: Episode,
    transitions: Batch,
    handed_over: Sequence[bool],
    path: Path,
) -> bool:
    """Film an episode's accident into a file; whether there is one."""
    clip = camera.clip(episode.seed, transitions, handed_over)
    if clip is None:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, clip)
    return True


def _caption(episode: Episode) -> str:
    return (
        f"The last two seconds before the first accident of episode {episode.index:,}, played by "
        f"policy version {episode.version} ({episode.phase}); the last frame is the accident."
    )
