"""A log as each format holds it, and written there as people's own tools write it.

``hold`` is what is left of a log in a format, or None if it cannot be kept there at all; two logs
that are held alike are the same file. ``write`` puts what is held into a folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from safe_offrl.data_formats.conversion import convert
from safe_offrl.spec import SafetySpec
from tests.data_formats.clean_logs import Arrays, Log


class Form(NamedTuple):
    """A format as people use it."""

    hold: Callable[[Log], Log | None]
    write: Callable[[Log, Path], Path]


def _without(log: Log, *names: str, **changed: Any) -> Log:
    arrays = {key: value for key, value in log.arrays.items() if key not in names}
    return dataclasses.replace(log, arrays=arrays, style={}, **changed)


def _rows_agree(log: Log) -> bool:
    return len({len(array) for array in log.arrays.values()}) == 1


def _storable(arrays: Arrays) -> Arrays:
    """Text as HDF5 takes it."""
    return {k: v.astype("S") if v.dtype.kind == "U" else v for k, v in arrays.items()}


# --- HDF5 and npz: any arrays, and metadata ---


def write_hdf5(log: Log, folder: Path) -> Path:
    with h5py.File(folder / "log.hdf5", "w") as file:
        for key, value in _storable(log.arrays).items():
            file[key] = value
        if log.metadata:
            file.attrs["safe_offrl"] = json.dumps(log.metadata)
    return folder / "log.hdf5"


def hold_d4rl(log: Log) -> Log | None:
    """No costs, no next observations, no metadata; a termination is the accident."""
    if "action_count" in log.metadata or log.spec.accident != "cost":
        return None
    spec = SafetySpec(accident="terminated", horizon=log.spec.horizon)
    return _without(log, "costs", "next_observations", "accidents", metadata={}, spec=spec)


def write_npz(log: Log, folder: Path) -> Path:
    named: dict[str, Any] = dict(log.arrays)
    if log.metadata:
        named["metadata"] = np.array(json.dumps(log.metadata))
    np.savez(folder / "log.npz", **named)
    return folder / "log.npz"


_OMNISAFE = {
    "observations": "obs",
    "actions": "action",
    "rewards": "reward",
    "costs": "cost",
    "next_observations": "next_obs",
}


def hold_omnisafe(log: Log) -> Log | None:
    """One flag for both ends, (N, 1) each; no metadata, and continuous actions alone."""
    needed = {*_OMNISAFE, "terminals", "timeouts"}
    if not needed <= log.arrays.keys() or not _rows_agree(log) or log.spec.accident != "cost":
        return None
    if log.arrays["actions"].dtype.kind != "f" or log.arrays["actions"].ndim != 2:
        return None
    flags = [log.arrays[key] for key in ("terminals", "timeouts")]
    if any(flag.dtype.kind != "b" for flag in flags):
        return None
    arrays = {theirs: log.arrays[ours] for ours, theirs in _OMNISAFE.items()}
    arrays |= {key: value for key, value in log.arrays.items() if key not in needed}
    arrays |= {"done": flags[0] | flags[1]}
    columns = {k: v[:, None] if v.ndim == 1 else v for k, v in arrays.items()}
    return dataclasses.replace(log, arrays=columns, metadata={}, style={})


# --- tables of text ---


def hold_csv(log: Log) -> Log | None:
    """A column for each number, of one number of rows; no metadata."""
    if not _rows_agree(log) or any(array.ndim > 2 for array in log.arrays.values()):
        return None
    return dataclasses.replace(log, metadata={})


def hold_table(log: Log) -> Log | None:
    """As it is typed by hand: without next observations."""
    held = hold_csv(log)
    names = [key for key in log.arrays if key.lower().strip().startswith("next")]
    return held and dataclasses.replace(_without(held, *names), style=held.style)


def write_csv(log: Log, folder: Path) -> Path:
    style = log.style
    columns: dict[str, NDArray[Any]] = {}
    for key, value in log.arrays.items():
        if value.ndim == 2:
            columns |= {f"{key}_{k}": column for k, column in enumerate(value.T)}
        else:
            columns[key] = value
    names = list(columns)
    if "columns" in style:  # how the columns are ordered
        names = sorted(names, reverse=style["columns"] == "reversed")
    quote, delimiter = style.get("quote", ""), style.get("delimiter", ",")
    cells = [[_cell(x, style) for x in columns[name]] for name in names]
    lines = [delimiter.join(row) for row in zip(*cells, strict=True)]
    head = delimiter.join(f"{quote}{name}{quote}" for name in names)
    if style.get("head") == "none":
        head = lines.pop(0)
    elif style.get("head") == "repeated":
        lines.insert(len(lines) // 2, head)
    if style.get("head") == "comment":
        head = f"# logged by hand\n{head}"
    newline = style.get("newline", "\n")
    text = newline.join([head, *lines, ""])
    (folder / "log.csv").write_bytes(text.encode(style.get("encoding", "utf-8")))
    return folder / "log.csv"


def _cell(value: Any, style: dict[str, str]) -> str:
    if isinstance(value, np.bool_):
        return style.get("true", "1") if value else style.get("false", "0")
    text = str(value) if isinstance(value, np.str_) else f"{value:.9g}"
    return text.replace(".", style.get("decimal", "."))


# --- Minari ---


def hold_minari(log: Log) -> Log | None:
    """Groups that end where the flags do; next observations are those of the following rows."""
    flags = [log.arrays.get(key) for key in ("terminals", "timeouts")]
    if any(flag is None or flag.dtype.kind != "b" for flag in flags) or not _rows_agree(log):
        return None
    ends = log.arrays["terminals"] | log.arrays["timeouts"]
    return _grouped(log, np.concatenate([[0], np.cumsum(ends)[:-1]]))


def hold_episodes(log: Log) -> Log | None:
    """Groups that are the true episodes, whatever the flags in them say."""
    return _grouped(log, log.episode) if (np.diff(log.episode) >= 0).all() else None


def _grouped(log: Log, group: NDArray[Any]) -> Log | None:
    needed = {"observations", "next_observations", "actions", "rewards"}
    if not needed <= log.arrays.keys() or not _rows_agree(log) or len(group) != len(log.rows):
        return None
    following, first = log.arrays["next_observations"].copy(), log.arrays["observations"]
    inner = np.flatnonzero(group[1:] == group[:-1])
    following[inner] = first[inner + 1]
    arrays = log.arrays | {"next_observations": following, "group": group}
    return dataclasses.replace(log, arrays=arrays, style={})


def write_minari(log: Log, folder: Path) -> Path:
    data = folder / "log" / "data"
    data.mkdir(parents=True)
    theirs = {"terminals": "terminations", "timeouts": "truncations", "costs": "infos/cost"}
    theirs |= {"accidents": "infos/accident"}
    arrays, group = _storable(log.arrays), log.arrays["group"]
    starts = np.flatnonzero(np.diff(group, prepend=group[0] - 1, append=group[-1] + 1))
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for k, part in enumerate(map(slice, starts[:-1], starts[1:])):
            episode = file.create_group(f"episode_{k}")
            for key, value in arrays.items():
                name = theirs.get(key, key)
                if name.startswith("infos"):
                    episode[name] = np.concatenate([np.zeros_like(value[:1]), value[part]])
                elif key == "observations":
                    last = log.arrays["next_observations"][part][-1:]
                    episode[name] = np.concatenate([value[part], last])
                elif key not in ("next_observations", "group"):
                    episode[name] = value[part]
    (data / "metadata.json").write_text(json.dumps(_description(log)))
    return folder / "log"


def _description(log: Log) -> dict[str, Any]:
    """What Farama's own writer says of a dataset; what else is known of it stands beside that."""
    said = dict(log.metadata)
    spec = {"id": said.pop("env_id", "Ledge-v0"), "max_episode_steps": said.pop("horizon", None)}
    described = {"env_spec": json.dumps(spec)}
    count, start = said.pop("action_count", None), said.pop("action_start", 0)
    low, high = said.pop("action_low", None), said.pop("action_high", None)
    if said:
        return {"safe_offrl": json.dumps(log.metadata)}
    if count is not None:
        space: dict[str, Any] = {"type": "Discrete", "dtype": "int64", "n": count, "start": start}
        described["action_space"] = json.dumps(space)
    elif low is not None or high is not None:
        size = log.arrays["actions"].shape[1] if log.arrays["actions"].ndim == 2 else 1
        bounds = {"low": low, "high": high}
        given = {key: [bound] * size for key, bound in bounds.items() if bound is not None}
        space = {"type": "Box", "dtype": "float32", "shape": [size], **given}
        described["action_space"] = json.dumps(space)
    return described


