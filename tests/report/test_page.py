"""The comparison page: whole in itself, readable by machines, and sortable in a real browser."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from safe_offrl.report.comparison import compare
from safe_offrl.report.page import html_page, write_html

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"meta", "link", "input"}


class Reader(HTMLParser):
    """Checks that every tag is closed in its turn, and collects what is asked about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


@pytest.fixture
def page(paired_runs, write_run) -> str:
    frozen = write_run("pi0", [], kind="pretrain", steps=1)
    comparison = compare([frozen, *paired_runs(seeds=2, episodes=150)])
    return html_page(dataclasses.replace(comparison, notes=["a<b> & c"]))


def test_it_is_whole_in_itself_and_well_formed(page: str) -> None:
    found = Reader(page)
    assert "a<b> & c" in found.text  # text stays text
    assert "http" not in page
    for _, attributes in found.tags:
        for key in ("src", "srcset", "href", "xlink:href"):
            value = attributes.get(key)
            # No icon is asked for; what is drawn once and used again lies in the page.
            assert value is None or value == "data:," or value.startswith("#")
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_it_can_be_read_without_seeing_it(page: str) -> None:
    found = Reader(page)
    assert [t for t, _ in found.tags].count("h1") == 1
    assert dict(found.tags)["html"] == {"lang": "en"}
    figures = [attributes for tag, attributes in found.tags if tag == "figure"]
    assert len(figures) == 9  # the frozen policy was not evaluated, so no estimate is judged
    assert all(a["role"] == "img" and a["aria-label"] for a in figures)
    assert all(a["aria-hidden"] == "true" for tag, a in found.tags if tag == "svg")
    heads = [attributes for tag, attributes in found.tags if tag == "th"]
    columns = [head for head in heads if head == {"scope": "col"}]
    rows = [head for head in heads if head == {"scope": "row"}]
    assert columns
    assert len(columns) + len(rows) == len(heads)
    bodies = [t for t, _ in found.tags].count("tr") - [t for t, _ in found.tags].count("thead")
    assert len(rows) == bodies
    # Columns are sorted by buttons, and what scrolls can be reached by the keyboard.
    assert [t for t, _ in found.tags].count("button") == len(columns)
    regions = [a for t, a in found.tags if t == "div" and a["class"] == "wide"]
    assert len(regions) == [t for t, _ in found.tags].count("table")
    assert all(r["tabindex"] == "0" and r["aria-label"] for r in regions)


def test_the_words_of_a_chart_have_its_numbers(tmp_path: Path, write_group) -> None:
    """One and three accidents: two on average. Front: ours, which has fewer at the same return."""
    ours = write_group("ours", [[1, 0, 0, 0], [1, 1, 1, 0]])
    other = write_group("other", [[1, 1, 1, 1]] * 2)
    labels = [
        str(attributes["aria-label"])
        for tag, attributes in Reader(html_page(compare([ours, other]))).tags
        if tag == "figure"
    ]
    assert any("At the end: ours 2, other 4." in label for label in labels)
    assert any(label.endswith("On the Pareto front: ours.") for label in labels)


def test_numbers_sort_as_numbers(page: str) -> None:
    values = [a["data-value"] for t, a in Reader(page).tags if t == "td" and "data-value" in a]
    assert values
    assert all(value is not None and float(value) >= -1e9 for value in values)


def test_every_run_is_there_folded_if_there_are_many(write_group) -> None:
    few = html_page(compare([write_group("few", [[0]] * 2)]))
    assert "<details open>" in few
    assert "few/1" in few
    many = html_page(compare([write_group("many", [[0]] * 21)]))
    assert "<details>" in many
    assert "many/20" in many


def test_without_online_runs_there_are_tables_alone(write_run, tmp_path: Path) -> None:
    write_html(compare([write_run("a", [], kind="pretrain")]), tmp_path / "page.html")
    assert "<figure" not in (tmp_path / "page.html").read_text()


