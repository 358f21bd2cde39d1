"""A comparison as Markdown, as GitHub shows it: the tables, the notes, and the charts by link."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from safe_offrl.files import write_atomic
from safe_offrl.report.comparison import Comparison
from safe_offrl.report.tables import LEGEND, tables_of


def write_markdown(comparison: Comparison, path: Path, figures: Sequence[Path] = ()) -> None:
    """Write the tables; ``figures`` that were drawn are shown, by their way from the file."""
    links = [Path(os.path.relpath(figure, path.parent)).as_posix() for figure in figures]
    write_atomic(path, markdown(comparison, links).encode())


def markdown(comparison: Comparison, figures: Sequence[str] = ()) -> str:
    """The text: groups first, every run folded away behind them."""
    tables = tables_of(comparison)
    parts = [f"# {', '.join(comparison.environments)}: {len(comparison.runs)} runs compared"]
    if comparison.notes:
        parts.append("\n".join(f"- Note: {_plain(note)}" for note in comparison.notes))
    parts += [f"![Charts of the comparison](<{figure}>)" for figure in figures]
    parts += [
        f"## {_plain(table.title)}\n\n{_pipe_table(table.header, table.groups)}"
        for table in tables
        if table.groups
    ]
    runs = [
        f"## {_plain(table.title)}\n\n{_pipe_table(table.header, table.rows)}"
        for table in tables
        if table.rows
    ]
    if comparison.groups:
        runs = ["<details>\n<summary>Every run</summary>", *runs, "</details>"]
    parts += [*runs, _plain(LEGEND)]
    return "\n\n".join(parts) + "\n"


def _pipe_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first two columns are words, numbers stand right."""
    rule = [":--"] * 2 + ["--:"] * (len(header) - 2)
    return "\n".join(f"| {' | '.join(map(_plain, cells))} |" for cells in (header, rule, *rows))


def _plain(text: str) -> str:
    """Text as it is: Markdown and HTML see nothing in it."""
    for character in "\\`*_<>|#~":
        text = text.replace(character, "\\" + character)
    return text
