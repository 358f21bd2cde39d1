"""The run folder: config, metrics, accident ledger, checkpoints and TensorBoard events of one run.

::

    runs/finetune-PointHazard-v0-iql-1/
      config.yaml        resolved settings, written before step 0
      run.json           kind, status, creation time        versions.json  packages, git, threads
      ledger.jsonl       one line an episode: the record of accidents, see ledger.py
      metrics.jsonl      one line a logged step             iterations.jsonl  one line a decision
      checkpoints/step-000012345/   what a resumed run continues from, see checkpoints.py
      calibration.png    the safety critic against what happened
      videos/            the first accidents, if asked for
      events.out.tfevents.*         TensorBoard: a view, never the record

Nothing that depends on the clock enters the ledger, the metrics or a checkpoint, so an interrupted
and resumed run is compared with an uninterrupted one byte by byte.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from safe_offrl.env.identity import KEY
from safe_offrl.errors import RunError
from safe_offrl.files import json_bytes, unwritable, write_atomic
from safe_offrl.record import checkpoints
from safe_offrl.record.checkpoints import Checkpoint
from safe_offrl.record.json_lines import JsonLines
from safe_offrl.record.ledger import Ledger, LedgerWriter, chain_start, read_ledger
from safe_offrl.record.run_names import new_folder
from safe_offrl.record.tensorboard import Board
from safe_offrl.record.writer_lock import WriterLock
from safe_offrl.types import Episode

RESUMED = f"resumed_{KEY}"  # in versions.json: of the environments that a run went on in since


class RunDir:
    """One run on disk. Reading needs nothing; writing needs the lock (``create`` or ``lock``)."""

    def __init__(self, path: Path) -> None:
        """Open an existing run for reading; raises RunError if ``path`` holds none."""
        self.path = Path(path)
        if not (self.path / "run.json").is_file():
            raise RunError(
                f'"{self.path}" is not a run folder. Give the name or the path of a run that '
                "`safe-offrl pretrain` or `safe-offrl finetune` wrote."
            )
        self._lock: WriterLock | None = None
        self._board: Board | None = None
        self._purge_step = 0
        self._metrics = JsonLines(self.path / "metrics.jsonl")
        self._iterations = JsonLines(self.path / "iterations.jsonl")
        self._appended = 0  # episodes, the replayed ones too
        self.recorded: list[Episode] = []  # what the ledger held when the run was resumed
        self._writer: LedgerWriter | None = None

    @classmethod
    def create(
        cls,
        root: Path,
        *,
        kind: str,
        config_text: str,
        name: str | None = None,
        stem: str | None = None,
        versions: Mapping[str, Any] | None = None,
    ) -> RunDir:
        """Make ``root/name`` and lock it; config.yaml and versions.json exist from the start.

        Without a name it is the first free ``<stem>-<k>`` (stem: the kind, say "pretrain-X-iql").
        """
        path = new_folder(Path(root), name, stem or kind)
        (path / "checkpoints").mkdir()
        write_atomic(path / "config.yaml", config_text.encode())
        write_atomic(path / "versions.json", json_bytes(dict(versions or {})))
        # run.json comes last: it is what makes the folder a run.
        state = {"kind": kind, "status": "running", "created_ns": time.time_ns()}
        write_atomic(path / "run.json", json_bytes(state))
        run = cls(path)
        run.lock()
        return run

    # --- what it is ---

    @property
    def name(self) -> str:
        """Its folder's name, with that of the group where the folder is a seed: "ours/0"."""
        path = self.path.resolve()
        return f"{path.parent.name}/{path.name}" if path.name.isdecimal() else path.name

    @property
    def state(self) -> dict[str, Any]:
        """kind, status ("running", "interrupted", "finished"), created_ns and, later, a reason."""
        return self.read_json("run.json")

    @property
    def kind(self) -> str:
        """ "pretrain" or "finetune"."""
        return str(self.state["kind"])

    @property
    def config_text(self) -> str:
        """The resolved configuration as YAML."""
        return (self.path / "config.yaml").read_text(encoding="utf-8")

    @property
    def versions(self) -> dict[str, Any]:
        """What it was made with, versions.json; empty where that is missing."""
        return self.read_json("versions.json") if (self.path / "versions.json").is_file() else {}

    @property
    def environments(self) -> list[Any]:
        """Identities (see env/identity.py) of the environment that it began in, and since.

        Empty for a run of an earlier version.
        """
        versions = self.versions
        return [versions[KEY], *versions.get(RESUMED, [])] if KEY in versions else []

    def set_status(self, status: str, *, count: bool = True, **details: Any) -> None:
        """Record how the run stands: "running", "interrupted" or "finished".

        ``count`` its episodes too, so that a ledger cut short is found. Without, as after a failed
        write, nothing but the status is touched, and a disk that fails again is left alone.
        """
        self._require_lock()
        if count:
            self._sync_lines()
            details = {"episodes": self._appended, **details}
        try:
            self.write_json("run.json", {**self.state, "status": status, **details})
        except (OSError, RunError):
            if count:
                raise

    @property
    def is_blank(self) -> bool:
        """Whether nothing of it is on record: no episode, no number, no step."""
        names = ("ledger.jsonl", "metrics.jsonl", "iterations.jsonl")
        saved = {path.name for path in self.path.glob("checkpoints/step-*")}
        return not any((self.path / name).is_file() for name in names) and all(
            int(name.removeprefix("step-")) == 0 for name in saved
        )

    def discard(self) -> None:
        """Remove the run, of which nothing is on record, so that its name is free."""
        self._require_lock()
        if not self.is_blank:
            raise RuntimeError(f"{self.path} has a record, which is never removed")
        self.close()
        shutil.rmtree(self.path)

    def read_json(self, filename: str) -> dict[str, Any]:
        """Read one of the run's JSON files; RunError if it is missing or damaged."""
        try:
            value = json.loads((self.path / filename).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(
                f'"{self.path / filename}" is missing or damaged ({error}). Restore it or make '
                "the run again."
            ) from error
        if not isinstance(value, dict):
            raise RunError(f'"{self.path / filename}" holds no JSON object. Make the run again.')
        return value

    def write_json(self, filename: str, value: Mapping[str, Any]) -> Path:
        """Write a JSON file of the run atomically (evaluation.json, calibration.json ...)."""
        write_atomic(self.path / filename, json_bytes(dict(value)))
        return self.path / filename

    def require_writable(self, remedy: str) -> None:
        """Raise RunError if nothing can be written into the folder: before work that would be lost.

        ``remedy`` is a sentence: what to do then.
        """
        if why := unwritable(self.path):
            raise RunError(
                f'Nothing can be written into the run folder "{self.path}" ({why}). {remedy}'
            )

    # --- one writer ---

    def lock(self) -> None:
        """Become the only writer; fails at once, naming the holder, if another process is."""
        self._lock = WriterLock(self.path, self.name)

    def _require_lock(self) -> None:
        if self._lock is None:
            raise RuntimeError("this RunDir was opened for reading; call lock() before writing")

    def close(self) -> None:
        """Flush TensorBoard and give the lock back; may be called twice."""
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- the record ---

    def ledger(self) -> Ledger:
        """The ledger as it is on disk; a torn last line is left out.

        Raises RunError if it is damaged, does not belong to these settings, or is cut short.
        """
        path = self.path / "ledger.jsonl"
        ledger = read_ledger(path, self._chain_start)
        counted = int(self.state.get("episodes", 0))
        if len(ledger.episodes) < counted:
            raise RunError(
                f'"{path}" has {len(ledger.episodes)} episodes, run.json counted {counted}. '
                "Restore it from a backup."
            )
        return ledger

    def episodes(self) -> list[Episode]:
        """Every episode that began, in order; one whose end is not on record counts as lost."""
        return self.ledger().counted

    @property
    def _chain_start(self) -> str:
        return chain_start((self.path / "config.yaml").read_bytes())

    def _ledger_writer(self) -> LedgerWriter:
        self._require_lock()
        if self._writer is None:
            self._writer = LedgerWriter(self.path / "ledger.jsonl", self._chain_start)
        return self._writer

    def append_episode(self, episode: Episode, *, sync: bool = True) -> None:
        """Write one episode to the ledger and fsync it BEFORE the next one may begin.

        Without ``sync``, for an episode that can be played again, the fsync comes before a
        checkpoint or a status counts it: a kill loses nothing then, a power cut goes back to the
        last checkpoint.

        After a resume the loop replays the episodes since the checkpoint; those must equal what
        the ledger already holds, else RunError: the run is then not the run it continues.
        """
        writer, index = self._ledger_writer(), self._appended
        if episode.index != index:
            raise RuntimeError(f"episode {episode.index} cannot follow {index - 1} in the ledger")
        if index < len(self.recorded):
            writer.require_same(episode)
        else:
            writer.append(episode, sync=sync)
        self._appended = index + 1

    def reserve_episode(self, worst: Episode) -> None:
        """Write and fsync, BEFORE the next episode's first step, the most it can take and cost.

        Until its end is appended, it counts as that.
        """
        self._ledger_writer().reserve(worst)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl and the same numbers to TensorBoard at x = step."""
        self._require_lock()
        self._metrics.append({"step": step, **{k: float(v) for k, v in values.items()}})
        self.board.add_scalars(step, values)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, ``{"step": ..., tag: value or None}``."""
        return self._metrics.read()

    def log_iteration(self, values: Mapping[str, Any]) -> None:
        """Append one decision of the acceptance step, with its reason, to iterations.jsonl."""
        self._require_lock()
        self._iterations.append(values)

    def iterations(self) -> list[dict[str, Any]]:
        """The decisions of a fine-tuning run, in order."""
        return self._iterations.read()

    def _sync_lines(self) -> None:
        """Fsync what is about to be counted."""
        if self._writer is not None:
            self._writer.sync()
        self._metrics.sync()
        self._iterations.sync()

    @property
    def board(self) -> Board:
        """Its page in TensorBoard, opened on first use."""
        self._require_lock()
        if self._board is None:
            self._board = Board(self.path, self._purge_step)
        return self._board

    # --- checkpoints ---

    def save_checkpoint(
        self, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any]
    ) -> Checkpoint:
        """Write a checkpoint whole or not at all; see :mod:`safe_offrl.record.checkpoints`."""
        self._require_lock()
        self._sync_lines()  # They are on disk before a checkpoint counts them.
        counts = {
            "metrics": self._metrics.count,
            "iterations": self._iterations.count,
            "ledger": self._appended,
        }
        return checkpoints.save_checkpoint(self.path / "checkpoints", step, tensors, info, counts)

    @property
    def has_begun(self) -> bool:
        """Whether there is, or was, anything to continue from."""
        return any(self.path.glob("checkpoints/step-*")) or any(
            (self.path / name).is_file() for name in ("ledger.jsonl", "metrics.jsonl")
        )

    def load_checkpoint(self) -> Checkpoint:
        """Read the newest intact checkpoint; RunError if there is none."""
        return checkpoints.load_checkpoint(self.path / "checkpoints", self.name)

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Go back to ``checkpoint``: cut metrics and iterations, expect the ledger's rest again.

        An episode that was reserved and has no end is closed as lost.
        """
        self._require_lock()
        checkpoints.remove_unfinished(self.path / "checkpoints")
        self._metrics.cut(checkpoint.counts["metrics"])
        self._iterations.cut(checkpoint.counts["iterations"])
        self._writer = LedgerWriter(
            self.path / "ledger.jsonl", self._chain_start, checkpoint.counts["ledger"]
        )
        self._writer.close_lost()
        self.recorded = list(self._writer.episodes)
        self._appended = checkpoint.counts["ledger"]
        self._purge_step = checkpoint.step + 1
        self.set_status("running")
