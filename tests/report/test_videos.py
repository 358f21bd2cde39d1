"""Clips of accidents: which frames they hold, how long they last, and that nothing can break."""

from __future__ import annotations

import io
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from PIL import Image

from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.make import make_env
from safe_offrl.errors import ConfigError, EnvError
from safe_offrl.report.videos import (
    CLIP_BYTES,
    HOLD_MS,
    ORANGE,
    AccidentCamera,
    as_gif,
    film,
    frame_steps,
    require_pictures,
)
from safe_offrl.spec import SafetySpec
from safe_offrl.types import Batch, Normalizer

FPS = 4


class Counting(gymnasium.Env[Any, Any]):
    """Counts its steps; its picture is as bright as the count. Actions sum to the accident at 1."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012
    observation_space = spaces.Box(-9.0, 99.0, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    rendered = 0  # by all instances

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count, self.sum = 0, float(self.np_random.uniform(-0.01, 0.01))
        return self.observe(), {"cost": 0.0}

    def step(self, action: NDArray[np.float32]) -> Any:
        self.count += 1
        self.sum += float(action[0])
        return self.observe(), 0.0, False, False, {"cost": float(self.sum > 0.95)}

    def observe(self) -> NDArray[np.float32]:
        return np.array([self.count, self.sum], dtype=np.float32)

    def render(self) -> Any:
        type(self).rendered += 1
        return np.full((40, 60, 3), 5 * self.count, dtype=np.uint8)


class Fast(Counting):
    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 125}  # noqa: RUF012


class Blank(Counting):
    def render(self) -> Any:
        return None


class BreaksLater(Counting):
    def render(self) -> Any:
        if self.count > 3:
            raise RuntimeError("the graphics card is gone")
        return super().render()


class Forgetful(Counting):
    """Does not begin anew: the next episode starts where the last one stopped."""

    drift = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        Forgetful.drift += 0.01
        self.sum += Forgetful.drift
        return self.observe(), {"cost": 0.0}


for _class in (Counting, Fast, Blank, BreaksLater, Forgetful):
    gymnasium.register(
        f"Videos{_class.__name__}-v0", f"{__name__}:{_class.__name__}", max_episode_steps=200
    )

NORMALIZER = Normalizer(np.full(2, 0.5, np.float32), np.full(2, 2.0, np.float32))


def drawing(name: str) -> AccidentEnv:
    return make_env(f"Videos{name}-v0", SafetySpec(), render_mode="rgb_array")


def played(name: str, seed: int, accident_step: int, steps: int) -> Batch:
    """The transitions of an episode as the buffer holds them: the accident in that step, first."""
    env = make_env(f"Videos{name}-v0", SafetySpec())
    env.reset(seed=seed)
    actions = torch.zeros(steps, 1)
    actions[accident_step - 1] = 1.0
    following, accidents = [], []
    for action in actions.numpy():
        observation, *_, info = env.step(action)
        following.append(NORMALIZER(observation))
        accidents.append(float(info["accident"]))
    zeros = torch.zeros(steps)
    return Batch(
        observations=torch.zeros(steps, 2),
        actions=actions,
        rewards=zeros,
        accidents=torch.tensor(accidents),
        costs=zeros,
        next_observations=torch.from_numpy(np.stack(following)),
        terminated=zeros,
        time_to_go=zeros,
        return_to_go=zeros,
    )


def decoded(gif: bytes) -> tuple[list[NDArray[np.uint8]], list[int]]:
    """The frames of a GIF, and how long each is shown in milliseconds."""
    frames, durations = [], []
    with Image.open(io.BytesIO(gif)) as image:
        assert image.format == "GIF"
        for k in range(getattr(image, "n_frames", 1)):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB")))
            durations.append(int(image.info["duration"]))
    return frames, durations


# --- which frames ---


def test_two_seconds_end_at_the_accident() -> None:
    assert frame_steps(100, 30.0) == list(range(41, 101))  # 60 frames
    assert frame_steps(100, 20.0) == list(range(61, 101))
    assert frame_steps(3, 30.0) == [0, 1, 2, 3]  # the episode is younger than two seconds
    assert frame_steps(7, 0.6) == [6, 7]  # 1.2 frames, rounded up
    # 250 frames would be too many: every fifth of them, the accident's among them.
    assert frame_steps(1000, 125.0) == list(range(755, 1001, 5))


def test_a_clip_shows_the_steps_before_the_first_accident() -> None:
    """Brightness is 5 times the count: after 20 steps, two seconds at 4 a second are 13 to 20."""
    episode = played("Counting", 3, accident_step=20, steps=30)
    assert episode.accidents.tolist() == [0.0] * 19 + [1.0] * 11
    before = Counting.rendered
    frames, durations = decoded(film(drawing("Counting"), NORMALIZER, 3, episode))
    assert Counting.rendered - before == 8  # nothing is drawn that is not shown
    assert [int(frame[0, 0, 0]) for frame in frames] == [5 * step for step in range(13, 21)]
    assert {frame.shape for frame in frames} == {(40, 60, 3)}
    assert durations == [250] * 7 + [HOLD_MS]


def test_what_the_fallback_did_has_an_orange_frame() -> None:
    env, episode = drawing("Counting"), played("Counting", 3, accident_step=6, steps=12)
    plain, _ = decoded(film(env, NORMALIZER, 3, episode))
    # The frames are those after steps 0 to 6; the fallback acted in the fourth and fifth.
    handed_over = [False, False, False, True, True] + [False] * 7
    frames, _ = decoded(film(env, NORMALIZER, 3, episode, handed_over))
    assert len(frames) == len(plain) == 7
    for t, (frame, bare) in enumerate(zip(frames, plain, strict=True)):
        orange = np.abs(frame[0, 0].astype(int) - ORANGE).max() < 8
        assert orange == (t in (4, 5))
        assert np.array_equal(frame[2:-2, 2:-2], bare[2:-2, 2:-2])


def test_an_accident_in_the_first_second_is_shown_from_the_reset_on() -> None:
    gif = film(drawing("Counting"), NORMALIZER, 3, played("Counting", 3, accident_step=2, steps=9))
    assert [int(frame[0, 0, 0]) for frame in decoded(gif)[0]] == [0, 5, 10]


def test_a_fast_environment_is_shown_in_its_own_time() -> None:
    """125 steps a second: every fifth step, 40 ms apart."""
    gif = film(drawing("Fast"), NORMALIZER, 3, played("Fast", 3, accident_step=50, steps=50))
    frames, durations = decoded(gif)
    assert [int(frame[0, 0, 0]) for frame in frames] == [5 * step for step in range(0, 51, 5)]
    assert durations == [40] * 10 + [HOLD_MS]


def test_hundredths_of_a_second_do_not_add_up_to_a_slower_or_faster_clip() -> None:
    frames = [np.full((8, 8, 3), 4 * k, dtype=np.uint8) for k in range(60)]
    _, durations = decoded(as_gif(frames, 1000.0 / 30.0))
    assert set(durations[:-1]) == {30, 40}
    assert sum(durations[:-1]) == 1970  # 59 intervals are 1967 ms


# --- the caps ---


def test_a_clip_that_would_be_large_is_made_smaller() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (300, 600, 3), dtype=np.uint8) for _ in range(30)]
    gif = as_gif(noise, 50.0)
    assert len(gif) <= CLIP_BYTES
    frames, _ = decoded(gif)
    assert (len(frames), frames[0].shape) == (30, (64, 128, 3))  # 128 x 256 would be too large


def test_no_clip_is_larger_than_256_pixels_and_none_is_enlarged() -> None:
    frames = [np.full((1000, 500, 3), 10 * k, dtype=np.uint8) for k in range(3)]
    assert decoded(as_gif(frames, 50.0))[0][0].shape == (256, 128, 3)
    assert decoded(as_gif([f[:30, :20] for f in frames], 50.0))[0][0].shape == (30, 20, 3)


# --- what can go wrong ---


def test_a_replay_that_is_not_the_episode_is_not_shown() -> None:
    with pytest.raises(EnvError, match="did not play an episode the same"):
        film(drawing("Forgetful"), NORMALIZER, 3, played("Forgetful", 3, 20, 30))
    episode = played("Counting", 3, 20, 30)
    with pytest.raises(EnvError, match="did not play an episode the same"):
        film(drawing("Counting"), NORMALIZER, 4, episode)  # another seed


def test_an_environment_without_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match='"HazardLine-v0" cannot draw itself'):
        require_pictures(make_env("HazardLine-v0", SafetySpec()))
    require_pictures(make_env("PointHazard-v0", SafetySpec()))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("Blank", "returned no picture"), ("BreaksLater", "the graphics card is gone")],
)
def test_a_camera_that_fails_says_so_once_and_films_no_more(name: str, reason: str) -> None:
    said: list[str] = []
    camera = AccidentCamera(f"Videos{name}-v0", SafetySpec(), NORMALIZER, said.append)
    episode = played(name, 3, accident_step=20, steps=30)
    assert [camera.clip(3, episode) for _ in range(3)] == [None] * 3
    camera.close()
    assert len(said) == 1
    assert said[0].startswith("warning: no videos of accidents: ")
    assert reason in said[0]


def test_a_camera_films_one_accident_after_the_other() -> None:
    said: list[str] = []
    camera = AccidentCamera("VideosCounting-v0", SafetySpec(), NORMALIZER, said.append)
    for seed, step in ((3, 20), (4, 5)):
        clip = camera.clip(seed, played("Counting", seed, step, 30))
        assert clip is not None
        assert int(decoded(clip)[0][-1][0, 0, 0]) == 5 * step
    camera.close()
    assert said == []
