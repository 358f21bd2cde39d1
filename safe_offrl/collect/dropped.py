"""Episodes that an environment failed in while behaviour is learnt or logged: they are left out."""

from __future__ import annotations

from safe_offrl.errors import EnvError, EnvFault

# Episodes that may fail in a row. A simulator that fails in a tenth of its episodes gets through
# any log (0.1^10 a position); one that is broken is given up at once.
FAILURES_IN_A_ROW = 10


class Dropped:
    """How many episodes were left out so far, and why the last one was."""

    def __init__(self) -> None:
        self.count = 0
        self.last = ""
        self._in_a_row = 0

    def add(self, fault: EnvFault) -> None:
        """Leave out one more; EnvError if it is too many in a row."""
        self.count += 1
        self.last = str(fault)
        self._in_a_row += 1
        if self._in_a_row == FAILURES_IN_A_ROW:
            raise EnvError(
                f"The environment failed in {FAILURES_IN_A_ROW} episodes in a row, the last time "
                f"so: {fault}"
            ) from fault

    def completed(self) -> None:
        """An episode came to its end."""
        self._in_a_row = 0
