"""Which files and distributions a module depends on, read without importing any of them."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from safe_offrl.env import module_sources
from safe_offrl.env.module_sources import sources_and_packages

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tree]:
    """``tree(path=text, ...)``: write files, "a__b" being a/b.py, below a folder of sys.path."""

    def write(folder: str = "here", **files: str) -> Path:
        root = tmp_path / folder
        for name, text in files.items():
            path = root / f"{name.replace('__', '/')}.py"
            path = path.with_name("__init__.py") if path.name == "init.py" else path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(root)
        return root

    module_sources._by_package.cache_clear()
    yield write
    module_sources._by_package.cache_clear()
    assert not [name for name in sys.modules if name.startswith("ms_")]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sources(*names: str) -> list[str]:
    return list(sources_and_packages(names)["sources"])


def test_files_and_modules_that_a_module_names_count(tree: Tree) -> None:
    """Numbers in a file beside it, and what it imports by a name in a text."""
    root = tree(
        ms_a='import importlib\nP = "params.json"\nM = importlib.import_module("ms_p.sub")\n',
        ms_p__init="",
        ms_p__sub="EDGE = 1.0\n",
        ms_b='"""See params.yaml, ../secret.txt and /etc/passwd."""\nX = "/etc/passwd"\n',
    )
    (root / "params.json").write_text('{"edge": 1.0}')
    (root / "params.yaml").write_text("edge: 1.0")
    before = sources_and_packages(["ms_a"])["sources"]
    assert list(before) == ["ms_a", "ms_a: params.json", "ms_p", "ms_p.sub"]
    (root / "params.json").write_text('{"edge": 0.2}')
    after = sources_and_packages(["ms_a"])["sources"]
    assert {name for name in before if before[name] != after[name]} == {"ms_a: params.json"}
    assert sources("ms_b") == ["ms_b"]  # a text that is no name, and what lies elsewhere


def test_what_a_module_imports_counts_and_what_lies_beside_it_does_not(tree: Tree) -> None:
    tree(
        ms_a="import os, ms_b\nfrom ms_c import x\n",
        ms_b="def late():\n    import ms_d\n",
        ms_c="import ms_a\nx = 1\n",  # in a circle
        ms_d="",
        ms_e="",
    )
    found = sources_and_packages(["ms_a"])
    assert list(found["sources"]) == ["ms_a", "ms_b", "ms_c", "ms_d"]
    assert found["sources"]["ms_c"] == sha256("import ms_a\nx = 1\n")
    assert found["packages"] == {}
    assert sources("ms_e") == ["ms_e"]


@pytest.mark.parametrize(
    ("text", "imported"),
    [
        ("import ms_p.one", ["one"]),
        ("from ms_p import one", ["one"]),
        ("from . import one", ["one"]),
        ("from .one import x", ["one"]),
        ("from .sub import deep", ["sub", "sub.deep"]),
        ("from ms_p.sub.deep import x as y", ["sub", "sub.deep"]),
        ("try:\n    from .one import x\nexcept ImportError:\n    pass", ["one"]),
        ("class A:\n    from .one import x", ["one"]),
        ("import ms_nowhere, ms_p.nothing", []),
        ("from ..outside import x", []),
        ("this is no Python", []),
    ],
)
def test_every_way_to_import(tree: Tree, text: str, imported: list[str]) -> None:
    tree(
        ms_p__init="",
        ms_p__one="x = 1\n",
        ms_p__sub__init="",
        ms_p__sub__deep="from ..one import x\n" if "as y" in text else "x = 1\n",
        ms_p__start=text,
    )
    # What is above a module is imported with it.
    expected = ["ms_p", "ms_p.start", *(f"ms_p.{name}" for name in imported)]
    if "as y" in text:
        expected.append("ms_p.one")
    assert sources("ms_p.start") == sorted(expected)


def test_a_relative_import_in_a_package_begins_at_the_package(tree: Tree) -> None:
    tree(ms_q__init="from .one import x\n", ms_q__one="x = 1\n", one="x = 2\n")
    assert sources("ms_q") == ["ms_q", "ms_q.one"]


def installed(root: Path, name: str, version: str, *packages: str) -> None:
    folder = root / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (folder / "top_level.txt").write_text("\n".join(packages))


def test_an_installed_distribution_is_its_version(tree: Tree) -> None:
    root = tree("site-packages", ms_lib__init="import ms_dep\n", ms_lib__sim="", ms_dep="")
    installed(root, "ms-simulator", "1.2", "ms_lib")
    installed(root, "ms-dependency", "3.4", "ms_dep")
    tree("site-packages", ms_loose="")  # put there by hand
    tree(ms_mine="import ms_lib.sim\nimport ms_loose\n")
    found = sources_and_packages(["ms_mine"])
    # What the distribution needs itself is a matter of its version.
    assert found["packages"] == {"ms-simulator": "1.2"}
    assert list(found["sources"]) == ["ms_loose", "ms_mine"]


def test_an_editable_install_is_its_sources(tree: Tree) -> None:
    """Only its name lies among the installed ones: its version says nothing of an edit."""
    installed(tree("site-packages", unrelated=""), "ms-editable", "1.0", "ms_edit")
    root = tree("checkout", ms_edit__init="", ms_edit__env="x = 1\n")
    before = sources_and_packages(["ms_edit.env"])
    assert (list(before["sources"]), before["packages"]) == (["ms_edit", "ms_edit.env"], {})
    (root / "ms_edit" / "env.py").write_text("x = 2\n")
    assert sources_and_packages(["ms_edit.env"]) != before


def test_what_only_a_function_takes_from_a_distribution_does_not_count(tree: Tree) -> None:
    """A window that is drawn into is another one on the machine that learns, or missing there."""
    root = tree("site-packages", ms_window="", ms_physics="")
    installed(root, "ms-window", "1.0", "ms_window")
    installed(root, "ms-physics", "2.0", "ms_physics")
    tree(
        ms_env="""
