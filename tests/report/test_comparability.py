"""What is not comparable is not pooled: rules, thresholds, horizons, constraints, environments."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safe_offrl.commands.compare import compare_runs
from safe_offrl.env.identity import KEY
from safe_offrl.errors import RunError
from safe_offrl.record.run import RESUMED
from safe_offrl.report.comparison import Comparison, compare
from safe_offrl.report.tables import format_table

RLPD = {"kl": False, "safety_constraint": False, "shield": False, "guard": False}
EVALUATION = {"episodes": 50, "accidents": 5, "mean_return": 2.5, "mean_length": 50.0}
EVALUATION |= {"return_standard_error": 0.25, "mean_cost": 1.5, "cost_standard_error": 0.1}
Write = Callable[..., Path]


def identity(edge: float = 1.0, **changes: Any) -> dict[str, Any]:
    environment = {"id": "A-v0", "kwargs": {"edge": edge}, "sources": {}, "packages": {}}
    rule = {"accident": "cost", "cost_threshold": 0.0, "sources": {}, "packages": {}}
    return {"environment": environment, "rule": rule, "horizon": 40} | changes


def safety(**settings: Any) -> dict[str, Any]:
    return {
        "epsilon": 0.1,
        "confidence": 0.95,
        "accident": "cost",
        "cost_threshold": 0.0,
    } | settings


def in_environment(path: Path, *identities: Any, source: str | None = None) -> Path:
    """The run folder, its versions.json as of a run that began in the first of these."""
    known = {KEY: identities[0], RESUMED: list(identities[1:])} if identities else {}
    stated = {"environment": {"environment_source": source}} if source else {}
    (path / "versions.json").write_text(json.dumps({**known, **stated}))
    return path


def labels(result: Comparison) -> list[str]:
    return [row.label for row in result.groups]


ACCIDENTS = [1] * 5 + [0] * 35
# How one run of a method differs from another one, and what is said of it.
UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "rule": ({"safety": safety(accident="rr:half")}, "accident rule cost -> rr:half"),
    "threshold": ({"safety": safety(cost_threshold=25.0)}, "cost threshold 0.0 -> 25.0"),
    "horizon": ({"safety": safety(horizon=20)}, "horizon none -> 20"),
    "constraint": (
        {"safety": safety(constraint="cost", cost_limit=25.0)},
        "constraint accident -> cost",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_settings_that_make_another_question(write_run: Write, name: str) -> None:
    """Of runs of any version: settings are in config.yaml."""
    settings, words = UNLIKE[name]
    horizon = {"safety": safety(horizon=40)} if name == "horizon" else {"safety": safety()}
    first = write_run("l", ACCIDENTS, **horizon)
    second = write_run("h", ACCIDENTS, seed=1, **settings)
    result = compare([first, second])
    assert (result.groups, result.pairings) == ([], [])
    words = words.replace("none", "40")
    assert result.notes[0] == (
        "The runs of PointHazard-v0 differ, and nothing is pooled or compared over them: variant 2 "
        f"(h) differs from variant 1 (l) in {words}."
    )
    assert [row.accidents for row in result.rows] == [5, 5]  # each by itself is there


@pytest.mark.parametrize(
    "change",
    [
        {"safety": safety(epsilon=0.3)},
        {"safety": safety(delta=1.0)},
        {"budget": 7},
        {"safety": safety(confidence=0.9)},
    ],
    ids=str,
)
def test_limits_and_budgets_may_differ(write_run: Write, change: dict[str, Any]) -> None:
    paths = [
        write_run("a", ACCIDENTS, safety=safety()),
        write_run("b", ACCIDENTS, seed=1, **change),
    ]
    assert labels(compare(paths)) == ["ALL 2 runs"]


def test_another_environment_under_the_id(write_run: Write) -> None:
    a, b, c = (write_run(name, ACCIDENTS, seed=seed) for seed, name in enumerate("abc"))
    in_environment(a, identity())
    in_environment(b, identity(0.2))
    in_environment(c, identity())
    result = compare([a, b, c])
    assert result.notes[0].endswith(
        "variant 2 (b) differs from variant 1 (a, c) in kwargs edge 1.0 -> 0.2."
    )
    # What can be pooled is: the two of one environment.
    rows = {row.label: (row.seeds, row.accidents) for row in result.groups}
    assert rows == {
        "ALL 2 runs, PointHazard-v0 (variant 1)": ([0, 2], 10),
        "ALL 1 run, PointHazard-v0 (variant 2)": ([1], 5),
    }
    assert labels(compare([a, c])) == ["ALL 2 runs"]
    assert compare([a, c]).notes == []


def test_another_rule_behind_its_name(write_run: Write) -> None:
    def rule(source: str) -> dict[str, Any]:
        return identity(rule={"accident": "r:f", "sources": {"r": source}, "packages": {}})

    paths = [write_run(name, ACCIDENTS, seed=seed) for seed, name in enumerate("ab")]
    for path, source in zip(paths, "12", strict=True):
        in_environment(path, rule(source))
    result = compare(paths)
    assert result.groups == []
    assert result.notes[0].endswith("in the source of r.")


def test_the_file_of_the_environment_tells_runs_of_earlier_versions_apart(write_run: Write) -> None:
    paths = [write_run(name, ACCIDENTS, seed=seed) for seed, name in enumerate("abc")]
    for path, source in zip(paths, ("1" * 64, "1" * 64, "2" * 64), strict=True):
        in_environment(path, source=source)
    assert labels(compare(paths[:2])) == ["ALL 2 runs"]
    result = compare(paths)
    assert result.notes[0].startswith("The runs of PointHazard-v0 differ, and nothing is pooled")
    assert not any(row.seeds == [0, 1, 2] for row in result.groups)


def test_what_a_run_does_not_say_is_what_the_others_say_if_they_agree(write_run: Write) -> None:
    old, new, other = (write_run(n, ACCIDENTS, seed=k) for k, n in enumerate("abc"))
    in_environment(new, identity())
    in_environment(other, identity(0.2))
    assert labels(compare([old, new])) == ["ALL 2 runs"]
    # Of two that disagree it could be either: it is pooled with neither.
    result = compare([old, new, other])
    assert result.groups == []
    assert len({run.env_id for run in result.runs}) == 3


def test_methods_are_compared_within_one_environment_only(write_run: Write) -> None:
    paths = []
    for seed, edge in enumerate((1.0, 1.0, 0.2)):
        for flags, name, accidents in ((None, "safe", 2), (RLPD, "free", 4)):
            path = write_run(f"{name}-{seed}", [1] * accidents + [0] * 36, seed=seed, flags=flags)
            paths.append(in_environment(path, identity(edge)))
    result = compare(paths)
    found = {(p.first, p.second): (p.pairs, p.accidents) for p in result.pairings}
    assert found == {
        (f"constrained{end}", f"rlpd (all off){end}"): counts
        for end, counts in (
            (", PointHazard-v0 (variant 1)", (2, (4, 8))),
            (", PointHazard-v0 (variant 2)", (1, (2, 4))),
        )
    }
    # A method that was run in another environment than the other one is compared with nobody.
    assert compare([paths[0], paths[5]]).pairings == []


def test_environments_are_not_pooled_while_one_of_them_is_two(write_run: Write) -> None:
    def runs(edge: float) -> list[Path]:
        found = []
        for env in ("A-v0", "B-v0"):
            for seed in (0, 1):
                path = write_run(f"{env}-{seed}-{edge}", ACCIDENTS, seed=seed, env=env)
                found.append(in_environment(path, identity(edge if env == "B-v0" else 1.0)))
        return found

    assert "ALL 4 runs, all environments" in labels(compare(runs(1.0)))
    mixed = [*runs(0.5)[:2], *runs(0.2)[2:], *runs(0.3)[2:]]
    assert labels(compare(mixed)) == [
        "ALL 2 runs, A-v0",
        "ALL 2 runs, B-v0 (variant 1)",
        "ALL 2 runs, B-v0 (variant 2)",
    ]


def test_evaluations_elsewhere_are_named_and_not_pooled(write_run: Write) -> None:
    def evaluated(name: str, seed: int, edge: float) -> Path:
        evaluation = EVALUATION | {KEY: identity(edge)}
        path = write_run(name, ACCIDENTS, seed=seed, evaluation=evaluation)
        return in_environment(path, identity())

    same, also, other = evaluated("a", 0, 1.0), evaluated("b", 1, 1.0), evaluated("c", 2, 0.2)
    assert labels(compare([same, also])) == ["ALL 2 runs"]
    assert compare([same, also]).notes == []
    result = compare([same, other])
    assert result.groups == []
    assert "in the evaluation's kwargs edge 1.0 -> 0.2." in result.notes[0]
    assert result.notes[1] == (
        "c was evaluated in another environment than it ran in: kwargs edge 1.0 -> 0.2."
    )


def test_every_form_of_the_comparison_keeps_them_apart(tmp_path: Path, write_run: Write) -> None:
    paths = [write_run(name, ACCIDENTS, seed=seed) for seed, name in enumerate("ab")]
    for path, edge in zip(paths, (1.0, 0.2), strict=True):
        in_environment(path, identity(edge))
    page, text, chart = (tmp_path / name for name in ("c.html", "c.md", "c.svg"))
    said: list[str] = []
    result = compare_runs(paths, html=page, markdown=text, svg=chart, say=said.append)
    json.dumps(result, allow_nan=False)
    assert (result["groups"], result["pairings"]) == ([], [])
    assert [row["environment"] for row in result["runs"]] == [
        "PointHazard-v0 (variant 1)",
        "PointHazard-v0 (variant 2)",
    ]
    note = result["notes"][0]
    plain = format_table(compare(paths))
    assert f"Note: {note}" in plain
    assert "ALL" not in plain
    for shown in (page.read_text(), text.read_text().replace("\\", "")):
        assert "differs from variant 1 (a) in kwargs edge 1.0 -" in shown
        assert "ALL 2 runs" not in shown
        # Charts, too: a section for each, and no mean over both.
        assert "PointHazard-v0 (variant 2)" in shown


@pytest.mark.parametrize("damaged", [3, "text", [1], None])
def test_an_identity_that_is_none_is_one_sentence(write_run: Write, damaged: object) -> None:
    path = in_environment(write_run("a", ACCIDENTS), damaged)
    with pytest.raises(RunError, match="holds a value that cannot be read"):
        compare([path])


def test_runs_of_other_limits_are_compared_and_it_is_said(write_run: Write) -> None:
    both = safety(limits={"accident": 0.1, "cost": 25.0})
    runs = [
        write_run("one", ACCIDENTS, safety=safety()),
        write_run("two", ACCIDENTS, seed=1, safety=both),
    ]
    result = compare(runs)
    said = "The runs differ in constraint: accident < 0.1, accident < 0.1 and cost < 25."
    assert said in result.notes
    assert len(result.groups) == 1
