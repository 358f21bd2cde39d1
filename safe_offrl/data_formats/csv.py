"""Tables in text: one row a transition, numbered columns for observations and actions."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.data.content import Arrays, Metadata, chunks, signal_of
from safe_offrl.data.offsets import OBSERVATIONS, in_own_units
from safe_offrl.data_formats.names import recognise
from safe_offrl.data_formats.stored import (
    TABLES,
    Raw,
    RowProgress,
    parse_metadata,
    reading,
    require_size,
    stored_names,
)
from safe_offrl.data_formats.validation import validate_arrays
from safe_offrl.errors import DataError
from safe_offrl.files import replacing
from safe_offrl.spec import BUILT_IN_RULES

NUMBER_COLUMNS = (
    *("rewards", "costs", "terminals", "timeouts"),
    *("accidents", "behaviour_log_probs", "dones"),
)
FLAG_WORDS = {"true": "1", "false": "0"}  # pandas and others write flags so
MAX_HEADER = 2**20  # bytes of the line that names the columns


def read_csv(path: Path) -> Raw:
    """The known columns: observations_0, ..., actions_0, ..., rewards, costs, terminals, timeouts.

    next_observations_0, ..., accidents, behaviour_log_probs, costs and timeouts may be missing, and
    costs_NAME be there; a
    single column ``actions`` holds the indices of discrete actions. Columns of one number take true
    and false, in any case, for 1 and 0. Other columns are left alone, and named. The metadata are
    in a file beside it, ``NAME.csv.json``, if there is one.
    """
    metadata = read_csv_metadata(path)
    with reading(path, "CSV"), path.open("rb") as file:
        # Some programs put a byte order mark before the first name.
        header = file.readline(MAX_HEADER).decode("utf-8-sig")
        names = [name.strip().strip('"').strip() for name in header.split(",")]
        if len(names) == 1 and (other := next((mark for mark in ";\t" if mark in header), None)):
            raise DataError(
                f'The columns of "{path}" are separated by {other!r}. Separate them by commas.'
            )
        # Columns that are read.
        found, remarks = recognise(_stems(names), "Rename its columns")
        columns = {ours: _columns(names, theirs, ours) for ours, theirs in found.items()}
        numbers = [key for key in columns if key in NUMBER_COLUMNS or signal_of(key)]
        columns = {key: columns[key] for key in (*TABLES, *numbers) if columns.get(key)}
        wanted = [i for numbers in columns.values() for i in numbers]
        if not wanted:
            raise DataError(
                f'The first line of "{path}" names none of our columns. Name them observations_0, '
                f"..., actions_0, ..., rewards, costs, terminals, timeouts."
            )
        # Numbers of these.
        _require_cells(path, len(header.split(",")))
        # A number takes two bytes of text at least, and eight in memory.
        require_size(path, [path.stat().st_size * 4])
        with warnings.catch_warnings(action="ignore"):  # of an empty table, which is refused later
            table = np.loadtxt(
                file,
                delimiter=",",
                usecols=wanted,
                ndmin=2,
                comments=None,
                converters={i: _cell_value for key in numbers for i in columns.get(key, [])},
                encoding="latin1",
            )
    # Arrays.
    arrays: dict[str, NDArray[Any]] = {}
    for key, at in columns.items():
        if at:
            block, table = table[:, : len(at)], table[:, len(at) :]
            arrays[key] = block if key in TABLES else block[:, 0]
    if found.get("actions") in names:
        arrays["actions"] = _whole(arrays["actions"][:, 0])
        # The documentation numbers discrete actions from 0, so a 0 says where they start.
        if arrays["actions"].min(initial=1) == 0:
            metadata = {"action_start": 0} | metadata
    return Raw(arrays, metadata, tuple(remarks))


def read_csv_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a table: a JSON object in a file beside it, {} without one."""
    beside = path.with_name(f"{path.name}.json")
    if not beside.is_file():
        return {}
    with reading(beside, "the metadata of a table"):
        require_size(beside, [beside.stat().st_size])
        return parse_metadata(beside.read_bytes(), beside.name)


