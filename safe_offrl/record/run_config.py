"""The config.yaml of a run: what it was made from, and its resolved settings."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from safe_offrl.config import from_dict, read_yaml, to_dict, yaml_text
from safe_offrl.errors import ConfigError
from safe_offrl.files import cache_folder

Phase = TypeVar("Phase")


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """What a run was made from, by identity; with it `evaluate RUN` needs no flags."""

    env_id: str
    dataset: str  # absolute path; config.yaml has it as :func:`run_yaml` says
    dataset_sha256: str
    threads: int = 1
    compiled: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    horizon: int | None = None  # of the environment, for a dataset that does not name one
    pretrained: str | None = None  # absolute path of the pretrain run, likewise
    pretrained_sha256: str | None = None  # of the checkpoint that fine-tuning started from
    risk: str | None = None  # what was known of it before the first step, or that it was accepted


_PATHS = ("dataset", "pretrained")
# What a run of an earlier version did that had no word for it.
_BEFORE: Mapping[str, Mapping[str, Any]] = {
    "pretrain": {"fallback": {"steps": 0}},
    "finetune": {"guard": False, "selection": {"share": 0.0}, "visited_episodes": 0},
}


def run_yaml(inputs: RunInputs, section: str, config: Any, runs: Path) -> str:
    """The text of a run's config.yaml: what it was made from, and its resolved settings.

    ``runs`` is the folder that the run's own will be in. Paths below the folder around ``runs`` are
    written relative to the run, those in the home folder with ``~``: what is moved or copied
    together finds itself again, and a record that is passed on names no machine.
    """
    stored = to_dict(inputs)
    for key in _PATHS:
        if stored[key] is not None:
            stored[key] = _portable(Path(stored[key]), runs.resolve())
    return yaml_text({"inputs": stored, section: to_dict(config)})


def parse_run_yaml(
    text: str, section: str, schema: type[Phase], folder: Path
) -> tuple[RunInputs, Phase]:
    """Read the config.yaml of the run in ``folder``; the inverse of :func:`run_yaml`."""
    values = read_yaml(text, "config.yaml")
    inputs = run_inputs(values, folder)
    if not isinstance(values.get(section), dict):
        raise ConfigError(f'config.yaml lacks "{section}". Start a new run.')
    return inputs, from_dict(schema, {**_BEFORE.get(section, {}), **values[section]})


def run_inputs(values: Mapping[str, Any], folder: Path) -> RunInputs:
    """What the run in ``folder`` was made from, by what its config.yaml holds."""
    if not isinstance(values.get("inputs"), dict):
        raise ConfigError('config.yaml lacks "inputs". Start a new run.')
    inputs = from_dict(RunInputs, values["inputs"])
    absolute: dict[str, Any] = {
        key: str(_absolute(path, folder.resolve()))
        for key in _PATHS
        if (path := getattr(inputs, key)) is not None
    }
    return dataclasses.replace(inputs, **absolute)


def _portable(path: Path, runs: Path) -> str:
    around, home = runs.parent, Path.home().resolve()
    cached = path.is_relative_to(cache_folder().resolve())
    if path.is_relative_to(around) and around != around.parent and not cached:
        return Path(os.path.relpath(path, runs / "run")).as_posix()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)


def _absolute(path: str, folder: Path) -> Path:
    if path.startswith("~/"):
        return Path.home() / path.removeprefix("~/")
    return Path(os.path.normpath(folder / path))
