"""Compare runs: tables, charts and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safe_offrl.commands.common import say_plain
from safe_offrl.record.find_run import Source
from safe_offrl.record.progress import Say
from safe_offrl.report import charts, page, tables
from safe_offrl.report import comparison as report
from safe_offrl.report.markdown import write_markdown


def compare_runs(
    run_names: Sequence[str | Path | Source],
    *,
    png: str | Path | None = None,
    svg: str | Path | None = None,
    html: str | Path | None = None,
    markdown: str | Path | None = None,
    group_by: str | None = None,
    by_run: bool | None = None,
    runs: str | Path = "runs",
    say: Say = say_plain,
) -> dict[str, Any]:
    """Print the comparison of runs, write what is asked for; returns it as plain values.

    Each name is that of a run, or of a folder of runs: the seeds of a method named like it.
    ``by_run``: whether the printed tables list each run; None: unless there are many.
    """
    # Tables.
    comparison = report.compare(run_names, group_by=group_by, root=Path(runs))
    say(tables.format_table(comparison, by_run=by_run))
    # Charts.
    figures = [Path(path) for path in (png, svg) if path is not None]
    for path in figures:
        path.parent.mkdir(parents=True, exist_ok=True)
        charts.write_figure(comparison, path)
        say(f"figure      {path}")
    # Documents.
    if markdown is not None:
        Path(markdown).parent.mkdir(parents=True, exist_ok=True)
        write_markdown(comparison, Path(markdown), figures)
        say(f"markdown    {markdown}")
    if html is not None:
        Path(html).parent.mkdir(parents=True, exist_ok=True)
        page.write_html(comparison, Path(html))
        say(f"page        {html}")
    return comparison.as_dict()
