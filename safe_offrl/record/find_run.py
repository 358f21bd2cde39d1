"""The runs that a command is told by path, by name or not at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from safe_offrl.errors import RunError
from safe_offrl.record.run import RunDir


class Source(NamedTuple):
    """A run folder, and the group folder that it was found in (None: it was named itself)."""

    path: Path
    group: Path | None = None


def find_run(run_name: str | Path | None, root: Path, kind: str | None = None) -> RunDir:
    """Find a run by path, by name under ``root``, or (None) the newest finished one of ``kind``."""
    if run_name is not None:
        path = Path(run_name)
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


def find_runs(run_name: str | Path | Source, root: Path) -> list[Source]:
    """The run, or every run directly in the folder, that a path or a name under ``root`` means.

    RunError if it is neither.
    """
    if isinstance(run_name, Source):
        return [run_name]
    for path in (Path(run_name), Path(root) / run_name):
        if (path / "run.json").is_file():
            return [Source(path)]
        runs = sorted((p.parent for p in path.glob("*/run.json")), key=_natural)
        if runs:
            return [Source(run, path) for run in runs]
    raise RunError(
        f'"{run_name}" is not a run folder, and holds none. Give the name or the path of a run, '
        "or of a folder whose folders are the runs of one method."
    )


def _natural(path: Path) -> tuple[tuple[bool, int, str], ...]:
    """Sorts 2 before 10."""
    parts = re.findall(r"\d+|\D+", path.name)
    return tuple((not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts)
