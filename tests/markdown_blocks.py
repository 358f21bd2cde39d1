"""Code blocks of a Markdown file, and what tests do with them.

A block after ``<!-- test: file NAME -->`` is a file of the reader's folder, one after
``<!-- test: run -->`` is executed there. What is not executed must at least exist.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from safe_offrl.collect.log_plan import CollectConfig
from safe_offrl.config import schema_keys
from safe_offrl.train.finetune_config import FinetuneConfig
from safe_offrl.train.pretrain_config import PretrainConfig

SCRIPTS = Path(sys.executable).parent
# What a command takes as key=value, where it is not pretrain's settings or some of them.
SCHEMAS: dict[str, tuple[type[Any], ...]] = {
    "collect": (CollectConfig, PretrainConfig),
    "finetune": (FinetuneConfig,),
}


class Block(NamedTuple):
    line: int
    directive: str  # what stands in <!-- test: ... -->, or ""
    language: str
    text: str


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a file; a block without a language is output, to be read only."""
    content = path.read_text()
    pattern = r"(?:<!-- test: (.*?) -->\n)?^```(\w*)\n(.*?)^```$"
    found = [
        Block(content[: m.start(2)].count("\n") + 1, m[1] or "", m[2], m[3])
        for m in re.finditer(pattern, content, re.MULTILINE | re.DOTALL)
    ]
    assert len(found) == content.count("\n```") / 2, f"{path}: a block that does not end"
    assert sum(bool(b.directive) for b in found) == content.count("<!-- test:"), path
    return found


def commands(block: Block) -> list[str]:
    """The command lines of a shell block: those after "$ " of a console, all of a script."""
    if block.language == "console":
        return [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
    return [line for line in block.text.splitlines() if line] if block.language == "bash" else []


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder`` with the installed scripts on the path."""
    environment = os.environ | {
        "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",  # help texts are wrapped to the terminal, and options cut
        "NO_COLOR": "1",
        "TERM": "dumb",
    }
    environment.pop("PYTHONPATH", None)  # what the reader does not have
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def run_marked(found: list[Block], folder: Path) -> dict[str, str]:
    """Write the files, then execute what is marked, in order; {command: its output}."""
    outputs: dict[str, str] = {}
    for block in found:
        if block.directive.startswith("file "):
            (folder / block.directive.removeprefix("file ")).write_text(block.text)
    for block in found:
        if block.directive != "run":
            continue
        if block.language == "python":
            lines = {block.text: [sys.executable, "-W", "error", "-c", block.text]}
        else:
            lines = {command: shlex.split(command) for command in commands(block)}
        for text, command in lines.items():
            result = run(command, folder)
            assert result.returncode == 0, f"line {block.line}: {text}\n{result.stderr}"
            outputs[text] = result.stdout
    return outputs


@functools.cache
def help_of(command: str) -> str:
    """The help of a command of safe-offrl, or of safe-offrl itself for ""."""
    result = run([str(SCRIPTS / "safe-offrl"), *command.split(), "--help"], SCRIPTS)
    assert result.returncode == 0, f"safe-offrl {command} --help: {result.stderr}"
    return result.stdout


def check_command(command: str) -> None:
    """Every option and every setting of a safe-offrl command line must exist."""
    _, name, *arguments = shlex.split(command)
    for before, argument in zip(["", *arguments], arguments, strict=False):
        key, equals, _ = argument.partition("=")
        if before == "--limit":  # whose values have a name
            equals = ""
        if key.startswith("--"):
            assert re.search(rf"{key}\b", help_of(name)), f"{name} has no {key}"
        elif equals:
            schemas = SCHEMAS.get(name, (PretrainConfig,))
            owner = key.rpartition(".")[0]  # of an entry of a dict
            known = any({key, owner} & set(schema_keys(schema)) for schema in schemas)
            assert known, f"{name} has no setting {key}"
    assert help_of(name)
