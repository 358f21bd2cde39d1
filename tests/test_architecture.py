"""Who may import whom. Read from the sources, so that imports inside functions count as well."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module imports from the rows above its own; siblings inside one folder may import each other.
LAYERS = [
    ["errors", "adam"],  # L0: the words
    ["types", "safety", "state", "files", "device", "cuda_graph", "board"],
    [
        "compiler",
        "losses",
        "distributions",
        "statistics",
        "resampling",
        "versions",
        "processes",
    ],  # L1: the mathematics
    ["descent"],
    ["nets", "observations", "user_code"],
    ["env_process"],
    ["agents", "data", "env", "safety_critic", "lagrangian", "acting"],  # L2: the parts
    ["shield", "acceptance", "monitor", "behaviours", "ledger", "checkpoints", "baselines"],
    [
        "finetune_config",
        "rollout",
        "deployment",
        "iteration",
        "replay",
        "env_report",
        "frozen",
        "mixture",
        "penalty",
        "policy_graph",
        "videos",
        "calibration_curves",
        "fitted_features",
        "importance_sampling",
    ],
    ["fitted_evaluation", "check_observations"],
    [
        "assessment",
        "calibration",
        "certificate",
        "check_env",
        "export",
        "learners",
        "evaluate",
        "run",
    ],  # L3: the loops
    ["pretrain", "finetune", "collect"],
    ["config", "progress", "run_data"],  # L4: what users touch
    ["summaries"],
    ["pairings"],
    ["report", "benchmark"],
    ["tables", "charts"],
    ["data_chart", "calibration_chart", "certificate_page", "markdown", "page"],
    ["commands"],
    ["policy"],
    ["cli"],  # L5
]
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}

# Third-party packages that only these modules may import ...
ONLY_IN = {
    "omegaconf": {"config"},
    "onnxruntime": {"export"},
    "stable_baselines3": {"learners"},
    "tensorboard": {"board"},
    "typer": {"cli"},
}
# ... and that are not imported before they are needed, because they are slow or not always there.
LAZY = {"stable_baselines3", "tensorboard", "matplotlib", "onnxruntime", "PIL"}

SOURCES = sorted((ROOT / "safe_offrl").rglob("*.py"))
ENVIRONMENTS = sorted((ROOT / "envs").rglob("*.py"))


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
            # "from safe_offrl import losses" imports the module safe_offrl.losses.
            bare = node.module == "safe_offrl"
            names = [f"safe_offrl.{a.name}" for a in node.names] if bare else [node.module]
        else:
            continue
        for name in names:
            # "torch.utils.tensorboard" is TensorBoard as far as these rules go.
            name = "tensorboard" if name.startswith("torch.utils.tensorboard") else name
            yield name, id(node) in top_level


def unit_of(path: Path) -> str:
    """The module or folder a source file belongs to, as LAYERS names it; "" for the package."""
    parts = path.relative_to(ROOT / "safe_offrl").with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def test_every_module_has_a_layer() -> None:
    assert {unit_of(path) for path in SOURCES} - {""} == set(LAYER)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    unit = unit_of(path)
    for name, eager in imports_of(path):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package == "safe_offrl":
            if target in ("envs", "configs"):
                continue  # files beside the package; what they import is tested below
            if not unit:  # the package itself: one name for users, imported when it is asked for
                assert (target, eager) == ("policy", False), f"safe_offrl/__init__ imports {name}"
                continue
            assert target == unit or LAYER[target] < LAYER[unit], f"{unit} imports {target}"
        else:
            assert unit in ONLY_IN.get(package, {unit}), f"{unit} imports {package}"
            assert not (eager and package in LAZY), f"{unit} imports {package} at its top"


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_environments_know_gymnasium_and_numpy_only(path: Path) -> None:
    packages = {name.partition(".")[0] for name, _ in imports_of(path)}
    assert packages <= sys.stdlib_module_names | {"gymnasium", "numpy"}


def test_the_command_line_imports_nothing_heavy_at_its_top() -> None:
    eager = {name for name, eager in imports_of(ROOT / "safe_offrl" / "cli.py") if eager}
    heavy = {"torch", "numpy", "gymnasium", "h5py", "scipy", "omegaconf", "matplotlib"}
    assert not {name.partition(".")[0] for name in eager} & heavy
    assert {name for name in eager if name.startswith("safe_offrl")} <= {"safe_offrl.errors"}
