"""Minari datasets (the Farama standard), read and written with h5py alone.

Folder/data/main_data.hdf5 holds groups episode_N of T steps with T + 1 observations and T + 1
entries of each info: the cost of step t is infos/cost[t + 1], and that of the signal NAME
infos/cost_NAME[t + 1]. Folder/data/metadata.json describes
the spaces.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from safe_offrl.data.content import signal_of
from safe_offrl.data_formats.hdf5 import (
    declared_size,
    opened,
    plain_attribute,
    plain_dataset,
    plain_group,
)
from safe_offrl.data_formats.names import near_name
from safe_offrl.data_formats.stored import ATTRIBUTE, Raw, parse_metadata, reading, require_size
from safe_offrl.env.action_bounds import placeholder
from safe_offrl.errors import DataError
from safe_offrl.types import signal_column

DATA_FILE = "main_data.hdf5"
_STEPS = {"rewards": "rewards", "terminations": "terminals", "truncations": "timeouts"}
INFOS = {"cost": "costs", "accident": "accidents", "behaviour_log_prob": "behaviour_log_probs"}

Leaf = tuple[str, ...]  # where in a group of observations an array is found


def datasets_folder() -> Path:
    """Where Minari keeps local datasets by their ids."""
    root = os.environ.get("MINARI_DATASETS_PATH")
    return Path(root) if root else Path.home() / ".minari" / "datasets"


def data_folder(path: Path) -> Path | None:
    """The folder with main_data.hdf5 that ``path`` (it, its parent or the file) means, or None."""
    candidates = (path.parent,) if path.name == DATA_FILE else (path / "data", path)
    return next((c for c in candidates if (c / DATA_FILE).is_file()), None)


def require_hdf5(path: Path) -> None:
    """Raise DataError for a Minari dataset that keeps its episodes in another format."""
    folder = next((f for f in (path / "data", path) if (f / "metadata.json").is_file()), None)
    if folder is None or (folder / DATA_FILE).exists():
        return
    kind = _description(folder / "metadata.json").get("data_format")
    raise DataError(
        f'The Minari dataset "{path}" has no {DATA_FILE}; its metadata.json says that it is stored '
        f'in the format "{kind}". Only hdf5 is read: write it anew with data_format="hdf5".'
    )


def read_minari(path: Path) -> Raw:
    """Arrays and metadata of a Minari dataset; an episode ends with its group, marked or not."""
    # Description.
    folder = data_folder(path)
    if folder is None:
        raise DataError(f'"{path}" holds no {DATA_FILE}. Give the folder of a Minari dataset.')
    with reading(folder / "metadata.json", "the description of a Minari dataset"):
        description = _description(folder / "metadata.json")
        metadata = _described_metadata(description)
        leaves = _leaves_of_space(_space(description, "observation_space"))
        first_action = int(_space(description, "action_space").get("start", 0))
    # Episodes.
    with opened(folder / DATA_FILE) as file:
        names = [m for name in file if (m := re.fullmatch(r"episode_(\d{1,15})", name))]
        groups = [plain_group(file, m[0]) for m in sorted(names, key=lambda m: int(m[1]))]
        remarks = _unused_infos(next((group for group in groups if group is not None), None))
        episodes = [_Episode(group, leaves) for group in groups if group is not None]
        if not episodes:
            raise DataError(f'The Minari dataset "{path}" is empty. Log at least one episode.')
        # Only the last observation of an episode is not held twice in memory.
        require_size(path, (2 * episode.size for episode in episodes))
        parts = [episode.read() for episode in episodes]
        # Another writer's attribute of this name means something else.
        ours = episodes if ATTRIBUTE in description else []
        behaviours = [plain_attribute(episode.group, "behaviour") for episode in ours]
    # Checks that all are alike.
    keys = set(parts[0])
    if any(set(part) != keys for part in parts):
        signals = {key for part in parts for key in part if signal_of(key)}
        raise DataError(
            f'Only some episodes of "{path}" have {", ".join(sorted({*INFOS.values(), *signals}))} '
            "in their infos. Log them for all episodes, or for none."
        )
    for key in sorted(keys):
        if len({part[key].shape[1:] for part in parts}) > 1:
            raise DataError(
                f'The {key} of the episodes of "{path}" differ in shape. Log them all alike.'
            )
    # Arrays.
    arrays = {key: np.concatenate([part.pop(key) for part in parts]) for key in sorted(keys)}
    if behaviours and all(b is not None for b in behaviours):
        arrays["episode_behaviours"] = np.array(behaviours, dtype=np.int32)
    if arrays["actions"].dtype.kind in "iu":
        arrays["actions"] = arrays["actions"].astype(np.int64) - first_action
    # Episodes without an end.
    unmarked = sum(episode.unmarked for episode in episodes)
    unsure = ""
    if unmarked:
        unsure = (
            f"{unmarked:,} of {len(episodes):,} episodes end neither in terminations nor in "
            "truncations"
        )
        remarks.append(f"{unsure}: they are taken to be cut.")
    return Raw(arrays, metadata, tuple(remarks), unsure)


def read_minari_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone."""
    folder = data_folder(path)
    if folder is None:
        return {}
    with reading(folder / "metadata.json", "the description of a Minari dataset"):
        return _described_metadata(_description(folder / "metadata.json"))


