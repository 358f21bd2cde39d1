"""What a person sees of a running loop, and how a person stops it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

from tqdm import tqdm

Say = Callable[[str], None]
TELL_SECONDS = 15.0  # of silence at most, where lines are printed
STOP_SECONDS = 2.0  # that a signal waits for a good moment to stop
RATE_SECONDS = 60.0  # of the past that the remaining time follows from, at least


class Interrupted(Exception):
    """A signal stopped the run after everything was saved; the message says how to continue."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopNow(BaseException):
    """Raised wherever the main thread is, when a signal has waited long enough."""


class StopSignal:
    """While active, SIGINT and SIGTERM set :attr:`number`; a second signal ends the process now.

    Whoever is active looks at it where stopping is cheap. Where nobody has done so ``patience``
    seconds later (None: for ever), :class:`StopNow` is raised in the main thread, also where it
    waits for a compiler; not between :meth:`hold` and :meth:`release`. Ending at once loses
    nothing: every file of a run is whole at every moment.
    """

    def __init__(self, patience: float | None = None) -> None:
        self.number: int | None = None
        self.since = math.inf
        self._patience = patience if hasattr(signal, "setitimer") else None
        self._held = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        self.since = time.monotonic()
        self._wait()

    def _wait(self) -> None:
        if self._patience is None or self.number is None or self._held:
            return
        left = self.since + self._patience - time.monotonic()
        self._previous.setdefault(signal.SIGALRM, signal.signal(signal.SIGALRM, self._overdue))
        # It comes again each second: what is raised in a destructor, say, gets lost.
        signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), 1.0)

    def _overdue(self, number: int, frame: FrameType | None) -> None:
        if not self._held:
            raise StopNow

    def hold(self) -> None:
        """From here on nothing is cut off: something is being saved, or happens in reality."""
        self._held = True
        if self._patience is not None and self.number is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    def release(self) -> None:
        """From here on it may be again."""
        self._held = False
        self._wait()

    def __enter__(self) -> StopSignal:
        # Python forbids handlers elsewhere.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self.hold()
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Heartbeat:
    """Says a line where nothing else has for :data:`TELL_SECONDS`: a pipe has no cursor to blink.

    ``line`` makes it, from the time since the beginning ("0:15"), perhaps in a thread of its own.
    To be closed.
    """

    def __init__(self, say: Say, line: Callable[[str], str]) -> None:
        self._say = say
        self._line = line
        self._said = time.monotonic()
        self._begun = self._said
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def say(self, text: str) -> None:
        """Say something else."""
        with self._lock:
            self._said = time.monotonic()
            self._say(text)

    def beat(self) -> None:
        """Say the line, if it is time."""
        with self._lock:
            now = time.monotonic()
            if now - self._said >= TELL_SECONDS:
                self._said = now
                self._say(self._line(clock(now - self._begun)))

    def _beat(self) -> None:
        while not self._ended.wait(max(0.01, self._said + TELL_SECONDS - time.monotonic())):
            with contextlib.suppress(OSError, ValueError):  # Nobody reads any more.
                self.beat()

    def close(self) -> None:
        """Keep quiet from here on."""
        self._ended.set()
        self._thread.join()


def clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> clock(75.4)
    '1:15'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class ProgressLine:
    """One line that a person can read: redrawn on a terminal, else printed ~20 times.

    And at least every :data:`TELL_SECONDS`, also while no step ends. The remaining time follows
    from the steps of the last minute (of a long run, of its last twentieth), and the first step is
    not among them: what compiles is the first one.
    """

    def __init__(
        self, total: int, start: int = 0, say: Say | None = None, unit: str = "steps"
    ) -> None:
        """``total`` and ``start`` in ``unit``; ``say`` replaces the terminal."""
        self._total = total
        self._unit = unit
        self._step = self._told = start
        self._waited = start  # the step at which a line was last said into silence
        self._text = self._line = ""
        self._marks: deque[tuple[float, int]] = deque()  # (seconds, step), a second or more apart
        self._bar: tqdm[Any] | None = None
        self._heart: Heartbeat | None = None
        if say is None and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, bar_format="{desc}", leave=True)
        else:
            self._heart = Heartbeat(say or (lambda text: print(text, flush=True)), self._waiting)

    def update(self, step: int, text: str | None = None) -> None:
        """A step has ended: show ``text`` for it, or what was shown last, if it is time to.

        On a terminal that is always, or each second without a text; else with a text at every
        twentieth of the run.
        """
        now = time.monotonic()
        first = not self._marks
        fresh = first or now - self._marks[-1][0] >= 1.0
        if fresh:
            self._marks.append((now, step))
        while len(self._marks) > 2 and self._marks[1][0] < now - RATE_SECONDS:
            if step - self._marks[1][1] < self._total / 20:
                break
            self._marks.popleft()
        self._step = step
        self._text = self._text if text is None else text
        if fresh or text is not None:
            self._line = self._format(now)
        if self._bar is not None:
            if fresh or text is not None:
                self._bar.set_description_str(self._line)
            return
        assert self._heart is not None
        if text is not None:
            twentieth = step * 20 // self._total > self._told * 20 // self._total
            self._told = step
            if twentieth or step >= self._total:
                self._heart.say(self._line)
        self._heart.beat()

    def restart(self) -> None:
        """The steps so far say nothing of those to come: other ones begin, or one has compiled."""
        self._marks.clear()

    def _format(self, now: float) -> str:
        parts = [f"{self._step:,}/{self._total:,} {self._unit}", self._text, self._remaining(now)]
        return " | ".join(part for part in parts if part)

    def _waiting(self, elapsed: str) -> str:
        """What is said into silence: the line if a step has ended since the last time."""
        before, self._waited = self._waited, self._step
        if self._step > before:
            return self._line
        return f"{self._step:,}/{self._total:,} {self._unit} | at work, {elapsed} so far"

    def _remaining(self, now: float) -> str:
        if self._step >= self._total:
            return "ETA 0:00"
        begun, step = self._marks[0]
        if self._step <= step:
            return "ETA ?"
        return f"ETA {clock((now - begun) / (self._step - step) * (self._total - self._step))}"

    def close(self) -> None:
        """Leave the line on the screen."""
        if self._bar is not None:
            self._bar.close()
        if self._heart is not None:
            self._heart.close()
