"""The guide to custom environments does what it shows, in a folder outside the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.markdown_blocks import blocks, check_command, commands, run_marked

ROOT = Path(__file__).parent.parent
BLOCKS = blocks(ROOT / "docs" / "custom_environments.md")


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The reader's folder after every marked block, and what each command printed."""
    folder = tmp_path_factory.mktemp("guide")
    return folder, run_marked(BLOCKS, folder)


def test_the_guide_goes_from_an_empty_file_to_a_comparison(
    followed: tuple[Path, dict[str, str]],
) -> None:
    folder, outputs = followed
    names = {command.split()[1] for command in outputs if command.startswith("safe-offrl")}
    assert names == {
        *("check-env", "collect", "inspect", "pretrain", "finetune", "evaluate", "compare"),
        "export",
    }
    for name in ("safe", "free"):
        ledger = (folder / "runs" / name / "ledger.jsonl").read_text().splitlines()
        assert sum(json.loads(line)["steps"] for line in ledger) <= 400
        evaluation = json.loads((folder / "runs" / name / "evaluation.json").read_text())
        assert evaluation["episodes"] == 20
        assert list((folder / "runs" / name).glob("events.out.tfevents.*"))
    assert (folder / "comparison.png").stat().st_size > 10_000
    (table,) = [text for command, text in outputs.items() if " compare " in command]
    assert "Paired comparison (same pretrained policy, same seed)" in table


def test_the_environment_owes_us_nothing() -> None:
    files = [b.text for b in BLOCKS if b.directive.startswith("file ")]
    assert len(files) == 3
    assert not [text for text in files if "safe_offrl" in text]
    assert len(files[0].splitlines()) < 40
    in_readme = [b.text for b in blocks(ROOT / "README.md") if b.directive == "file my_env.py"]
    assert in_readme in ([], files[:1])


def test_what_check_env_prints_is_what_the_guide_shows(
    followed: tuple[Path, dict[str, str]],
) -> None:
    shown = {line for b in BLOCKS if not b.language for line in b.text.splitlines()}
    printed = {
        line
        for command, text in followed[1].items()
        if "check-env" in command
        for line in text.splitlines()
    }
    # Speed differs from machine to machine, and with it times; the others are seeded.
    timed = ("ok    speed", "ok    default log")
    assert {line for line in shown if not line.startswith(timed)} <= printed


def test_the_accident_rules_find_accidents(followed: tuple[Path, dict[str, str]]) -> None:
    checks = [text for command, text in followed[1].items() if "check-env" in command]
    assert len(checks) == 4
    assert all("0 warnings" in text for text in checks)


def test_the_dry_runs_state_the_constraints(followed: tuple[Path, dict[str, str]]) -> None:
    one, both = [text for command, text in followed[1].items() if "--dry-run" in command]
    cost = "expected cost of 40 steps < 0.1 (cost_limit)"
    assert cost in one
    assert f"P(accident in 40 steps) < 0.3 (epsilon), {cost}" in both


@pytest.mark.parametrize(
    "command",
    [c for b in BLOCKS for c in commands(b) if c.startswith("safe-offrl")],
    ids=lambda c: c[:60],
)
def test_commands_and_options_exist(command: str) -> None:
    check_command(command)