import ms_physics
from ms_near import x

def render():
    import ms_window
    from ms_far import y
""",
        ms_near="x = 1\n",
        ms_far="y = 1\n",
    )
    found = sources_and_packages(["ms_env"])
    assert found["packages"] == {"ms-physics": "2.0"}
    assert list(found["sources"]) == ["ms_env", "ms_far", "ms_near"]


def test_python_numpy_gymnasium_and_this_package_do_not_count(tree: Tree) -> None:
    tree(
        ms_env="""
import json, math, sys, multiprocessing.connection, lib2to3
import gymnasium, numpy as np
from gymnasium.envs.registration import register
from numpy.random import default_rng
import safe_offrl
from safe_offrl.data_formats.loading import load_dataset
from safe_offrl.envs.hazard_line import HazardLineEnv
"""
    )
    found = sources_and_packages(["ms_env", "builtins", "typing", "gymnasium.core"])
    assert found["packages"] == {}
    # ... but for its environments, which others are made from.
    assert list(found["sources"]) == ["ms_env", "safe_offrl.envs.hazard_line"]


def test_a_module_without_a_file_is_unknown(tree: Tree) -> None:
    tree(ms_data="")
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("zz_typed", None))
    sys.modules["zz_typed"] = module
    try:
        assert sources_and_packages(["zz_typed"])["sources"] == {"zz_typed": "unknown"}
    finally:
        del sys.modules["zz_typed"]
    assert sources_and_packages(["zz_nowhere"])["sources"] == {"zz_nowhere": "unknown"}


def test_lines_may_end_as_on_windows(tree: Tree) -> None:
    root = tree(ms_unix="x = 1\ny = 2\n")
    before = sources_and_packages(["ms_unix"])
    (root / "ms_unix.py").write_bytes(b"x = 1\r\ny = 2\r\n")
    assert sources_and_packages(["ms_unix"]) == before
