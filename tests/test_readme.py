"""The README's code blocks do what they show.

Python blocks are executed. A block after ``<!-- test: file NAME -->`` is written to a folder of its
own, one after ``<!-- test: run -->`` is executed line by line in that folder. Of all other blocks
the commands, options, settings and make targets must exist.
"""

import re
import sys
from pathlib import Path

import pytest

from tests.markdown_blocks import Block, blocks, check_command, commands, help_of, run, run_marked

ROOT = Path(__file__).parent.parent
BLOCKS = blocks(ROOT / "README.md")
SHELL = [b for b in BLOCKS if b.language in ("console", "bash")]
LINES = [(b.line, command) for b in SHELL for command in commands(b)]


def test_blocks_are_found() -> None:
    languages = [block.language for block in BLOCKS]
    assert languages.count("python") >= 3
    assert any(block.directive == "run" for block in SHELL)


@pytest.mark.parametrize(
    "block",
    [b for b in BLOCKS if b.language == "python" and not b.directive],
    ids=lambda b: f"line{b.line}",
)
def test_python_blocks_run(block: Block, tmp_path: Path) -> None:
    result = run([sys.executable, "-W", "error", "-c", block.text], tmp_path)
    assert result.returncode == 0, result.stderr


def test_marked_commands_run(tmp_path: Path) -> None:
    run_marked(BLOCKS, tmp_path)


@pytest.mark.parametrize(
    "command", [c for _, c in LINES if c.startswith("safe-offrl")], ids=lambda c: c[:60]
)
def test_commands_and_options_exist(command: str) -> None:
    check_command(command)


def test_commands_of_the_table_exist() -> None:
    rows = re.findall(
        r"^\| `safe-offrl ([\w-]+).*?` \| (.*) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert {name for name, _ in rows} == {
        *("collect", "inspect", "convert", "check-env"),
        *("pretrain", "assess", "finetune", "evaluate", "certify", "verify", "compare"),
        *("ledger", "benchmark", "export", "trust", "demo"),
    }
    for name, text in rows:
        for option in re.findall(r"`(--[a-z-]+)", text):
            assert re.search(rf"{option}\b", help_of(name)), f"{name} has no {option}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`?make ([a-z][a-z-]*)`?", (ROOT / "README.md").read_text())
    assert {"demo", "test", "check"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
