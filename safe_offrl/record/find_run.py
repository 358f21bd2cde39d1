"""The run that a command is told by path, by name or not at all."""

from __future__ import annotations

from pathlib import Path

from safe_offrl.errors import RunError
from safe_offrl.record.run import RunDir


def find_run(reference: str | Path | None, root: Path, kind: str | None = None) -> RunDir:
    """Find a run by path, by name under ``root``, or (None) the newest finished one of ``kind``."""
    if reference is not None:
        path = Path(reference)
        run = RunDir(path if (path / "run.json").is_file() else Path(root) / path)
        if kind is not None and run.kind != kind:
            raise RunError(f'The run "{run.name}" is a {run.kind} run, but a {kind} run is needed.')
        return run
    runs = [RunDir(p.parent) for p in Path(root).glob("*/run.json")]
    runs = [r for r in runs if kind in (None, r.kind) and r.state["status"] == "finished"]
    if not runs:
        what = f"{kind} run" if kind else "run"
        raise RunError(
            f'There is no finished {what} in "{root}". Run `safe-offrl {kind or "pretrain"}` '
            "first, or name a run."
        )
    return max(runs, key=lambda r: int(r.state["created_ns"]))