# --- memory map ---


def write_mmap(log: Log, folder: Path) -> Path:
    """Nobody writes one but `convert`, which is told the time limit as the load is."""
    target = folder / "log.mmap"
    convert(write_hdf5(log, folder), target, horizon=log.horizon)
    return target


FORMS: dict[str, Form] = {
    "hdf5": Form(lambda log: _without(log), write_hdf5),
    "bare": Form(lambda log: _without(log, "next_observations"), write_hdf5),
    "d4rl": Form(hold_d4rl, write_hdf5),
    "npz": Form(lambda log: _without(log), write_npz),
    "omnisafe": Form(hold_omnisafe, write_npz),
    "csv": Form(hold_csv, write_csv),
    "table": Form(hold_table, write_csv),
    "minari": Form(hold_minari, write_minari),
    "episodes": Form(hold_episodes, write_minari),
    "mmap": Form(lambda log: _without(log), write_mmap),
}


def held_alike(first: Log, second: Log) -> bool:
    """Whether two held logs are the same file, loaded alike."""
    same = all(
        getattr(first, name) == getattr(second, name)
        for name in ("horizon", "metadata", "spec", "style")
    )
    return (
        same
        and first.arrays.keys() == second.arrays.keys()
        and all(_same(array, second.arrays[key]) for key, array in first.arrays.items())
    )


def _same(first: NDArray[Any], second: NDArray[Any]) -> bool:
    if first.dtype != second.dtype:
        return False
    return np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
