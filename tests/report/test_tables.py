import json
import re
from typing import Any

import numpy as np

from safe_offrl.report.comparison import compare
from safe_offrl.report.tables import format_table, tables_of


def test_table_holds_the_figures(write_run):
    accidents = np.zeros(200, bool)
    accidents[[0, 99, 100, 150]] = True
    text = format_table(compare([write_run("a", accidents, iterations=[{}])]))
    row = next(line for line in text.splitlines() if line.startswith("a ") and "10,000" in line)
    assert row.split()[:8] == ["a", "constrained,", "seed", "0", "200", "10,000", "4", "2"]
    assert "2.0% [" in row
    assert "0.40 [" in row
    assert row.endswith("0.02 +- 0.01")  # the cost of an episode
    assert "1/1 (100%)" in text
    assert max(map(len, text.splitlines())) <= 130


def test_table_of_groups_and_the_frozen_policy(write_run, paired_runs):
    frozen = write_run(
        "pi0",
        [],
        kind="pretrain",
        evaluation={
            "episodes": 500,
            "accidents": 40,
            "mean_return": 5.0,
            "mean_cost": 0.3,
            "cost_standard_error": 0.1,
        },
    )
    text = format_table(compare([frozen, *paired_runs(seeds=2, episodes=150)]))
    assert "pretrained (frozen), seed 0" in text
    assert "8.0% [" in text
    assert text.count("ALL 2 runs") == 8  # in four tables
    (line,) = [x for x in text.splitlines() if re.match(r"constrained +rlpd \(all off\) +2 ", x)]
    assert " vs " in line


def test_one_pair_has_no_interval(write_run):
    safe = write_run("safe", [0] * 40, returns=np.full(40, -1.0))
    flags = {"kl": False, "safety_constraint": False, "shield": False, "guard": False}
    free = write_run("free", [1] * 40, flags=flags, returns=np.full(40, -3.0))
    paired = {table.title: table for table in tables_of(compare([safe, free]))}
    accidents, returns = (t for title, t in paired.items() if title.startswith("Paired"))
    found = dict(zip(accidents.header, accidents.groups[0], strict=True))
    assert found["accidents"] == "0 vs 40"
    assert found["ratio"] == "0.00"
    assert found["exact"] != "-"
    assert (found["over seeds"], found["p over seeds"]) == ("-", "-")
    found = dict(zip(returns.header, returns.groups[0], strict=True))
    assert found["final return, difference"] == "+2.000"
    assert found["ratio"] == "-"  # of negative returns it would mean nothing


def test_of_many_runs_the_terminal_shows_the_groups(write_group):
    paths = [write_group(name, [[0]] * 11) for name in ("a", "b")]
    comparison = compare(paths)
    text = format_table(comparison)
    assert "a/10" not in text
    assert "--by-run lists each of the 22 runs." in text
    assert "a/10" in format_table(comparison, by_run=True)
    few = compare([write_group("c", [[0]] * 3)])
    assert "c/2" in format_table(few)
    assert "c/2" not in format_table(few, by_run=False)
    alone = compare([paths[0] / "7"])  # without a group, there is nothing else to show
    assert alone.groups == []
    assert "seed 7" in format_table(alone, by_run=False)


def test_what_never_proposed_has_no_share_of_proposals(write_run):
    text = format_table(compare([write_run("frozen", [0, 1], iterations=[])]))
    assert "nan" not in text
    assert "0/0" not in text


def test_versions_that_were_played_again_have_a_table(write_run, write_group):
    paths = [write_run(f"seed-{k}", [0] * 5, seed=k) for k in (0, 1)]
    assert not any("played again" in table.title for table in tables_of(compare(paths)))
    for path, above, correlation in ((paths[0], 1, 0.2), (paths[1], 2, None)):
        versions = [{"most_cost": 10.0 * k} for k in range(1, 5)]
        content = {"above": above, "correlation": correlation, "versions": versions, "kept": 4}
        (path / "replay.json").write_text(json.dumps(content))
    comparison = compare(paths)
    (table,) = [t for t in tables_of(comparison) if "played again" in t.title]
    assert [row[2:] for row in table.rows] == [
        ["4", "1 (25%)", "0.20", "40"],
        ["4", "2 (50%)", "-", "40"],
    ]
    assert [row[2:] for row in table.groups] == [["8", "3 (38%)", "0.20", "40"]]
    assert comparison.as_dict()["groups"][0]["replay"]["above"] == 3


def test_every_named_cost_has_a_table(write_run):
    paths = []
    for seed, costs in ((0, (0.0, 0.0, 2.0, 4.0)), (1, (0.0, 0.0, 0.0, 8.0))):
        signals = [{"vases": cost, "hazards": 1.0} for cost in costs]
        evaluation: dict[str, Any] = {"episodes": 2, "accidents": 0, "mean_return": 1.0}
        evaluation |= {"mean_cost": 0.0, "cost_standard_error": 0.0}
        evaluation |= {"signals": {"vases": (2.0 + seed, 0.5)}}
        given = {"signals": signals, "evaluation": evaluation, "seed": seed}
        paths.append(write_run(f"seed-{seed}", [0] * 4, **given))
    found = {
        table.title.split()[4]: table
        for table in tables_of(compare(paths))
        if "signal" in table.title
    }
    assert list(found) == ["hazards", "vases"]
    # Of 200 steps the last episode alone began in the last fifth.
    assert [row[2:] for row in found["vases"].rows] == [
        ["1.50 +- 0.96", "4.00", "2.00 +- 0.50"],
        ["2.00 +- 2.00", "8.00", "3.00 +- 0.50"],
    ]
    assert [row[2:] for row in found["vases"].groups] == [
        ["1.75 +- 0.25", "6.00 +- 2.00", "2.50 +- 0.50"]
    ]
    assert [row[2:] for row in found["hazards"].groups] == [["1.00 +- 0.00", "1.00 +- 0.00", "-"]]
    without = write_run("other", [0] * 4, seed=2, origin="pi1")
    tables = tables_of(compare([*paths, without]))
    assert not [table for table in tables if "signal" in table.title and table.rows[2][2] != "-"]
