"""What a module's behaviour depends on: its source and what it imports, by hash or version."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

OURS = "safe_offrl"
_APART = {"numpy", "gymnasium"}  # top-level packages whose versions are kept, but do not count
_STANDARD = {Path(ast.__file__).parent, Path(sysconfig.get_path("stdlib"))}
_INSTALLED = {"site-packages", "dist-packages"}  # folders that hold installed distributions


def sources_and_packages(modules: Iterable[str]) -> dict[str, dict[str, str]]:
    """{"sources": {module: sha256}, "packages": {distribution: version}} of what is imported.

    Sources are of the modules that no installed distribution holds (those of an editable install
    lie elsewhere), and of what these import in turn; packages are the distributions of the others,
    unless only a function imports them, say to draw a picture. A given module without a file, as of
    an interactive session, is "unknown". Of this package only environments count, by their source;
    of gymnasium only given environments; numpy does not.
    """
    given, seen = set(modules), set[str]()
    sources: dict[str, str] = {}
    packages: dict[str, str] = {}
    waiting = sorted(given)
    while waiting:
        # The next module.
        name = waiting.pop()
        if name in seen or not _counts(name, given):
            continue
        seen.add(name)
        path, is_package = _file(name)
        # What it is known by.
        if path is None:
            if name in given and name.partition(".")[0] not in sys.stdlib_module_names:
                sources[name] = "unknown"
        elif distributions := _distributions_of(name, path):
            packages |= {each: importlib.metadata.version(each) for each in distributions}
        elif not _STANDARD & set(path.parents):
            sources[name] = _file_sha256(path)
            # What it depends on in turn.
            parts = name.split(".")
            waiting += [".".join(parts[:k]) for k in range(1, len(parts))]
            for imported, at_once in _imports(path, parts if is_package else parts[:-1]):
                if at_once or not _is_installed(imported):
                    waiting.append(imported)
            for text in _texts(path):
                if (beside := _file_beside(path, text)) is not None:
                    sources[f"{name}: {text}"] = _file_sha256(beside)
                elif _is_dotted(text) and _is_local(text):
                    waiting.append(text)  # imported by its name, as by importlib
    return {"sources": dict(sorted(sources.items())), "packages": dict(sorted(packages.items()))}


def _texts(path: Path) -> set[str]:
    """Every text that a Python file holds and that could name a file or a module."""
    try:
        tree = ast.parse(path.read_bytes()) if path.suffix == ".py" else ast.Module([], [])
    except (OSError, SyntaxError, ValueError):
        return set()
    texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return {text for text in texts if isinstance(text, str) and 0 < len(text) <= 200}


def _file_beside(path: Path, text: str) -> Path | None:
    """The file in a module's folder, or below it, that a text in it names: its numbers, say."""
    if "\0" in text or text.startswith(("/", "~")) or ".." in text or text.endswith(".py"):
        return None
    found = path.parent / text
    try:
        return found if found.is_file() else None
    except OSError:
        return None


def _is_dotted(text: str) -> bool:
    return "." in text and all(part.isidentifier() for part in text.split("."))


def _is_local(name: str) -> bool:
    """Whether a module lies in a folder of the user's own."""
    try:
        path, _ = _file(name)
    except (ImportError, ValueError):
        return False
    return path is not None and not _is_installed(name) and not _STANDARD & set(path.parents)


def _counts(name: str, given: set[str]) -> bool:
    top = name.partition(".")[0]
    if top == OURS:
        return name.startswith(f"{OURS}.envs.")
    return top not in _APART or (name in given and name.startswith("gymnasium.envs."))


def _distributions_of(name: str, path: Path) -> Sequence[str]:
    """Installed distributions that hold a module; none if it was only put beside them."""
    top = name.partition(".")[0]
    if top == OURS or not _INSTALLED & set(path.parts):
        return ()
    return _by_package().get(top, ())


@functools.cache
def _by_package() -> Mapping[str, list[str]]:
    """Installed distributions by the top-level packages that they hold."""
    return importlib.metadata.packages_distributions()


def _is_installed(name: str) -> bool:
    path, _ = _file(name)
    return path is not None and bool(_distributions_of(name, path))


def _file_sha256(path: Path) -> str:
    """Of a source, however its lines end; "unknown" if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
    except OSError:  # in a zip file
        return "unknown"


def _file(name: str) -> tuple[Path | None, bool]:
    """(file, whether it is a package) of a module, which is not imported for it."""
    module = sys.modules.get(name)
    if module is not None:
        found = getattr(module, "__file__", None)
        return (Path(found).absolute() if found else None), hasattr(module, "__path__")
    spec = _spec(name)
    if spec is None or not spec.has_location or spec.origin is None:
        return None, False
    return Path(spec.origin).absolute(), spec.submodule_search_locations is not None


def _spec(name: str) -> ModuleSpec | None:
    """How Python would find a module; unlike by find_spec, nothing above it is imported."""
    parent, _, _ = name.rpartition(".")
    where: Any = None
    if parent in sys.modules:
        where = getattr(sys.modules[parent], "__path__", None)
    elif parent:
        above = _spec(parent)
        where = above.submodule_search_locations if above else None
    if parent and where is None:
        return None
    for finder in sys.meta_path:
        if (found := finder.find_spec(name, where)) is not None:
            return found
    return None


def _imports(path: Path, package: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """(module, whether it is imported at once and not by a function) of a Python file's imports.

    ``package`` are the parts of the name that relative imports begin at.
    """
    try:
        tree = ast.parse(path.read_bytes()) if path.suffix == ".py" else ast.Module([], [])
    except (OSError, SyntaxError, ValueError):
        return
    waiting: list[tuple[ast.AST, bool]] = [(tree, True)]
    while waiting:
        node, at_once = waiting.pop()
        at_once = at_once and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        waiting += [(child, at_once) for child in ast.iter_child_nodes(node)]
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_once) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]  # may be modules too
            yield from ((name, at_once) for name in names if base)
