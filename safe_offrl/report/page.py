"""A comparison as one HTML page: from a file, without network, on light and dark screens."""

from __future__ import annotations

import html
import importlib.metadata
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from safe_offrl.files import write_atomic
from safe_offrl.report import charts
from safe_offrl.report.charts.inline import inline_sample, inline_svg
from safe_offrl.report.charts.style import COLOURS, Look
from safe_offrl.report.comparison import Comparison
from safe_offrl.report.tables import LEGEND, MANY_RUNS, Table, tables_of

_LIGHTER = ("#4da3e0", "#f0853f", "#2fc094", "#dfa2c2", "#edb33f", "#7cc7ef", "#a0a0a0")
_LIGHT = "".join(f" --c{i}: {colour};" for i, colour in enumerate(COLOURS))
_DARK = "".join(f" --c{i}: {colour};" for i, colour in enumerate(_LIGHTER))
STYLE = (
    f"""
:root {{ color-scheme: light dark; --paper: #fff; --ink: #222; --grid: #e6e6e6;{_LIGHT} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #121212; --ink: #ddd; --grid: #383838;{_DARK} }} }}
"""
    """\
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 1.5rem auto; padding: 0 1rem;
  background: var(--paper); color: var(--ink); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.3rem 0 .3rem; }
.wide { overflow-x: auto; }
:focus-visible { outline: 2px solid Highlight; outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
th[scope=row] { font-weight: inherit; }
th:nth-child(2) { position: sticky; left: 0; background: var(--paper); }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0;
  padding: 0; cursor: pointer; }
th button::after { content: " \\2195"; opacity: .5; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill,
  minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; } figure svg { width: 100%; height: auto; display: block; }
.legend { border: 0; padding: .4rem 0; margin: 0; display: flex; flex-wrap: wrap; gap: .1rem 1.2rem;
  position: sticky; top: 0; background: var(--paper); z-index: 1; }
.legend legend { float: left; padding: 0; margin-right: 1rem; }
.legend label { display: inline-flex; align-items: center; gap: .4rem; cursor: pointer; }
.legend svg { width: 2.6rem; height: .9rem; }
@media (max-width: 40rem), (max-height: 30rem) { .legend { position: static; } }
summary { cursor: pointer; font-weight: 600; margin-top: 2rem; }
footer, .small { font-size: .87rem; }
"""
)
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
for (const box of document.querySelectorAll(".legend input")) {
  const show = () => document.querySelectorAll("figure .method-" + box.value).forEach(
    part => part.style.display = box.checked ? "" : "none");
  box.addEventListener("change", show);
  show();
}
"""


def write_html(comparison: Comparison, path: Path) -> None:
    """Write the page; charts that have nothing to draw are left out."""
    write_atomic(path, html_page(comparison).encode())


def html_page(comparison: Comparison) -> str:
    """The page as text: notes, methods, charts, and every run at the end."""
    # Head.
    count = len(comparison.runs)
    methods = len({run.method for run in comparison.runs})
    title = f"{', '.join(comparison.environments)}: {count} run{'s' * (count > 1)} compared"
    tables = tables_of(comparison)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{methods} method{'s' * (methods > 1)}; a column is sorted by its head.</p>",
    ]
    # Notes, methods and runs.
    if comparison.notes:
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes)
        parts.append(f"<h2>Before you believe it</h2><ul>{notes}</ul>")
    if comparison.groups or comparison.pairings:
        parts.append("<h2>Methods</h2>")
        parts += [_html_table(table, table.groups) for table in tables if table.groups]
    parts += _charts(comparison)
    parts += _every_run(tables, folded=bool(comparison.groups), open_=count <= MANY_RUNS)
    parts.append(f'<p class="small">{html.escape(LEGEND)}</p>')
    # Page.
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


def _charts(comparison: Comparison) -> Iterable[str]:
    """One legend that switches methods on and off, then the charts of each environment."""
    sections = charts.sections_of(comparison)
    if not sections:
        return
    looks = charts.legend_of(comparison)
    entries = "".join(_legend_entry(method, look) for method, look in looks.items())
    yield "<h2>Charts</h2>"
    yield f'<fieldset class="legend"><legend>Show</legend>{entries}</fieldset>'
    number = itertools.count()
    for section in sections:
        where = f"{section.environment}: " if len(comparison.environments) > 1 else ""
        heading = where + section.title
        figures = "".join(
            f'<figure role="img" aria-label="{html.escape(panel.words, quote=True)}">'
            f"{inline_svg(panel, f'p{next(number)}')}</figure>"
            for panel in section.panels
        )
        yield f'<h3>{html.escape(heading)}</h3>\n<div class="charts">{figures}</div>'
    yield f'<p class="small">{html.escape(charts.CAPTION)}</p>'


def _legend_entry(method: str, look: Look) -> str:
    return (
        f'<label><input type="checkbox" checked value="{look.number}">'
        f"{inline_sample(look, f'l{look.number}')}{html.escape(method)}</label>"
    )


def _every_run(tables: Sequence[Table], *, folded: bool, open_: bool) -> list[str]:
    shown = [_html_table(table, table.rows) for table in tables if table.rows]
    if not folded:
        return ["<h2>Runs</h2>", *shown]
    opened = " open" if open_ else ""
    return [f"<details{opened}><summary>Every run</summary>", *shown, "</details>"]


def _html_table(table: Table, rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns sort by a click or a key press."""
    head = "".join(
        f'<th scope="col"><button type="button">{html.escape(name)}</button></th>'
        for name in table.header
    )
    label = html.escape(table.title, quote=True)
    return (
        f"<h3>{html.escape(table.title)}</h3>\n"
        f'<div class="wide" role="region" aria-label="{label}" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(map(_row, rows))}</tbody>"
        "</table></div>"
    )


def _row(cells: Sequence[str]) -> str:
    """The second cell, the method (or whom it is compared with), names the row."""
    first, name, *others = cells
    named = f'<th scope="row">{html.escape(name)}</th>'
    return f"<tr>{_cell(first)}{named}{''.join(map(_cell, others))}</tr>"


def _cell(text: str) -> str:
    number = re.match(r"[+-]?[\d,]*\.?\d+", text)
    value = f' data-value="{number[0].replace(",", "")}"' if number else ""
    return f"<td{value}>{html.escape(text)}</td>"
