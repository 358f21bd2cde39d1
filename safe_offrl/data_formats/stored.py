"""What every dataset format holds: named arrays and metadata, how they are stored, their identity.

A file may come from anywhere: no format reads pickles, follows links or allocates memory before
the declared sizes have been added up.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from safe_offrl.data.content import MAX_DATASET_BYTES, Arrays, Metadata, chunks, signals_in
from safe_offrl.env.identity import KEY
from safe_offrl.errors import DataError
from safe_offrl.types import signal_column

RowProgress = Callable[[int, int], None]  # (rows done, rows in all)


class Raw(NamedTuple):
    """What a reader returns; ``remarks``: sentences on what was not used, guessed or repaired.

    ``unsure``: why it is not known which episodes terminated; "" if it is.
    """

    arrays: dict[str, NDArray[Any]]
    metadata: dict[str, Any]
    remarks: tuple[str, ...] = ()
    unsure: str = ""


REQUIRED = (
    "observations",
    "next_observations",
    "actions",
    "rewards",
    "costs",
    "terminals",
    "timeouts",
)
# These metadata say how an earlier load found the source of a file, and are not its content.
HISTORY = ("remarks", "unsure")
ATTRIBUTE = "safe_offrl"  # the name under which a container keeps our metadata, as JSON
# accidents [N] (bool) is the accident rule's verdict, episode_behaviours [M] (int32) the index into
# metadata["behaviours"] of the behaviour that logged each episode, behaviour_log_probs [N] the log
# density of each action, as stored, under whoever chose it. Besides, costs_NAME [N] is the cost
# signal NAME.
OPTIONAL = ("accidents", "episode_behaviours", "behaviour_log_probs")
TABLES = ("observations", "actions", "next_observations")  # two-dimensional
_BOOLEAN = ("terminals", "timeouts", "accidents")


def stored_names(names: Iterable[str]) -> list[str]:
    """Those of a log's arrays that a file holds, in the order in which they are hashed."""
    present = list(names)
    known = [key for key in (*REQUIRED, *OPTIONAL) if key in present]
    return known + [signal_column(name) for name in signals_in(present)]


def stored_type(key: str) -> np.dtype[Any]:
    """Type in which an array is stored and hashed."""
    kind = "?" if key in _BOOLEAN else "<i4" if key == "episode_behaviours" else "<f4"
    return np.dtype(kind)


def dataset_sha256(arrays: Arrays, metadata: Metadata) -> str:
    """Identity of a dataset's content: names, types, shapes and values, and the metadata.

    The bytes of the container do not enter: the same data have the same identity in every format.
    Nor does that of the environment that they were logged in, which is no part of them.
    """
    digest = hashlib.sha256()
    for key in stored_names(arrays):
        array, kind = arrays[key], stored_type(key)
        digest.update(f"{key} {kind.str} {tuple(array.shape)}\n".encode())
        for part in chunks(len(array)):
            digest.update(np.ascontiguousarray(array[part].astype(kind)).data)
    content = {key: value for key, value in metadata.items() if key not in (KEY, *HISTORY)}
    digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def parse_metadata(text: Any, name: str = ATTRIBUTE) -> dict[str, Any]:
    """A JSON object with distinct keys; DataError if it is anything else."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        metadata = json.loads(text, object_pairs_hook=_without_duplicates)
        if isinstance(metadata, dict):
            return metadata
    raise DataError(
        f'The dataset\'s attribute "{name}" is not a JSON object with distinct keys. '
        "Log the dataset again, or delete the entry and give the horizon."
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate keys")
    return found


def require_size(path: Path, sizes: Iterable[int]) -> None:
    """Raise DataError if arrays of these many bytes would not fit the limit for one dataset."""
    size = sum(sizes)
    if size > MAX_DATASET_BYTES:
        raise DataError(
            f'The dataset "{path}" would take {size / 2**30:.0f} GiB, more than the limit of '
            f"{MAX_DATASET_BYTES / 2**30:.0f} GiB. Split it into smaller files, or, if it is HDF5 "
            "in the DSRL layout, `safe-offrl convert` it to a memory map (FOLDER.mmap)."
        )


@contextlib.contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a damaged file makes a library raise into one sentence."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # OSError, RuntimeError, KeyError, BadZipFile, struct.error ...
        raise DataError(
            f'The dataset "{path}" cannot be read as {kind} ({" ".join(str(error).split())}). '
            "The file is damaged or of another format; copy or log it again."
        ) from error