PROBE = """
const buttons = [...document.querySelectorAll("th button")];
const head = buttons.filter(button => button.textContent === "accidents").at(-1);
const column = head.closest("th").cellIndex;
const cells = () => [...head.closest("table").tBodies[0].rows].map(
  row => row.cells[column].textContent);
const found = {before: cells()};
head.click(); found.down = cells(); found.sort = head.closest("th").ariaSort;
head.click(); found.up = cells();
const size = part => { const box = part.getBBox(); return [box.width, box.height]; };
found.drawn = [...document.querySelectorAll("figure")].map(figure => {
  const lines = [...figure.querySelectorAll("[class^=method-]")].filter(part => part.getBBox);
  return lines.filter(part => Math.max(...size(part)) > 1).length;
});
found.text = [...document.querySelectorAll("figure text")].map(
  part => getComputedStyle(part).fill);
const box = [...document.querySelectorAll(".legend input")].at(-1);
const parts = [...document.querySelectorAll("figure .method-" + box.value)];
const shown = () => parts.map(part => getComputedStyle(part).display !== "none");
box.click(); found.hidden = shown(); box.click(); found.shown = shown();
found.others = [...document.querySelectorAll("figure [class^=method-]")].length > parts.length;
found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.width = document.documentElement.clientWidth;
found.paper = getComputedStyle(document.body).backgroundColor;
found.focusable = [...document.querySelectorAll(".wide, button, input, summary")].every(
  part => { part.focus(); return document.activeElement === part; });
(parent === window ? window : parent).postMessage(JSON.stringify(found), "*");
"""
ANSWER = "<script>onmessage = event => { document.title = event.data; }</script>"


def _look(page: str, folder: Path, *, dark: bool = False) -> dict[str, Any]:
    """What the probe finds on the page, 400 pixels wide, in a browser that did not complain."""
    assert BROWSER is not None
    probe = f"<script>onload = () => {{{PROBE}}}</script>"
    (folder / "page.html").write_text(page.replace("</body>", probe + "</body>"))
    # A window is not made narrower than 500 pixels; a frame is.
    frame = '<iframe src="page.html" style="width: 400px; height: 900px; border: 0"></iframe>'
    path = folder / "frame.html"
    path.write_text(f"<!DOCTYPE html><title>nothing</title>{ANSWER}{frame}")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={folder / f'profile-{dark}'}"]
    command += ["--window-size=600,900", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    result = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in result.stderr
    title = re.search(r"<title>(.*?)</title>", result.stdout)
    assert title is not None
    return dict(json.loads(html.unescape(title[1])))


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_a_browser_draws_and_sorts_it_without_complaint(page: str, tmp_path: Path) -> None:
    found = _look(page, tmp_path)
    known = [cell for cell in found["before"] if cell != "-"]
    assert len(set(known)) == 4
    assert found["down"] == [*sorted(known, key=int, reverse=True), "-"]
    assert found["up"] == [*sorted(known, key=int), "-"]
    assert found["sort"] == "descending"
    assert len(found["drawn"]) == 9
    assert min(found["drawn"]) >= 1
    assert found["hidden"]
    assert not any(found["hidden"])
    assert all(found["shown"])
    assert found["others"]
    assert 370 <= found["width"] <= 400  # less the scroll bar
    assert found["wide"] == 0  # on a narrow screen only the tables scroll sideways
    assert found["focusable"]


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_its_charts_follow_the_colour_scheme(page: str, tmp_path: Path) -> None:
    light, dark = (_look(page, tmp_path, dark=dark) for dark in (False, True))
    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(18, 18, 18)")
    assert set(light["text"]) >= {"rgb(34, 34, 34)"}
    assert set(dark["text"]) >= {"rgb(221, 221, 221)"}
    assert "rgb(34, 34, 34)" not in dark["text"]  # no ink of the light page on dark paper
    assert "rgb(0, 0, 0)" not in light["text"] + dark["text"]