def write_csv(
    path: Path, arrays: Arrays, metadata: Metadata, progress: RowProgress | None = None
) -> list[str]:
    """Validate and write a table, to the last digit; returns what a table cannot hold."""
    # Columns.
    validate_arrays(arrays)
    arrays, metadata, wide = in_own_units(arrays, metadata)
    keys = [key for key in stored_names(arrays) if key != "episode_behaviours"]
    if metadata.get("accident") in BUILT_IN_RULES:
        # Accidents without their rule would be taken for the verdict of any rule; those of a
        # built-in rule can be derived again.
        keys = [key for key in keys if key != "accidents"]
    discrete = metadata.get("action_count") is not None
    whole = (*NUMBER_COLUMNS[2:5], "actions")
    tables = [key for key in TABLES if not (discrete and key == "actions")]
    names = [
        f"{key}_{i}" if key in tables else key
        for key in keys
        for i in range(arrays[key].shape[1] if key in tables else 1)
    ]
    # Rows.
    digits = "%.9g" if wide == np.float32 else "%.17g"
    form = ["%d" if name in whole else digits for name in names]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", encoding="ascii") as file:
        file.write(",".join(names) + "\n")
        for part in chunks(len(arrays["rewards"])):
            columns = {
                key: np.asarray(arrays[key][part], wide if key in OBSERVATIONS else np.float32)
                for key in keys
            }
            if discrete:
                columns["actions"] = columns["actions"].argmax(axis=1)
            block = [x if x.ndim == 2 else x[:, None] for x in columns.values()]
            np.savetxt(file, np.concatenate(block, axis=1), fmt=form, delimiter=",")
            if progress is not None:
                progress(part.stop, len(arrays["rewards"]))
    # What a table cannot hold.
    lost = ["the metadata (environment, accident rule, horizon, behaviours)"] if metadata else []
    if discrete:
        lost.append("actions that never occur, if they are the last")
    if "episode_behaviours" in arrays:
        lost.append("which behaviour logged which episode")
    return lost


def _require_cells(path: Path, cells: int) -> None:
    """Raise DataError for a row with another number of cells than the first line names."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and line.count(b",") + 1 != cells:
                raise DataError(
                    f'Line {number} of "{path}" has {line.count(b",") + 1} cells, but the first '
                    f"line names {cells} columns. Write numbers with a decimal point, and one cell "
                    "for each column."
                )


def _stems(names: list[str]) -> dict[str, int | None]:
    """The arrays that columns belong to, for :func:`recognise`: all have as many rows."""
    return {
        name if signal_of(name) else re.sub(r"_\d{1,9}$", "", name): 0 for name in names if name
    }


def _columns(names: list[str], key: str, ours: str) -> list[int]:
    """Positions of the columns of an array, named ``key`` in the file, by their numbers."""
    if ours not in TABLES or (ours == "actions" and key in names):
        positions = [i for i, name in enumerate(names) if name == key]
        numbers = list(range(len(positions[:1])))
    else:
        matches = [(re.fullmatch(rf"{key}_(\d{{1,9}})", name), i) for i, name in enumerate(names)]
        found = sorted((int(m[1]), i) for m, i in matches if m)
        positions, numbers = [i for _, i in found], [number for number, _ in found]
    if numbers != list(range(len(positions))):
        raise DataError(
            f'The columns of "{key}" are not named once each and numbered from 0. '
            f"Name them {key}_0, {key}_1, ..."
        )
    return positions


def _cell_value(cell: str) -> float:
    """A cell that may hold true or false."""
    return float(FLAG_WORDS.get(cell.strip().lower(), cell))


def _whole(values: NDArray[Any]) -> NDArray[np.int64]:
    """Indices of discrete actions as integers."""
    exact = np.abs(values) < 2.0**53  # neither NaN nor infinite; only these can be cast
    if not exact.all() or (values != np.floor(values)).any():
        raise DataError(
            'The column "actions" holds numbers that are no index of a discrete action. '
            "Name the columns of continuous actions actions_0, actions_1, ..."
        )
    return values.astype(np.int64)
