"""One JSON object on standard output and nothing else, whatever an environment prints."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

_given: list[str] = []  # the answer, from when it is known until it is printed


def give(text: str) -> None:
    """What is to be printed at the end of :func:`only_answer`."""
    _given.append(text)


@contextlib.contextmanager
def only_answer() -> Iterator[None]:
    """Send to standard error what is printed meanwhile; at the end print what was given.

    Also what is printed by C code and by other processes, and at the end of this one: simulators
    greet, warn and take their leave.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(_print)  # It runs last, when standard output is what it was.
        if _is_descriptor_1(sys.stdout):
            stack.enter_context(_descriptor_1_to_stderr())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def _print() -> None:
    while _given:
        print(_given.pop(0), flush=True)
    if _is_descriptor_1(sys.stdout):
        atexit.register(os.dup2, 2, 1)  # What comes now is no part of it.


@contextlib.contextmanager
def _descriptor_1_to_stderr() -> Iterator[None]:
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # C code may have printed what is not yet written.
        os.dup2(kept, 1)
        os.close(kept)


def _is_descriptor_1(stream: object) -> bool:
    """Whether a stream is the process's own standard output, not one that a test has put there."""
    try:
        return bool(stream.fileno() == 1)  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
