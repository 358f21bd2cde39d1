"""What both phases share: how a run is begun, gone on with, saved and ended."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from safe_offrl.compute.descent import CompileMode
from safe_offrl.errors import ConfigError, EnvError, RunError, UserError
from safe_offrl.files import write_atomic
from safe_offrl.record.checkpoints import Checkpoint, fitting
from safe_offrl.record.find_run import find_run
from safe_offrl.record.progress import STOP_SECONDS, Interrupted, Say, StopNow, StopSignal
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import RunInputs, parse_run_yaml, run_yaml
from safe_offrl.record.trust import trust_own
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.pretrain_config import PretrainConfig

Config = TypeVar("Config")
CHECKPOINT_SECONDS = 10.0  # of work that a crash may cost; a checkpoint takes well under 0.1 s


class Loop(Protocol):
    """What a run does: the offline phase, or the online one."""

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors."""
        ...

    def info(self) -> dict[str, Any]:
        """The rest, JSON-able."""
        ...

    def load(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Continue from both."""
        ...


def bring_back(run: RunDir, loop: Loop) -> Checkpoint:
    """Set a loop before its first step, and the run's files, to the newest checkpoint.

    A run that was ended before it wrote its first one has not begun, and begins here.
    """
    if run.has_begun:
        checkpoint = run.load_checkpoint()
        with fitting(run.path):
            loop.load(checkpoint.tensors, checkpoint.info)
    else:
        checkpoint = run.save_checkpoint(0, loop.state_dict(), loop.info())
    run.rewind(checkpoint)
    return checkpoint


def new_run(
    kind: str,
    agent: str,
    learner: str,
    inputs: RunInputs,
    config: PretrainConfig | FinetuneConfig,
    versions: Mapping[str, Any],
    *,
    name: str | None,
    runs: str | Path,
    say: Say,
) -> RunDir:
    """Make the folder of a planned run, and lock it.

    It is named after the ``agent`` that its policy is of; ``learner`` is who learns in it.
    """
    config_text = run_yaml(inputs, kind, config, Path(runs))
    trust_own(config_text, inputs, config.safety, say, learner)
    return RunDir.create(
        Path(runs),
        kind=kind,
        config_text=config_text,
        name=name,
        stem=f"{kind}-{inputs.env_id.rpartition(':')[2]}-{agent.rpartition(':')[2]}",
        versions=versions,
    )


@contextlib.contextmanager
def unfinished(
    kind: str, schema: type[Config], run_name: str | Path, runs: str | Path, threads: int | None
) -> Iterator[tuple[RunDir, RunInputs, Config]]:
    """A run to go on with, locked, and what it was made with.

    RunError if there is nothing left of it to do. ConfigError if it is to go on with another number
    of threads; None: as it was.
    """
    run = find_run(run_name, Path(runs), kind)
    run.lock()
    with run:
        if run.state["status"] == "finished":
            raise RunError(f'The run "{run.name}" is finished already. Start a new run instead.')
        inputs, config = parse_run_yaml(run.config_text, kind, schema, run.path)
        if threads not in (None, inputs.threads):
            raise ConfigError(
                f'The run "{run.name}" computes with --threads {inputs.threads}, and with '
                f"{threads} it would come out differently. Leave --threads out, or start a new run."
            )
        yield run, inputs, config


def stored_mode(inputs: RunInputs) -> CompileMode:
    """How a run that is continued must compute, so that it comes out as if never interrupted."""
    return "on" if inputs.compiled else "off"


class Saver:
    """Saves a loop's checkpoints: each ``seconds``, and where a signal asks for the end."""

    def __init__(self, run: RunDir, loop: Loop, stop: StopSignal, seconds: float) -> None:
        self.stop = stop
        self._run, self._loop, self._seconds = run, loop, seconds
        self._saved = time.monotonic()

    def save(self, step: int) -> None:
        """Save now; from here on nothing is cut off."""
        self.stop.hold()
        self._run.save_checkpoint(step, self._loop.state_dict(), self._loop.info())
        self._saved = time.monotonic()

    def save_if_due(self, step: int) -> None:
        """Save if it is time to, and end where a signal asks for it."""
        if self.stop.number or time.monotonic() - self._saved > self._seconds:
            self.save(step)
            if self.stop.number:
                raise interrupted(self._run, self.stop.number, step)
            self.stop.release()


def interrupted(run: RunDir, number: int, step: int) -> Interrupted:
    """Mark a run as stopped by signal ``number``; returns the exception to raise."""
    run.set_status("interrupted")
    return Interrupted(number, f"stopped at step {step:,}; everything is saved. {_continue(run)}")


def _continue(run: RunDir) -> str:
    return f"Continue with: safe-offrl {run.kind} --resume {run.path}"


@contextlib.contextmanager
def writing(run: RunDir, say: Say, *, new: bool = False) -> Iterator[StopSignal]:
    """While a run is written: a signal stops it, and its status says how it ended, whatever did.

    A ``new`` run whose settings are refused before anything of it is on record is removed, and its
    name is free; of any other the error says how to continue it.
    """
    with StopSignal(STOP_SECONDS) as stop:
        try:
            yield stop
        except Interrupted:
            raise
        except StopNow:
            # A stop at once.
            stop.hold()
            run.set_status("interrupted")
            raise Interrupted(
                stop.number or signal.SIGTERM,
                "stopped at once; what has been done since the last checkpoint is done again. "
                f"{_continue(run)}",
            ) from None
        except BaseException as error:
            # A refusal or a failure.
            stop.hold()
            refused = isinstance(error, UserError) and not isinstance(error, EnvError)
            if new and refused and run.is_blank:
                run.discard()
                say(f"removed     {run.path}: it had not begun")
            else:
                # Of an environment that failed everything is on record. Of a disk nobody knows.
                run.set_status("interrupted", count=isinstance(error, EnvError))
                if not isinstance(error, FloatingPointError):  # It would end the same.
                    error.add_note(_continue(run))
            raise


def save_calibration(run: RunDir, tag: str, step: int, png: bytes) -> None:
    """Write a figure as the run's calibration.png and show it in TensorBoard."""
    write_atomic(run.path / "calibration.png", png)
    run.board.add_picture(f"calibration/{tag}", step, png)
