"""The code blocks of the README and of the pages behind it do what they show.

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
README = ROOT / "README.md"
# custom_environments.md has a test of its own: all of it is executed.
PAGES = [
    README,
    *(ROOT / "docs" / name for name in ("method.md", "reference.md", "datasets.md")),
    ROOT / "docs" / "results" / "README.md",
]
FOUND = [(page, block) for page in PAGES for block in blocks(page)]
SHELL = [(page, block) for page, block in FOUND if block.language in ("console", "bash")]
LINES = [command for _, block in SHELL for command in commands(block)]
TOPS = ("safe_offrl", "tests", "envs", "benchmarks")


def test_blocks_are_found() -> None:
    languages = [block.language for _, block in FOUND]
    assert languages.count("python") >= 3
    assert any(page == README and block.directive == "run" for page, block in SHELL)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{page.stem}-line{block.line}")
        for page, block in FOUND
        if block.language == "python" and not block.directive
    ],
)
def test_python_blocks_run(block: Block, tmp_path: Path) -> None:
    result = run([sys.executable, "-W", "error", "-c", block.text], tmp_path)
    assert result.returncode == 0, result.stderr


def test_marked_commands_run(tmp_path: Path) -> None:
    run_marked(blocks(README), tmp_path)


@pytest.mark.parametrize(
    "command", [c for c in LINES if c.startswith("safe-offrl")], ids=lambda c: c[:60]
)
def test_commands_and_options_exist(command: str) -> None:
    check_command(command)


def test_commands_of_the_table_exist() -> None:
    rows = re.findall(r"^\| `safe-offrl ([\w-]+).*?` \| (.*) \|$", README.read_text(), re.M)
    assert {name for name, _ in rows} == {
        *("collect", "inspect", "convert", "check-env"),
        *("pretrain", "assess", "finetune", "evaluate", "certify", "verify", "compare"),
        *("ledger", "benchmark", "replay", "export", "trust", "demo"),
    }
    for name, text in rows:
        for option in re.findall(r"`(--[a-z-]+)", text):
            assert re.search(rf"{option}\b", help_of(name)), f"{name} has no {option}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [t for page in PAGES for t in re.findall(r"`make ([a-z][a-z-]*)", page.read_text())]
    assert {"demo", "test", "check"} <= set(targets)
    for target in targets:
        assert re.search(rf"^([a-z-]+ )*{target}( [a-z-]+)*:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs" / "custom_environments.md"], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        if ":" in target:  # somebody else's page
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in slugs, target


def test_python_files_that_are_named_exist() -> None:
    """In the pages, and in what the sources say of each other."""
    written = {"my_env.py", "my_agent.py"}  # by whoever follows the page
    existing = {path.name for top in TOPS for path in sources(top)}
    for path in [*PAGES, *sources("safe_offrl"), *sources("envs")]:
        named = set(re.findall(r"\b[a-z_]+\.py\b", path.read_text()))
        assert named <= existing | written, path


def sources(top: str) -> list[Path]:
    return sorted((ROOT / top).rglob("*.py"))