class _Episode:
    """The plain arrays of one group, checked before any of them is read."""

    def __init__(self, group: h5py.Group, leaves: list[Leaf] | None) -> None:
        self.group = group
        self.unmarked = False  # whether its last step ends it only by being the last
        self.steps = {ours: _array(group, (theirs,)) for theirs, ours in _STEPS.items()}
        self.actions = _array(group, ("actions",))
        self.observations = [
            _array(group, ("observations", *leaf)) for leaf in leaves or _leaves_by_name(group)
        ]
        infos = plain_group(group, "infos") if "infos" in group else None
        known = {} if infos is None else INFOS | _signal_infos(infos)
        found = {ours: plain_dataset(infos, key) for key, ours in known.items()}
        self.infos = {key: item for key, item in found.items() if item is not None}

    @property
    def size(self) -> int:
        """Bytes in memory."""
        items = [*self.steps.values(), self.actions, *self.observations, *self.infos.values()]
        return sum(map(declared_size, items))

    def read(self) -> dict[str, NDArray[Any]]:
        """Our arrays of this episode."""
        n = len(self.steps["rewards"])
        blocks = [item[()] for item in self.observations]
        if n == 0 or any(len(b) != n + 1 or b.ndim > 3 for b in blocks):
            raise DataError(
                f'"{self.group.name}" has {n} steps and observations of the shapes '
                f"{[list(b.shape) for b in blocks]}. Minari stores one vector more than steps; "
                "images are not supported."
            )
        flat = np.concatenate([b.reshape(n + 1, -1) for b in blocks], axis=1)
        arrays = {key: item[()] for key, item in self.steps.items()}
        actions = self.actions[()]
        arrays["actions"] = actions if actions.ndim == 1 else actions.reshape(len(actions), -1)
        arrays |= {"observations": flat[:-1], "next_observations": flat[1:]}
        # The reset gave the first info, so it belongs to no step.
        arrays |= {key: item[()][len(item) - n :] for key, item in self.infos.items()}
        if any(len(x) != n for x in arrays.values()) or any(
            len(item) not in (n, n + 1) for item in self.infos.values()
        ):
            raise DataError(
                f'The arrays of "{self.group.name}" do not have the same number of steps. '
                "Log the dataset again."
            )
        if not arrays["terminals"][-1]:
            self.unmarked = not arrays["timeouts"][-1]
            arrays["timeouts"] = np.append(arrays["timeouts"][:-1], True)
        return arrays


def _unused_infos(group: h5py.Group | None) -> list[str]:
    """What is to be said of infos of an episode that are not read; DataError for near names."""
    infos = plain_group(group, "infos") if group is not None and "infos" in group else None
    known = {"observations", "actions", "infos", *_STEPS}
    names = [name for name in group or () if name not in known]
    read = {} if infos is None else INFOS | _signal_infos(infos)
    names += [f"infos/{name}" for name in infos or () if name not in read]
    for key in ("cost", "accident"):
        near = near_name(INFOS[key], names)
        if (infos is None or key not in infos) and near is not None:
            raise DataError(
                f'The infos of the dataset have no "{key}", but "{near}", which is not read. '
                f'Rename it to "{key}" if that is what it holds, else to a name unlike it.'
            )
    listed = ", ".join(f'"{name}"' for name in sorted(names)[:6])
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return [f"of the dataset's arrays these are not used: {listed}{more}."] if names else []


