"""The wheel works on its own: in another virtual environment, from any folder, without sources."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(command: Sequence[str | Path], folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SAFE_OFFRL_CACHE": str(folder / "cache")}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh virtual environment that holds the wheel; needs no network."""
    folder = tmp_path_factory.mktemp("wheel")
    source, dist, venv = folder / "source", folder / "dist", folder / "venv"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("safe_offrl", "envs", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    offline = ["--no-deps", "--no-index"]
    run([*pip, "wheel", *offline, "--no-build-isolation", "-w", dist, source], folder)
    run([sys.executable, "-m", "venv", "--without-pip", venv], folder)
    (wheel,) = dist.glob("*.whl")
    run([*pip, "--python", venv / "bin" / "python", "install", *offline, wheel], folder)
    # The dependencies are the present environment's. In a folder that a .pth file adds, other .pth
    # files are not read: the editable install of the sources is out of reach.
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    dependencies = sysconfig.get_path("purelib")
    (venv / "lib" / python / "site-packages" / "dependencies.pth").write_text(dependencies + "\n")
    return venv / "bin"


def test_every_source_is_in_the_wheel_and_comes_from_it(installed: Path, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\n"
        "import safe_offrl.cli, safe_offrl.envs.point_hazard, safe_offrl.configs\n"
        "for module in (safe_offrl, safe_offrl.envs, safe_offrl.configs):\n"
        "    print(Path(module.__file__).parent)\n"
    )
    package, envs, configs = map(Path, run([installed / "python", "-c", program], tmp_path).split())
    assert package.is_relative_to(installed.parent)
    assert (envs, configs) == (package / "envs", package / "configs")
    for source, copy in (("safe_offrl", package), ("envs", envs), ("configs", configs)):
        files = [f for f in (ROOT / source).rglob("*") if f.suffix in (".py", ".yaml")]
        missing = [f for f in files if not (copy / f.relative_to(ROOT / source)).is_file()]
        assert not missing


def test_processes_of_its_own_are_what_is_installed(installed: Path, tmp_path: Path) -> None:
    """In a checkout of the sources, as in the README: they have no safe_offrl/envs."""
    shutil.copytree(ROOT / "safe_offrl", tmp_path / "safe_offrl")
    shutil.rmtree(tmp_path / "safe_offrl" / "envs", ignore_errors=True)
    (tmp_path / "safe_offrl" / "envs").unlink(missing_ok=True)
    text = run([installed / "safe-offrl", "check-env", "HazardLine-v0"], tmp_path)
    assert "ok    other process" in text


def test_help_without_sources(installed: Path, tmp_path: Path) -> None:
    text = run([installed / "safe-offrl", "--help"], tmp_path)
    assert "pretrain" in text
    assert "finetune" in text


def test_a_tiny_pretrain_without_sources(installed: Path, tmp_path: Path) -> None:
    program, log = installed / "safe-offrl", tmp_path / "log.hdf5"
    environment = ["--env", "PointHazard-v0"]
    run([program, "collect", *environment, "--transitions", "3k", "--out", log], tmp_path)
    options = [*environment, "--dataset", str(log), "--steps", "20", "--name", "tiny"]
    run([program, "pretrain", *options, "alignment_steps=5"], tmp_path)
    folder = tmp_path / "runs" / "tiny"
    assert {"config.yaml", "calibration.json", "metrics.jsonl"} <= {
        p.name for p in folder.iterdir()
    }
