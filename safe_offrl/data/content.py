"""Arrays and metadata of a log in memory, and how much of it is held at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Arrays by name; whatever has shape, dtype and [a:b], as an HDF5 dataset, may stand for one.
Arrays = Mapping[str, NDArray[Any]]
Metadata = Mapping[str, Any]
Flags = NDArray[np.bool_]  # [N]
MAX_DATASET_BYTES = 8 * 2**30  # the largest public DSRL file fits several times
CHUNK_ROWS = 65_536  # rows that a streaming pass holds at once


def chunks(n: int) -> Iterator[slice]:
    """0..n in pieces of :data:`CHUNK_ROWS`."""
    return (slice(start, min(start + CHUNK_ROWS, n)) for start in range(0, n, CHUNK_ROWS))


def metadata_text(metadata: Metadata) -> str:
    """The JSON that a container keeps."""
    return json.dumps(metadata, sort_keys=True, allow_nan=False)
