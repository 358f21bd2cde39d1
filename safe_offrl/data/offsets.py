"""Observations far from zero: what float32 would round away is subtracted before it can.

A position in metres on a map is five million and a few metres. float32 keeps seven digits, none of
which says where the robot is. Entries that it would rob of their digits are kept less a constant,
the metadata's "observation_offset", which the adapter of the environment subtracts as well; all
others, and every array that is float32 already, stay as they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_offrl.data.content import Arrays, Metadata, chunks
from safe_offrl.errors import DataError

OFFSET = "observation_offset"  # the metadata's key: a float64 for each entry of an observation
OBSERVATIONS = ("observations", "next_observations")
LOST = 1e-3  # an entry has an offset if float32 rounds by this share of its spread
NOISE = 64.0 * float(
    np.finfo(np.float64).eps
)  # float64's own rounding stays below this share of an entry


class Shifted:
    """An array [N, O] with a constant [O] added in float64 as it is sliced."""

    def __init__(self, array: Any, shift: NDArray[np.float64], kind: type) -> None:
        self._array, self._shift = array, shift
        self.shape, self.ndim, self.dtype = array.shape, array.ndim, np.dtype(kind)

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, part: Any) -> NDArray[Any]:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
            return (np.asarray(self._array[part], np.float64) + self._shift).astype(self.dtype)


def find_offset(observations: Any) -> NDArray[np.float64] | None:
    """What to subtract from observations [N, O] before they become float32; None if nothing.

    The mean where it is needed and 0 elsewhere, rounded to float32: so it is found again in what
    was written with it. It is needed where what float32 rounds away is more than LOST of the
    spread. A spread of no more than the rounding errors of float64 has no digits to lose.
    """
    kind = observations.dtype
    numbers = kind.kind in "fiu" and observations.ndim == 2 and len(observations)
    if not numbers or np.can_cast(kind, np.float32):
        return None
    n, o = observations.shape
    total, squares, lost, size = np.zeros(o), np.zeros(o), np.zeros(o), np.zeros(o)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused later
        first = np.asarray(observations[:1], np.float64)[0]
        for part in chunks(n):
            values = np.asarray(observations[part], np.float64)
            size = np.maximum(size, np.abs(values).max(axis=0))
            total += (values - first).sum(axis=0)  # of differences: no digits are lost
            squares += np.square(values - first).sum(axis=0)
            lost += np.square(values - values.astype(np.float32)).sum(axis=0)
        mean = total / n
        spread = np.sqrt(np.maximum(squares / n - mean**2, 0.0))
        far = (np.sqrt(lost / n) > LOST * spread) & (spread > NOISE * size)
        offset = np.where(far, (first + mean).astype(np.float32).astype(np.float64), 0.0)
    return offset if far.any() else None


def centred(arrays: Arrays, metadata: Metadata) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """With observations less their offset, in float32, and the metadata's OFFSET; or as they are.

    Metadata that name an offset say that it has been subtracted. DataError if they name none that
    fits.
    """
    found, noted = dict(arrays), dict(metadata)
    if OFFSET in noted:
        _require_offset(noted[OFFSET], found)
        return found, noted
    offset = find_offset(found["observations"])
    if offset is None:
        return found, noted
    noted[OFFSET] = offset.tolist()
    # An array of another shape than the observations' own is refused later.
    shape = found["observations"].shape
    for key in (name for name in OBSERVATIONS if name in found and found[name].shape == shape):
        lazy: Any = Shifted(found[key], -offset, np.float32)
        found[key] = lazy[:] if isinstance(found[key], np.ndarray) else lazy
    return found, noted


def in_own_units(arrays: Arrays, metadata: Metadata) -> tuple[Arrays, Metadata, np.dtype[Any]]:
    """For a file that others read: observations as the environment gave them, and their type.

    float32, or float64 where :func:`centred` has, or would have, subtracted an offset.
    """
    found, noted = centred(arrays, metadata)
    if OFFSET not in noted:
        return found, noted, np.dtype("<f4")
    offset = np.asarray(noted.pop(OFFSET), np.float64)
    whole: dict[str, Any] = {k: Shifted(found[k], offset, np.float64) for k in OBSERVATIONS}
    return {**found, **whole}, noted, np.dtype("<f8")


def offset_of(metadata: Metadata) -> NDArray[np.float64] | None:
    """The offset that the metadata of a dataset name."""
    return np.asarray(metadata[OFFSET], np.float64) if OFFSET in metadata else None


def _require_offset(given: Any, arrays: Arrays) -> None:
    observations = arrays["observations"]
    try:
        offset = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        offset = np.zeros(0)
    if offset.shape != observations.shape[1:] or not np.isfinite(offset).all():
        raise DataError(
            f"The metadata's {OFFSET} is not one finite number for each of the "
            f"{observations.shape[-1]} entries of an observation. Leave it out, and store "
            "observations as they are, in float64."
        )
