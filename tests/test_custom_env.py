"""The README's own environment, in a file outside the repository, goes through every command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SCRIPT = Path(sys.executable).parent / "safe-offrl"
ENV_ID = "my_env:MyEnv-v0"


def safe_offrl(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run the installed script with --json in ``folder``: the sources are not on its path."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SAFE_OFFRL_CACHE": str(folder / "cache")}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [str(SCRIPT), *arguments, "--json"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, f"{' '.join(arguments)}\n{result.stdout}\n{result.stderr}"
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_an_environment_outside_the_repository_goes_through_every_command(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    source = re.search(r"<!-- test: file my_env\.py -->\n```python\n(.*?)```", readme, re.DOTALL)
    assert source is not None
    assert len(source[1].splitlines()) < 40
    assert "safe_offrl" not in source[1]  # it owes us nothing
    (tmp_path / "my_env.py").write_text(source[1])

    log = tmp_path / "log.hdf5"
    options = ["--env", ENV_ID, "--transitions", "4k", "--seed", "1", "--out", str(log)]
    assert safe_offrl(tmp_path, "collect", *options)["dataset"] == str(log)
    summary = safe_offrl(tmp_path, "inspect", str(log))
    assert summary["transitions"] >= 4000
    assert 0 < summary["accident_episodes"] < summary["episodes"]

    options = ["--env", ENV_ID, "--dataset", str(log), "--steps", "60", "alignment_steps=20"]
    safe_offrl(tmp_path, "pretrain", "--name", "offline", *options)
    options = ["--budget", "300", "warmup_steps=150", "iteration_steps=50"]
    online = safe_offrl(tmp_path, "finetune", "offline", "--name", "online", *options)
    assert 0 < online["steps"] <= 300

    options = ["offline", "--episodes", "3"]
    assert safe_offrl(tmp_path, "evaluate", *options)["episodes"] == 3
    safe_offrl(tmp_path, "compare", "online", "--png", "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000
    events = list((tmp_path / "runs" / "online").glob("events.out.tfevents.*"))
    assert events
