"""An environment in a process of its own, so that one that hangs or dies takes nobody with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from safe_offrl.env.user_code import fault_in_words
from safe_offrl.errors import EnvError, EnvFault

START_SECONDS = 120.0  # the process gets so long to make the environment
# It makes the environment in the new process and describes it.
Make = Callable[[], tuple[gymnasium.Env[Any, Any], Mapping[str, Any]]]


class ProcessEnv(gymnasium.Env[Any, Any]):
    """Every reset and step is done in another process and gets ``timeout`` seconds.

    EnvFault if there is no answer in time (the process is ended), if the process has died, or with
    what the environment raised there. The next reset starts a new process where there is none.
    ``described`` is what ``make`` said of it. Raises EnvError if the environment cannot be made.
    """

    def __init__(self, make: Make, timeout: float) -> None:
        """``make`` is a module's function, or a partial of one."""
        self._make = make
        self._timeout = timeout
        self._process: Any = None
        self._pipe: Any = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # torch does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._make), daemon=True)
        self._process.start()
        theirs.close()  # so that the pipe ends when the process does
        made = self._answer(START_SECONDS)
        self.observation_space, self.action_space, name, steps, self.described = made
        self.spec = EnvSpec(name, max_episode_steps=steps) if name else None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset the environment there."""
        if self._process is None:
            self._start()
        return self._call("reset", {"seed": seed, "options": options})

    def step(self, action: Any) -> Any:
        """Let the environment step there."""
        return self._call("step", {"action": action})

    def close(self) -> None:
        """End the process; may be called twice."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _call(self, method: str, arguments: dict[str, Any]) -> Any:
        if self._process is None:
            raise EnvFault("The environment's process has ended. Reset it.")
        try:
            self._pipe.send((method, arguments))
        except OSError as error:
            raise self._gone() from error
        return self._answer(self._timeout)

    def _answer(self, seconds: float) -> Any:
        try:
            if not self._pipe.poll(seconds):
                self.close()
                raise EnvFault(
                    f"The environment gave no answer within {seconds:g} seconds, so its process "
                    "was ended. Look for what it waits for, or raise env.timeout."
                )
            kind, content = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        if kind == "answer":
            return content
        raise (EnvError if kind == "settings" else EnvFault)(content)

    def _gone(self) -> EnvFault:
        self.close()
        return EnvFault("The environment's process died. Look into what it printed last.")


def _end_with_parent() -> None:
    """End this process when its parent has ended, however that came about."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _serve(pipe: Connection, make: Make) -> None:
    """What the other process does until its pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the loop decides when an episode is over
    # The pipe ends with a parent that was killed too, but an environment that hangs never reads it.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        env, described = make()
        spec = (env.spec.id, env.spec.max_episode_steps) if env.spec else (None, None)
        pipe.send(("answer", (env.observation_space, env.action_space, *spec, dict(described))))
    except EnvError as error:
        pipe.send(("settings", str(error)))
        return
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            pipe.send(("answer", getattr(env, method)(**arguments)))
        except Exception as error:  # whatever the environment raises
            pipe.send(("fault", fault_in_words(error)))
