"""Online transitions in one preallocated contiguous store."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from safe_offrl.errors import DataError
from safe_offrl.types import Layout


class TransitionBuffer:
    """A ring of rows [capacity, D]; once full, the oldest rows are overwritten first.

    Every stored row is in :attr:`rows`, the one written last included, so a sampler that draws
    indices below :attr:`size` reaches all of them.
    """

    def __init__(self, layout: Layout, capacity: int, device: torch.device | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}, but at least one row is needed")
        self.layout = layout
        self.capacity = capacity
        self._store = torch.zeros(capacity, layout.width, device=device)
        self._cursor = 0  # the slot that the next row goes to
        self._size = 0

    @property
    def size(self) -> int:
        """Rows stored, at most ``capacity``."""
        return self._size

    @property
    def rows(self) -> Tensor:
        """The valid rows [size, D] as a view, in slot order (not in order of age once wrapped)."""
        return self._store[: self._size]

    def append(self, rows: Tensor) -> None:
        """Copy rows [n, D] in; of more than ``capacity`` rows only the last ``capacity`` stay."""
        if rows.ndim != 2 or rows.shape[1] != self.layout.width:
            raise ValueError(f"rows are {list(rows.shape)}, expected [n, {self.layout.width}]")
        rows = rows[-self.capacity :]
        first = min(len(rows), self.capacity - self._cursor)  # up to the end of the ring
        self._store[self._cursor : self._cursor + first] = rows[:first]
        self._store[: len(rows) - first] = rows[first:]
        self._cursor = (self._cursor + len(rows)) % self.capacity
        self._size = min(self._size + len(rows), self.capacity)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the valid rows and the cursor; enough to continue bitwise."""
        return {"rows": self.rows.clone(), "cursor": torch.tensor(self._cursor)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the content by that of :meth:`state_dict`.

        Raises DataError when the rows do not fit this buffer or contradict the cursor.
        """
        rows, cursor = state["rows"], int(state["cursor"])
        fits = rows.ndim == 2 and rows.shape[1] == self.layout.width and len(rows) <= self.capacity
        # Until the ring is full the next free slot is the one after the last row.
        free = [len(rows)] if fits and len(rows) < self.capacity else range(self.capacity)
        if not fits or cursor not in free:
            raise DataError(
                f"The saved buffer holds {list(rows.shape)} rows, cursor {cursor}, which does "
                f"not fit a buffer of {self.capacity} x {self.layout.width}. Resume with the "
                "environment and the budget of the original run."
            )
        self._store[: len(rows)] = rows
        self._size = len(rows)
        self._cursor = cursor
