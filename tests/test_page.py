"""The comparison page: whole in itself, readable by machines, and sortable in a real browser."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from safe_offrl import charts
from safe_offrl.page import html_page, write_html
from safe_offrl.report import compare

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
VOID = {"meta", "link", "img", "source", "br"}


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
    sources = [
        value
        for _, attributes in found.tags
        for key, value in attributes.items()
        if key in ("src", "srcset", "href")
    ]
    assert len(sources) == 5  # two charts in two colour schemes, and no icon to be asked for
    assert all(source is not None and source.startswith("data:") for source in sources)
    assert "http" not in re.sub(r"data:[^\"]*", "", page)


def test_it_can_be_read_without_seeing_it(page: str) -> None:
    found = Reader(page)
    assert [t for t, _ in found.tags].count("h1") == 1
    assert dict(found.tags)["html"] == {"lang": "en"}
    assert all(attributes.get("alt") for tag, attributes in found.tags if tag == "img")
    heads = [attributes for tag, attributes in found.tags if tag == "th"]
    assert heads
    assert all(head == {"scope": "col"} for head in heads)
    # Columns are sorted by buttons, and what scrolls can be reached by the keyboard.
    assert [t for t, _ in found.tags].count("button") == len(heads)
    regions = [a for t, a in found.tags if t == "div"]
    assert all(r["tabindex"] == "0" and r["aria-label"] for r in regions)


def test_numbers_sort_as_numbers(page: str) -> None:
    values = [a["data-value"] for t, a in Reader(page).tags if t == "td" and "data-value" in a]
    assert values
    assert all(value is not None and float(value) >= -1e9 for value in values)


def test_without_online_runs_there_are_tables_alone(write_run, tmp_path: Path) -> None:
    write_html(compare([write_run("a", [], kind="pretrain")]), tmp_path / "page.html")
    assert "<img" not in (tmp_path / "page.html").read_text()


def test_pareto_front_by_hand() -> None:
    points = [(3.0, 5.0), (1.0, 2.0), (2.0, 1.0), (2.0, 4.0), (4.0, 5.0), (1.0, 1.0)]
    assert charts.pareto_front(points) == [(1.0, 2.0), (2.0, 4.0), (3.0, 5.0)]


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_a_browser_draws_and_sorts_it_without_complaint(page: str, tmp_path: Path) -> None:
    assert BROWSER is not None
    probe = """
    const buttons = [...document.querySelectorAll("th button")];
    const head = buttons.find(button => button.textContent === "accidents");
    const column = head.closest("th").cellIndex;
    const cells = () => [...head.closest("table").tBodies[0].rows].map(
      row => row.cells[column].textContent);
    const found = {before: cells()};
    head.click(); found.down = cells(); found.sort = head.closest("th").ariaSort;
    head.click(); found.up = cells();
    found.drawn = [...document.images].map(image => image.complete && image.naturalWidth > 0);
    found.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    document.title = JSON.stringify(found);
    """
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", f"<script>onload = () => {{{probe}}}</script></body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=500,900", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    result = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in result.stderr
    title = re.search(r"<title>(.*?)</title>", result.stdout)
    assert title is not None
    found = json.loads(html.unescape(title[1]))
    known = [cell for cell in found["before"] if cell != "-"]
    assert found["down"] == [*sorted(known, key=int, reverse=True), "-"]
    assert found["up"] == [*sorted(known, key=int), "-"]
    assert found["sort"] == "descending"
    assert found["drawn"] == [True, True]
    assert found["wide"] == 0  # on a narrow screen only the tables scroll sideways
