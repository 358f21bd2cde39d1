"""Who may import whom, and how large things are. Read from the sources, so that imports inside
functions count as well."""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "safe_offrl"

# A room, or a file beside the rooms, imports from those above it; files of one room may import each
# other. Ring 1 is the method: whoever reads it needs nothing of ring 2, which proves and shows it.
RING_1 = [
    *("errors", "types", "files", "limits", "spec"),  # the words
    "compute",
    "nn",
    "policies",
    "stats",
    "env",
    "data",
    "agents",
    "safety",
    "deploy",
    "train",
]
RING_2 = [
    "config",
    "data_formats",
    "record",
    "collect",
    "check",
    "assess",
    "certify",
    "report",
    "bench",
    "commands",
    "policy",
    "cli",
]
PLACE = {name: place for place, name in enumerate([*RING_1, *RING_2])}

# (module, what it imports from below): definitions that lie in the wrong room and are to move.
NOT_YET: set[tuple[str, str]] = set()

# Third-party packages that only these modules may import ...
ONLY_IN = {
    "omegaconf": {"config"},
    "onnxruntime": {"deploy.export"},
    "stable_baselines3": {"collect.sb3"},
    "tensorboard": {"record.tensorboard"},
    "typer": {"cli", "cli.options"},
}
# ... and that are not imported before they are needed, because they are slow or not always there.
LAZY = {"stable_baselines3", "tensorboard", "matplotlib", "onnxruntime", "PIL"}

# How large things may be. The aims stand behind; what is above its aim is what it is today, rounded
# up, and comes down as the work on this house goes on.
MOST_AT_THE_TOP = 8  # files directly in safe_offrl/
MOST_ROOMS = 20
MOST_OF_RING_1 = 17_000  # lines; 8,500, without twenty-five learners, which are 4,500
MOST_OF_A_FILE = 350  # lines
MOST_OF_ALL = 36_800  # lines; 21,585
MOST_DECISIONS = 25  # by the kind of what is constrained, outside of its files
MOST_TWICE = 18  # top-level names; an allow-list: the words, where one name means one thing

SOURCES = sorted(PACKAGE.rglob("*.py"))
ENVIRONMENTS = sorted((ROOT / "envs").rglob("*.py"))


