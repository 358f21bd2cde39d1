"""A comparison as one HTML page: from a file, without network, on light and dark screens."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO

from safe_offrl import charts
from safe_offrl.files import write_atomic
from safe_offrl.report import Comparison
from safe_offrl.tables import LEGEND, Table, pairing_lines, tables_of

STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 22%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 78rem; margin: 1.5rem auto; padding: 0 1rem;
  background: Canvas; color: CanvasText; }
@media (prefers-color-scheme: dark) { body { background: #121212; } }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
.wide:focus-visible, button:focus-visible { outline: 2px solid Highlight; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tbody.groups { font-weight: 600; border-top: 2px solid currentColor; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0;
  padding: 0; cursor: pointer; }
th button::after { content: " \\2195"; opacity: .4; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
img { max-width: 100%; height: auto; }
footer, .small { font-size: .85rem; opacity: .8; }
"""
# A cell's number is what it begins with; words sort as words, and "-" comes last either way.
SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const body = table.tBodies[0];
    [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "-" || y === "-") return (x === "-") - (y === "-");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, undefined, {numeric: true}) : x - y;
      return down ? -order : order;
    }).forEach(row => body.append(row));
  }));
}
"""


def write_html(comparison: Comparison, path: Path) -> None:
    """Write the page; its charts are left out if no run has learned online."""
    write_atomic(path, html_page(comparison).encode())


def html_page(comparison: Comparison) -> str:
    """The page as text."""
    environments = ", ".join(sorted({run.env_id for run in comparison.runs}))
    title = f"{environments}: {len(comparison.runs)} runs compared"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if comparison.notes:
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes)
        parts.append(f"<h2>Before you believe it</h2><ul>{notes}</ul>")
    if comparison.pairings:
        parts.append("<h2>Paired comparison (same pretrained policy, same seed)</h2>")
        for pairing in comparison.pairings:
            head, *lines = map(html.escape, pairing_lines(pairing))
            found = "".join(f"<li>{line}</li>" for line in lines)
            parts.append(f"<p><strong>{head}</strong></p><ul>{found}</ul>")
    online = [run for run in comparison.runs if run.episodes]
    if online:
        parts += [
            "<h2>While learning</h2>",
            _picture(
                lambda target, dark: charts.draw(online, target, dark=dark),
                "Four charts over environment steps: accidents so far, accident rate or cost, "
                "return, and the critic's estimate against what was realised.",
            ),
            "<h2>At the end</h2>",
            _picture(
                lambda target, dark: charts.draw_outcome(comparison, target, dark=dark),
                "Two charts: final return against accidents or cost, with the Pareto front of the "
                "methods, and the share of runs that reach a return.",
            ),
            '<p class="small">The same numbers are in the tables below.</p>',
        ]
    parts += [_table(table) for table in tables_of(comparison)]
    parts.append(f'<p class="small">{html.escape(LEGEND)}</p>')
    body = "\n".join(parts)
    version = importlib.metadata.version("safe-offrl")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
<footer><p>safe-offrl {version}, from the ledgers of the runs.</p></footer>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _table(table: Table) -> str:
    """A table whose columns sort by a click or a key press."""
    head = "".join(
        f'<th scope="col"><button type="button">{html.escape(name)}</button></th>'
        for name in table.header
    )
    bodies = f"<tbody>{''.join(map(_row, table.rows))}</tbody>"
    if table.groups:
        bodies += f'<tbody class="groups">{"".join(map(_row, table.groups))}</tbody>'
    label = html.escape(table.title, quote=True)
    return (
        f"<h2>{html.escape(table.title)}</h2>\n"
        f'<div class="wide" role="region" aria-label="{label}" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead>{bodies}</table></div>"
    )


def _row(cells: list[str]) -> str:
    return f"<tr>{''.join(map(_cell, cells))}</tr>"


def _cell(text: str) -> str:
    number = re.match(r"[+-]?[\d,]*\.?\d+", text)
    value = f' data-value="{number[0].replace(",", "")}"' if number else ""
    return f"<td{value}>{html.escape(text)}</td>"


def _picture(draw: Callable[[IO[bytes], bool], None], words: str) -> str:
    """One chart in two colour schemes, inside the page."""
    light, dark = (_data_uri(draw, dark) for dark in (False, True))
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{html.escape(words, quote=True)}"></picture>'
    )


def _data_uri(draw: Callable[[IO[bytes], bool], None], dark: bool) -> str:
    png = io.BytesIO()
    draw(png, dark)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
