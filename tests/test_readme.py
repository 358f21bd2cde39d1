"""The README's code blocks do what they show.

Python blocks are executed. A block after ``<!-- test: file NAME -->`` is written to a folder of its
own, one after ``<!-- test: run -->`` is executed line by line in that folder. Of all other blocks
the commands, options, settings and make targets must exist.
"""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from safe_offrl.config import schema_keys
from safe_offrl.finetune import FinetuneConfig
from safe_offrl.pretrain import PretrainConfig

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sys.executable).parent
SCHEMAS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


class Block(NamedTuple):
    line: int
    directive: str  # what stands in <!-- test: ... -->, or ""
    language: str
    text: str


def blocks() -> list[Block]:
    readme = (ROOT / "README.md").read_text()
    pattern = r"(?:<!-- test: (.*?) -->\n)?^```(\w*)\n(.*?)^```$"
    return [
        Block(readme[: m.start(2)].count("\n") + 1, m[1] or "", m[2], m[3])
        for m in re.finditer(pattern, readme, re.MULTILINE | re.DOTALL)
    ]


def commands(block: Block) -> list[str]:
    """The command lines of a shell block: those after "$ " of a console, all of a script."""
    if block.language == "console":
        return [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
    return [line for line in block.text.splitlines() if line]


BLOCKS = blocks()
SHELL = [b for b in BLOCKS if b.language in ("console", "bash")]
LINES = [(b.line, command) for b in SHELL for command in commands(b)]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",  # help texts are wrapped to the terminal, and options cut
        "NO_COLOR": "1",
        "TERM": "dumb",
    }
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


@functools.cache
def help_of(command: str) -> str:
    result = run([str(SCRIPTS / "safe-offrl"), *command.split(), "--help"], ROOT)
    assert result.returncode == 0, f"safe-offrl {command} --help: {result.stderr}"
    return result.stdout


def test_blocks_are_found() -> None:
    languages = [block.language for block in BLOCKS]
    assert languages.count("python") >= 3
    assert any(block.directive == "run" for block in SHELL)
    assert len(languages) == (ROOT / "README.md").read_text().count("\n```") / 2


@pytest.mark.parametrize(
    "block",
    [b for b in BLOCKS if b.language == "python" and not b.directive],
    ids=lambda b: f"line{b.line}",
)
def test_python_blocks_run(block: Block, tmp_path: Path) -> None:
    result = run([sys.executable, "-W", "error", "-c", block.text], tmp_path)
    assert result.returncode == 0, result.stderr


def test_marked_commands_run(tmp_path: Path) -> None:
    for block in BLOCKS:
        if block.directive.startswith("file "):
            (tmp_path / block.directive.removeprefix("file ")).write_text(block.text)
    for block in SHELL:
        if block.directive == "run":
            for command in commands(block):
                result = run(shlex.split(command), tmp_path)
                assert result.returncode == 0, f"{command}\n{result.stderr}"


@pytest.mark.parametrize(
    "command", [c for _, c in LINES if c.startswith("safe-offrl")], ids=lambda c: c[:60]
)
def test_commands_and_options_exist(command: str) -> None:
    _, name, *arguments = shlex.split(command)
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if key.startswith("--"):
            assert re.search(rf"{key}\b", help_of(name)), f"{name} has no {key}"
        elif equals:
            assert key in schema_keys(SCHEMAS[name]), f"{name} has no setting {key}"
    assert help_of(name)


def test_commands_of_the_table_exist() -> None:
    rows = re.findall(
        r"^\| `safe-offrl (\w+).*?` \| (.*) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert {name for name, _ in rows} == {
        *("collect", "inspect", "pretrain", "finetune", "evaluate", "compare", "demo")
    }
    for name, text in rows:
        for option in re.findall(r"`(--[a-z-]+)", text):
            assert re.search(rf"{option}\b", help_of(name)), f"{name} has no {option}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`?make ([a-z]+)`?", (ROOT / "README.md").read_text())
    assert {"demo", "test", "check"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
