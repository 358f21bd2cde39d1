"""Accidents as moving pictures: the last two seconds before each, as an animated GIF.

An episode is its seed and its actions. So it is not the run's environment that is drawn but a
second one, which plays the episode again up to the accident: the run cannot notice, and nothing is
rendered but what is shown (without a graphics card one picture of MuJoCo's takes 50 ms, fifty times
as long as a step). That the replay is the episode is checked.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.env.adapter import AccidentEnv
from safe_offrl.env.make import make_env
from safe_offrl.env.user_code import sentence
from safe_offrl.errors import ConfigError, EnvError
from safe_offrl.spec import SafetySpec
from safe_offrl.types import Batch, Normalizer

Frame = NDArray[np.uint8]

SECONDS = 2.0  # before the accident
ORANGE = (255, 140, 0)  # around what the guard's fallback does
HOLD_MS = 1000  # how long the last frame, the accident, stays before the clip begins again
DEFAULT_FPS = 30.0  # of an environment that names no frames per second
MAX_FRAMES = 60  # of a faster environment every k-th step is shown
SIDES = (256, 128, 64)  # longest side in pixels: the first whose clip is small enough
CLIP_BYTES = 1_000_000  # of a clip; 60 frames of 64 x 64 pixels always fit


def require_pictures(env: AccidentEnv) -> None:
    """Raise ConfigError if the environment cannot draw itself."""
    modes = env.metadata.get("render_modes") or []
    if "rgb_array" not in modes:
        raise ConfigError(
            f'Videos were asked for, but "{env.env_id}" cannot draw itself: "rgb_array" is not '
            f"among its render_modes {list(modes)}. Leave --videos out, or give it a render()."
        )


def frame_steps(accident_step: int, fps: float) -> list[int]:
    """The steps after which a clip's frames are taken (0: after the reset); the accident is last.

    These are the last ``ceil(2 fps)`` up to the accident, or every k-th of them where there would
    be more than MAX_FRAMES.

    >>> frame_steps(7, fps=2.0)
    [4, 5, 6, 7]
    >>> frame_steps(2, fps=2.0)
    [0, 1, 2]
    """
    wanted = math.ceil(SECONDS * fps)
    every = math.ceil(wanted / MAX_FRAMES)
    return sorted(range(accident_step, max(-1, accident_step - wanted), -every))


def film(
    env: AccidentEnv,
    normalizer: Normalizer,
    seed: int,
    episode: Batch,
    handed_over: Sequence[bool] = (),
) -> bytes:
    """Play an episode again and film its first accident: a GIF of at most MAX_BYTES.

    Where the guard had ``handed_over`` to its fallback, the picture has an orange frame.

    ``env`` was made with ``render_mode="rgb_array"``; ``seed`` is what the episode was reset with;
    ``episode`` holds its n transitions, observations standardised by ``normalizer``. Raises
    EnvError if the replay is not the episode, or if the environment returns no picture.
    """
    last = int(episode.accidents.argmax()) + 1  # steps up to the first accident
    fps = frames_per_second(env)
    wanted = frame_steps(last, fps)
    observation, info = env.reset(seed=seed)
    frames = [picture(env)] if 0 in wanted else []
    ended = False
    for t, action in enumerate(episode.actions[:last].numpy(), start=1):
        if ended:
            break
        observation, _, terminated, truncated, info = env.step(action)
        ended = terminated or truncated
        if t in wanted:
            frames.append(picture(env))
            if any(handed_over[t - 1 : t]):
                frames[-1] = framed(frames[-1])
    recorded = episode.next_observations[last - 1].numpy()
    same = len(frames) == len(wanted) and np.array_equal(normalizer(observation), recorded)
    if not (same and info["accident"]):
        raise EnvError(
            f'"{env.env_id}" did not play an episode the same from its seed and its actions. '
            "`safe-offrl check-env` looks for the cause."
        )
    every = wanted[1] - wanted[0] if len(wanted) > 1 else 1
    return as_gif(frames, 1000.0 * every / fps)


def frames_per_second(env: AccidentEnv) -> float:
    """``metadata["render_fps"]``, or 30 where the environment names none."""
    return float(env.metadata.get("render_fps") or DEFAULT_FPS)


def picture(env: AccidentEnv) -> Frame:
    """What the environment draws, [height, width, 3]; EnvError if that is no picture."""
    frame: Any = env.render()
    if isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3:
        return frame[:, :, :3]
    raise EnvError(
        f'render() of "{env.env_id}" returned no picture: a uint8 array [height, width, 3] is '
        "needed."
    )


def framed(frame: Frame) -> Frame:
    """The picture with an orange frame."""
    width = max(2, min(frame.shape[:2]) // 40)
    inner = np.zeros(frame.shape[:2], dtype=bool)
    inner[width:-width, width:-width] = True
    return np.where(inner[..., None], frame, np.array(ORANGE, dtype=np.uint8))


def as_gif(frames: Sequence[Frame], frame_ms: float) -> bytes:
    """Encode frames [height, width, 3], ``frame_ms`` apart; the last one stays for HOLD_MS.

    GIF counts hundredths of a second. Each frame's end is rounded, not each duration, so that a
    clip of 30 frames a second takes the time that it took.
    """
    from PIL import Image

    ends = 10 * np.round(frame_ms / 10.0 * np.arange(len(frames))).astype(int)
    durations = [*np.diff(ends).tolist(), HOLD_MS]
    data = b""
    for side in SIDES:
        images = [Image.fromarray(frame) for frame in frames]
        for image in images:
            image.thumbnail((side, side))  # It shrinks and never enlarges.
        buffer = io.BytesIO()
        images[0].save(
            buffer,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=durations,
            loop=0,
        )
        data = buffer.getvalue()
        if len(data) <= CLIP_BYTES:
            break
    return data


class AccidentCamera:
    """Films accidents of one environment; when it cannot, it says so once and films no more.

    Pictures are worth less than the run they are of: nothing that goes wrong here stops it.
    """

    def __init__(
        self, env_id: str, spec: SafetySpec, normalizer: Normalizer, say: Callable[[str], None]
    ) -> None:
        """Make the environment and draw once, so that a missing OpenGL is found at once."""
        self._normalizer = normalizer
        self._say = say
        self._env: AccidentEnv | None = None
        try:
            self._env = make_env(env_id, spec, render_mode="rgb_array")
            self._env.offset = normalizer.offset
            self._env.reset(seed=0)
            picture(self._env)
        except Exception as error:  # The environment or its renderer may raise anything.
            self._give_up(error)

    def clip(self, seed: int, episode: Batch, handed_over: Sequence[bool] = ()) -> bytes | None:
        """The GIF of an episode's first accident, see :func:`film`; None if it cannot be made."""
        if self._env is None:
            return None
        try:
            return film(self._env, self._normalizer, seed, episode, handed_over)
        except Exception as error:  # The environment or its renderer may raise anything.
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        self._say(f"warning: no videos of accidents: {sentence(error)}")
        self.close()

    def close(self) -> None:
        """Close the environment; may be called twice."""
        env, self._env = self._env, None
        if env is not None:
            env.close()