def module_of(path: Path) -> str:
    """ "env.adapter" of env/adapter.py, "env" of its __init__.py, "" of the package's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def unit_of(module: str) -> str:
    """The room of a module, or the module itself if it lies beside the rooms."""
    return module.partition(".")[0]


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted module, whether it is imported together with the file) of every import in a file."""
    tree = ast.parse(path.read_text())
    top_level = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            # "from safe_offrl.nn import losses" imports the module safe_offrl.nn.losses.
            names = [
                full if (full := f"{node.module}.{alias.name}")[11:] in MODULES else node.module
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            # "torch.utils.tensorboard" is TensorBoard as far as these rules go.
            name = "tensorboard" if name.startswith("torch.utils.tensorboard") else name
            yield name, id(node) in top_level


def ours(path: Path) -> Iterator[tuple[str, bool]]:
    """The imports of safe_offrl's own modules: (name below safe_offrl, whether at once)."""
    for name, eager in imports_of(path):
        package, _, rest = name.partition(".")
        # envs and configs are files beside the package; what they import is tested below.
        if package == "safe_offrl" and unit_of(rest) not in ("envs", "configs"):
            yield rest, eager


def downwards() -> set[tuple[str, str]]:
    """(module, module of another room that stands below its own in the list and is imported)."""
    return {
        (module, name)
        for module, path in MODULES.items()
        for name, _ in ours(path)
        if module and PLACE[unit_of(name)] > PLACE[unit_of(module)]
    }


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def twice() -> dict[str, list[str]]:
    """Top-level functions, classes and variables of one name in several modules."""
    where = defaultdict(list)
    for module, path in MODULES.items():
        names = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
        for name in names:
            if not name.startswith("__"):
                where[name].append(module)
    return {name: modules for name, modules in sorted(where.items()) if len(modules) > 1}


DECISION = re.compile(
    r"""(constraint|quantity) [!=]= "(accident|cost)"|is (not )?(COST|ACCIDENT)\b|\bif by_cost"""
    r"""|cost_max is (not )?None"""
)


def decisions() -> dict[str, int]:
    """How often a module asks which quantity is constrained, other than by what it is asked for."""
    found = {
        module: len(DECISION.findall(path.read_text()))
        for module, path in MODULES.items()
        if module not in ("limits", "spec")
    }
    return {module: count for module, count in found.items() if count}


def arrows() -> set[tuple[str, str]]:
    """(room, room that it imports from)."""
    return {
        (unit_of(module), unit_of(name))
        for module, path in MODULES.items()
        for name, _ in ours(path)
        if module and unit_of(module) != unit_of(name)
    }


def figures() -> dict[str, int]:
    return {
        "files directly in safe_offrl/": len(list(PACKAGE.glob("*.py"))),
        "rooms": len({unit_of(m) for m, p in MODULES.items() if p.parent != PACKAGE}),
        "arrows between rooms": len(arrows()),
        "lines of ring 1": sum(lines_of(p) for m, p in MODULES.items() if unit_of(m) in RING_1),
        "lines of the whole": sum(map(lines_of, SOURCES)),
        "lines of the largest file": max(map(lines_of, SOURCES)),
        "files over 350 lines": sum(lines_of(path) > 350 for path in SOURCES),
        "top-level names defined twice": len(twice()),
        "decisions by kind of constraint": sum(decisions().values()),
    }


def test_every_module_has_a_place() -> None:
    assert {unit_of(module) for module in MODULES} - {""} == set(PLACE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_up_the_list(path: Path) -> None:
    module = module_of(path)
    unit = unit_of(module)
    for name, eager in ours(path):
        if not module:  # the package itself: one name for users, imported when it is asked for
            assert (name, eager) == ("policy", False), f"safe_offrl/__init__ imports {name}"
            continue
        allowed = PLACE[unit_of(name)] <= PLACE[unit] or (module, name) in NOT_YET
        assert allowed, f"{module} imports {name}"
    for name, eager in imports_of(path):
        package = name.partition(".")[0]
        assert module in ONLY_IN.get(package, {module}), f"{module} imports {package}"
        assert not (eager and package in LAZY), f"{module} imports {package} at its top"


def test_the_method_imports_nothing_of_what_proves_and_shows_it() -> None:
    outwards = {
        (module, name)
        for module, path in MODULES.items()
        if unit_of(module) in RING_1
        for name, _ in ours(path)
        if unit_of(name) not in RING_1
    }
    assert outwards <= NOT_YET


def test_what_is_allowed_for_now_is_needed() -> None:
    assert downwards() == NOT_YET


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Within a room too, and also where a function imports."""
    graph = {m: {name for name, _ in ours(p)} - {m} for m, p in MODULES.items() if m}
    TopologicalSorter(graph).prepare()  # CycleError names the modules of a circle


@pytest.mark.parametrize("path", sorted((PACKAGE / "agents").glob("*.py")), ids=lambda p: p.stem)
def test_a_learner_is_one_short_file(path: Path) -> None:
    assert lines_of(path) <= 250
    functions = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef))
    longest = max((n.end_lineno or 0) - n.lineno + 1 for n in functions)
    assert longest <= 60


def test_sizes() -> None:
    found = figures()
    width = max(map(len, found))
    print("\n" + "\n".join(f"{name:<{width}}  {value:>6,}" for name, value in found.items()))
    assert found["files directly in safe_offrl/"] <= MOST_AT_THE_TOP
    assert found["rooms"] <= MOST_ROOMS
    assert found["lines of ring 1"] <= MOST_OF_RING_1
    assert found["lines of the whole"] <= MOST_OF_ALL
    assert found["lines of the largest file"] <= MOST_OF_A_FILE
    assert found["decisions by kind of constraint"] <= MOST_DECISIONS, decisions()
    assert found["top-level names defined twice"] <= MOST_TWICE, twice()


def test_the_readme_says_how_large_it_is_and_names_every_room() -> None:
    """To the nearest 500 lines."""
    text = (ROOT / "README.md").read_text()
    method, whole = (figures()[f"lines of {part}"] for part in ("ring 1", "the whole"))
    found = re.search(r"The method is ([\d,]+) lines .*?in ([\d,]+), is what", text, re.DOTALL)
    assert found is not None
    inner, outer = (int(number.replace(",", "")) for number in found.groups())
    assert abs(inner - method) <= 500
    assert abs(outer - (whole - method)) <= 500
    tree = text[found.end() :].split("```")[1]
    assert [name for name in PLACE if not re.search(rf"\b{name}\b", tree)] == []


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_environments_know_gymnasium_and_numpy_only(path: Path) -> None:
    packages = {name.partition(".")[0] for name, _ in imports_of(path)}
    assert packages <= sys.stdlib_module_names | {"gymnasium", "numpy"}


def test_the_command_line_imports_nothing_heavy_at_its_top() -> None:
    eager = {n for path in (PACKAGE / "cli").glob("*.py") for n, eager in imports_of(path) if eager}
    heavy = {"torch", "numpy", "gymnasium", "h5py", "scipy", "omegaconf", "matplotlib"}
    assert not {name.partition(".")[0] for name in eager} & heavy
    light = {f"safe_offrl.{name}" for name in ("errors", "cli", "cli.answers", "cli.options")}
    assert {name for name in eager if name.startswith("safe_offrl")} <= light


def test_rooms_are_light_to_enter() -> None:
    """Their __init__.py import nothing, but for those that are a registry or a face."""
    full = {m for m, p in MODULES.items() if p.name == "__init__.py" and m and list(ours(p))}
    assert full == {"agents", "cli", "commands", "report.charts"}
