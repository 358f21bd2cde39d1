"""Arrays and metadata of a log in memory, and how much of it is held at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.spec import TAKEN
from safe_offrl.types import signal_column

# Arrays by name; whatever has shape, dtype and [a:b], as an HDF5 dataset, may stand for one.
Arrays = Mapping[str, NDArray[Any]]
Metadata = Mapping[str, Any]
Flags = NDArray[np.bool_]  # [N]
MAX_DATASET_BYTES = 8 * 2**30  # the largest public DSRL file fits several times
CHUNK_ROWS = 65_536  # rows that a streaming pass holds at once


def chunks(n: int) -> Iterator[slice]:
    """0..n in pieces of :data:`CHUNK_ROWS`."""
    return (slice(start, min(start + CHUNK_ROWS, n)) for start in range(0, n, CHUNK_ROWS))


def signal_of(name: str) -> str:
    """The signal that a file's array is of: "hazards" of "costs_hazards" or "cost_hazards", or "".

    >>> [signal_of(name) for name in ("costs_hazards", "cost_vases_2", "costs", "cost_1")]
    ['hazards', 'vases_2', '', '']
    """
    found = re.fullmatch(r"costs?_([a-zA-Z_]\w*)", name, re.ASCII)
    return found[1] if found and found[1] not in TAKEN else ""


def signals_in(names: Iterable[str]) -> list[str]:
    """The signals whose columns are among these names, in their order."""
    return sorted(
        found for name in names if (found := signal_of(name)) and signal_column(found) == name
    )


def metadata_text(metadata: Metadata) -> str:
    """The JSON that a container keeps."""
    return json.dumps(metadata, sort_keys=True, allow_nan=False)
