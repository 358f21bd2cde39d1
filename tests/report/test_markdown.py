"""The Markdown of a comparison: read back, it holds the tables, cell by cell."""

import re

from safe_offrl.report.comparison import compare
from safe_offrl.report.markdown import markdown, write_markdown
from safe_offrl.report.tables import LEGEND, tables_of


def _plain(text):
    return re.sub(r"\\(.)", r"\1", text)


def _tables(text):
    """(title, header, rows) of every table below a heading."""
    found = []
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        title, _, rest = part.partition("\n\n")
        lines = [line for line in rest.splitlines() if line.startswith("| ")]
        cells = [[_plain(cell) for cell in re.split(r"(?<!\\) \| ", line[2:-2])] for line in lines]
        header, rule, *rows = cells
        assert set("".join(rule)) == {":", "-"}
        assert {len(row) for row in rows} == {len(header)} == {len(rule)}
        found.append((_plain(title), header, rows))
    return found


def test_it_reads_back_as_the_tables(paired_runs):
    comparison = compare(paired_runs(seeds=2, episodes=150))
    tables = tables_of(comparison)
    groups = [(t.title, t.header, t.groups) for t in tables if t.groups]
    runs = [(t.title, t.header, t.rows) for t in tables if t.rows]
    assert len(groups) == 6
    assert _tables(markdown(comparison)) == groups + runs


def test_runs_are_folded_away_behind_their_groups(write_group, write_run):
    text = markdown(compare([write_group("ours", [[0], [1]])]))
    assert text.index("ALL 2 runs") < text.index("<details>") < text.index("ours/0")
    assert text.rstrip().endswith("below the limit.")
    assert "<details>" not in markdown(compare([write_run("alone", [0])]))


def test_a_name_is_not_markup(write_group):
    path = write_group("a|b*c", [[0], [1]])
    text = markdown(compare([path]))
    assert "a\\|b\\*c" in text
    assert _tables(text)[0][2][0][1] == "a|b*c"
    assert _plain(text).count(LEGEND) == 1


def test_charts_are_linked_from_where_it_lies(tmp_path, write_run):
    comparison = compare([write_run("a", [0])])
    (tmp_path / "docs").mkdir()
    path = tmp_path / "docs" / "a.md"
    write_markdown(comparison, path, [tmp_path / "docs" / "my chart.png", tmp_path / "c.svg"])
    assert "![Charts of the comparison](<my chart.png>)" in path.read_text()
    assert "![Charts of the comparison](<../c.svg>)" in path.read_text()
    write_markdown(comparison, path)
    assert "![" not in path.read_text()
