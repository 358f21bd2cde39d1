"""Installed packages that declare environments in the entry-point group `safe_offrl.envs`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

from safe_offrl.env.make import make_env
from safe_offrl.errors import EnvError
from safe_offrl.spec import SafetySpec

SCRIPT = Path(sys.executable).parent / "safe-offrl"
SOURCE = """
import gymnasium
from safe_offrl.envs.hazard_line import HazardLineEnv

gymnasium.register("{env_id}", entry_point=HazardLineEnv, max_episode_steps=9)
"""


def install(folder: Path, package: str, source: str) -> None:
    """What pip leaves behind: the package, and a dist-info folder with its entry points."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text("")
    (folder / package / "envs.py").write_text(source)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[safe_offrl.envs]\nhazards = {package}.envs\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder on sys.path; what is registered meanwhile is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    return tmp_path


def test_the_ids_of_an_installed_package_are_known(site: Path) -> None:
    with pytest.raises(EnvError, match="no environment"):
        make_env("Plugged-v0", SafetySpec())
    install(site, "plugin_of_test", SOURCE.format(env_id="Plugged-v0"))
    env = make_env("Plugged-v0", SafetySpec())
    assert env.horizon == 9
    assert type(env.unwrapped).__name__ == "HazardLineEnv"


def test_a_broken_package_is_one_warning(site: Path) -> None:
    install(site, "a_broken_plugin_of_test", "import a_module_that_is_missing\n")
    install(site, "good_plugin_of_test", SOURCE.format(env_id="StillPlugged-v0"))
    make_env("PointHazard-v0", SafetySpec())  # needs no plug-in, so none is imported
    with pytest.warns(UserWarning, match="a_broken_plugin_of_test") as caught:
        assert make_env("StillPlugged-v0", SafetySpec()).horizon == 9
    (message,) = [str(w.message) for w in caught]
    assert message.startswith('The environments of the package "a_broken_plugin_of_test" are')
    assert "No module named 'a_module_that_is_missing'." in message


def test_the_command_line_knows_them_and_warns_in_one_line(tmp_path: Path) -> None:
    install(tmp_path, "broken_plugin", "1 / 0\n")
    install(tmp_path, "plugin", SOURCE.format(env_id="Plugged-v0"))
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [str(SCRIPT), "check-env", "Plugged-v0", "--json"],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["horizon"] == 9
    assert not [c for c in answer["checks"] if c["status"] == "FAIL"]
    warnings = [line for line in done.stderr.splitlines() if "division by zero" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith('warning: The environments of the package "broken_plugin" are')