def _signal_infos(infos: h5py.Group) -> dict[str, str]:
    """{name in infos: our array} of named cost signals: numbers of each step beside the cost."""
    names = [name for name in infos if name.startswith("cost_") and signal_of(name)]
    plain = [name for name in names if isinstance(infos.get(name, getlink=True), h5py.HardLink)]
    return {
        name: signal_column(signal_of(name))
        for name in plain
        if "cost" in infos and getattr(infos[name], "dtype", np.dtype("S")).kind in "fiub"
    }


def _array(group: h5py.Group, path: Leaf) -> h5py.Dataset:
    """A plain array of an episode; no part of its path may be a link."""
    inner: h5py.Group | None = group
    for key in path[:-1]:
        inner = plain_group(inner, key) if inner is not None else None
    item = plain_dataset(inner, path[-1]) if inner is not None else None
    if item is None or not item.shape:
        raise DataError(f'"{group.name}" has no array "{"/".join(path)}". Log the dataset again.')
    return item


def _leaves_by_name(group: h5py.Group) -> list[Leaf]:
    """Arrays of observations by name where the metadata do not describe the space."""
    inner = plain_group(group, "observations") if "observations" in group else None
    return [()] if inner is None else [(name,) for name in sorted(inner)]


def _description(path: Path) -> dict[str, Any]:
    """metadata.json; {} if there is none."""
    if not path.is_file():
        return {}
    require_size(path, [path.stat().st_size])
    return parse_metadata(path.read_bytes(), path.name)


def _space(description: dict[str, Any], key: str) -> dict[str, Any]:
    """A serialised Gymnasium space; {} if it is not described."""
    return parse_metadata(description[key], key) if key in description else {}


def _leaves_of_space(space: dict[str, Any]) -> list[Leaf] | None:
    """Paths of the Boxes in the order in which the environment's own observation is flattened."""
    if not space:
        return None
    inner = space.get("subspaces")
    if isinstance(inner, list):
        inner = {f"_index_{i}": subspace for i, subspace in enumerate(inner)}
    if inner is None:
        return [()]
    return [(key, *leaf) for key, sub in inner.items() for leaf in _leaves_of_space(sub) or [()]]


def _described_metadata(description: dict[str, Any]) -> dict[str, Any]:
    """Our metadata: as we wrote them, else from the environment's specification and the actions."""
    if ATTRIBUTE in description:
        return parse_metadata(description[ATTRIBUTE])
    metadata: dict[str, Any] = {}
    given = description.get("env_spec")
    spec = parse_metadata(given, "env_spec") if given else {}
    if isinstance(spec.get("id"), str):
        metadata["env_id"] = spec["id"]
    if isinstance(limit := _time_limit(spec), int | float):
        metadata["horizon"] = limit
    actions = _space(description, "action_space")
    if actions.get("type") == "Discrete":
        metadata["action_count"] = actions.get("n")
    elif actions.get("type") == "Box":
        low, high = (np.ravel(actions.get(key, math.inf)) for key in ("low", "high"))
        finite = bool(np.isfinite(low).all() and np.isfinite(high).all())
        if finite and not placeholder(low, high):
            metadata |= {"action_low": low.tolist(), "action_high": high.tolist()}
    return metadata


def _time_limit(spec: dict[str, Any]) -> Any:
    """Steps after which an environment's specification ends an episode, by itself or a wrapper."""
    if spec.get("max_episode_steps") is not None:
        return spec["max_episode_steps"]
    wrappers = spec.get("additional_wrappers")
    for wrapper in wrappers if isinstance(wrappers, list) else ():
        if isinstance(wrapper, dict) and wrapper.get("name") == "TimeLimit":
            arguments = wrapper.get("kwargs")
            return arguments.get("max_episode_steps") if isinstance(arguments, dict) else None
    return None
